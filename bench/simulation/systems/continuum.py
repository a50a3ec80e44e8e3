"""Continuum, also CacheTTL (arXiv 2511.02230): the oldest program first, its KV kept over tool calls.

Ours, from the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.simulation.system import Holdings, Turn
from bench.simulation.systems.index import Index
from bench.workloads.runs import Run

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster


class Continuum(Index):
    """Ours, from the paper: calls are served in the order in which their programs began (program-FCFS).

    The paper pins KV for a time that weighs the cost of loading it again against that of holding it, by each tool's
    history. The retention index over learned gaps weighs the same two, and stands in for the pin here. Clients mark a
    program's last step, which releases its KV.
    """

    name = "continuum"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.began_at: dict[str, float] = {}
        self.held = Holdings()

    def began(self, run: Run) -> None:
        self.began_at[run.id] = self.cluster.now

    def key(self, turn: Turn) -> float | None:
        return self.began_at[turn.run.id]

    def ended(self, run: Run) -> None:
        super().ended(run)
        del self.began_at[run.id]
        self.held.release(run, self.cluster.engines)

    def finished(self, turn: Turn) -> None:
        super().finished(turn)
        self.held.add(turn)
