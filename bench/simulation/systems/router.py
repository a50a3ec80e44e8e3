"""vllm-router 0.1.17 without program scheduling. Models of documented behaviour, not its code."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from bench.simulation.system import System, Turn
from bench.simulation.systems.stock import StockHash
from bench.workloads.runs import Piece

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

MATCH = 0.3  # cache_threshold
ABSOLUTE, RELATIVE = 64, 1.5  # balance_abs_threshold, balance_rel_threshold
CHARACTERS = 2**25  # max_tree_size, for each worker
CHARACTERS_PER_TOKEN = 4
CLEANING = 120.0  # eviction_interval_secs


class RouterConsistentHash(StockHash):
    """`--policy consistent_hash`: a ring of 160 virtual nodes for each worker, keyed with the session header.

    A model of documented behaviour; the session that clients send names the run. The ring's hash is ours.
    """

    name = "vllm-router-consistent-hash"


class RouterCacheAware(System):
    """`--policy cache_aware`, the default, with its default settings.

    A model of documented behaviour: an approximate tree of the prompts sent where. A call goes to the worker that last
    got the longest known prefix, if that is more than 30 % of its prompt; else to the one with the fewest calls. Where
    the most loaded worker has over 64 calls more and over 1.5 times as many as the least loaded, to the least loaded.
    The tree keeps 2^25 characters for each worker, cleaned every 120 s, least recently used first; a token counts as
    4 characters. The real router was not as sticky in our runs, for a reason that we have not found.
    """

    name = "vllm-router-cache-aware"
    tick = CLEANING

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.calls = [0] * len(cluster.engines)
        self.tree: OrderedDict[Piece, int] = OrderedDict()  # where each was sent last, the longest ago first
        self.tokens = 0

    def arrived(self, turn: Turn) -> None:
        worker = self._choose(turn.call.prompt)
        self._learn(turn.call.prompt, worker)
        self.calls[worker] += 1
        self.cluster.send(turn, worker)

    def finished(self, turn: Turn) -> None:
        assert turn.worker is not None
        self.calls[turn.worker] -= 1

    def ticked(self) -> None:
        most = CHARACTERS // CHARACTERS_PER_TOKEN * len(self.calls)
        while self.tokens > most:
            piece, _ = self.tree.popitem(last=False)
            self.tokens -= piece.tokens

    def _choose(self, prompt: Piece) -> int:
        least = min(range(len(self.calls)), key=self.calls.__getitem__)
        most = max(self.calls)
        if most - self.calls[least] > ABSOLUTE and most > RELATIVE * self.calls[least]:
            return least
        at: Piece | None = prompt
        while at is not None and at not in self.tree:
            at = at.parent
        return self.tree[at] if at is not None and at.end > MATCH * prompt.end else least

    def _learn(self, prompt: Piece, worker: int) -> None:
        at: Piece | None = prompt
        while at is not None:  # from the end, so that no piece is forgotten before those that follow it
            if at not in self.tree:
                self.tokens += at.tokens
            self.tree[at] = worker
            self.tree.move_to_end(at)
            at = at.parent
