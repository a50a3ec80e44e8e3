"""A semaphore in the client: the gate that takes three lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.simulation.system import Turn
from bench.simulation.systems.stock import Stock
from bench.workloads.runs import Run

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster


class Semaphore(Stock):
    """Over `stock`, N runs at once, first come, first served: as many as have room with a mean context each.

    N = floor(KV tokens of all workers, host tiers included / mean tokens of a call), at least one for each worker.
    A run keeps its place through its gaps, until its client says that it has ended.
    """

    name = "semaphore"
    share = 1.0  # of N

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        tokens = sum(engine.kv_tokens + engine.tier_tokens for engine in cluster.engines)
        self.places = max(len(cluster.engines), int(self.share * tokens / cluster.mean_context))
        self.inside: set[str] = set()
        self.outside: dict[str, list[Turn]] = {}

    def arrived(self, turn: Turn) -> None:
        run = turn.run.id
        if run not in self.inside and len(self.inside) < self.places and not self.outside:
            self.inside.add(run)
        if run in self.inside:
            super().arrived(turn)
        else:
            self.outside.setdefault(run, []).append(turn)

    def ended(self, run: Run) -> None:
        super().ended(run)
        self.inside.discard(run.id)
        while self.outside and len(self.inside) < self.places:
            first = next(iter(self.outside))
            self.inside.add(first)
            for turn in self.outside.pop(first):
                super().arrived(turn)
