"""Stock vLLM behind the fronts that anybody has: a session id that sticks, a hash of it, or none."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.simulation.system import Holdings, Seats, System, Turn
from bench.workloads.runs import Run
from kvcache.policy import Foretold, Policy

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

VIRTUAL_NODES = 160


class Stock(System):
    """LRU; each run sticks to the worker that had the fewest live runs when it began.

    The session id that ordinary clients send names the run, so that all sessions of a run sit together. The front
    counts live runs as its clients do, who know when theirs end; the engines learn nothing of it.
    """

    name = "stock"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.seats = Seats([0] * len(cluster.engines))

    def home(self, turn: Turn) -> int:
        """The worker of the turn's run; a new run is seated."""
        run = turn.run.id
        if run not in self.seats.of:
            self.seats.take(run, self.seats.fewest())
        return self.seats.of[run]

    def arrived(self, turn: Turn) -> None:
        self.cluster.send(turn, self.home(turn))

    def ended(self, run: Run) -> None:
        self.seats.leave(run.id)

    def lost(self, worker: int, turns: Sequence[Turn]) -> None:
        if type(self).home is not Stock.home or type(self).arrived is not Stock.arrived:
            raise NotImplementedError(f"{self.name} does not know that a worker is down")
        self.seats.close(worker)
        for turn in turns:
            self.cluster.again(turn)

    def restored(self, worker: int) -> None:
        self.seats.open(worker)


class StockThreshold(Stock):
    """As stock, with vLLM's own remedy for long prefills: while others are there none takes more than half a step."""

    name = "stock-threshold"
    threshold = 0.5


class StockRoundRobin(Stock):
    """LRU; each call goes to the next worker."""

    name = "stock-round-robin"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.calls = 0

    def arrived(self, turn: Turn) -> None:
        self.cluster.send(turn, self.calls % len(self.cluster.engines))
        self.calls += 1


class StockLeastLoaded(Stock):
    """LRU; each call goes to the worker with the fewest calls in it, of equals to the one chosen longest ago."""

    name = "stock-least-loaded"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.calls = 0
        self.chosen = [0] * len(cluster.engines)

    def arrived(self, turn: Turn) -> None:
        engine = min(self.cluster.engines, key=lambda e: (e.load, self.chosen[e.index], e.index))
        self.calls += 1
        self.chosen[engine.index] = self.calls
        self.cluster.send(turn, engine.index)


class Ring:
    """Consistent hashing by md5, with 160 virtual nodes for each worker."""

    def __init__(self, workers: int) -> None:
        nodes = [(_hash(f"worker-{w}#{v}"), w) for w in range(workers) for v in range(VIRTUAL_NODES)]
        self._nodes = sorted(nodes)

    def worker(self, key: str) -> int:
        """The worker whose node follows the key on the ring."""
        return self._nodes[bisect.bisect(self._nodes, (_hash(key), 0)) % len(self._nodes)][1]


class StockHash(Stock):
    """LRU; each run goes to the worker that its id hashes to."""

    name = "stock-hash"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.ring = Ring(len(cluster.engines))

    def home(self, turn: Turn) -> int:
        return self.ring.worker(turn.run.id)


class Unlimited(Stock):
    """Stock placement over memory without limit: what a perfect cache would give."""

    name = "unlimited"
    unlimited = True


class StockRelease(Stock):
    """As `stock`, but clients mark the end of a run: what no live session's latest step contains goes first."""

    name = "stock-release"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.held = Holdings()

    def policy(self) -> Policy:
        return Foretold()

    def finished(self, turn: Turn) -> None:
        self.held.add(turn)

    def ended(self, run: Run) -> None:
        super().ended(run)
        self.held.release(run, self.cluster.engines)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:8], "big")
