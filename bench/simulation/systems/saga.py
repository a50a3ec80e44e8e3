"""SAGA (arXiv 2605.00528): retention by a workflow graph, affinity with stealing, fair shares. Ours, from the paper."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING

from bench.simulation.system import Turn
from bench.simulation.systems.stock import StockRelease
from bench.workloads.runs import Piece, Run
from kvcache.policy import Hint, Policy
from kvcache.saga import Saga as WaLru

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

EPOCH = 0.1  # seconds between two looks at the queues, and T_idle
STEALS = 4  # at most in an epoch
IMBALANCE = 2.0  # R_max
SLACK = 1.5  # deadline over unloaded time
LONGEST_TTL = 300.0
WINDOW = 256  # latencies of a tool that are remembered
MAJOR = 1e6  # tenants first, then the runs of one
CONTINUES = 0.95  # chance of the graph's edge to the next step: one less its default chance to end


class Latencies:
    """The latest latencies of one tool, in seconds."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        """Remember one, and forget the oldest of too many."""
        self._latest.append(seconds)
        insort(self._sorted, seconds)
        if len(self._latest) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]

    def quantile(self, q: float) -> float:
        """Seconds; the longest time to live where nothing is known."""
        return self._sorted[min(int(q * len(self._sorted)), len(self._sorted) - 1)] if self._sorted else LONGEST_TTL


class Saga(StockRelease):
    """Ours, from the paper: WA-LRU with TTL in the engine, session affinity, work stealing, and fair shares as order.

    A worker is over the load threshold when calls wait there while another has none waiting and less than half its
    calls (R_max = 2): a session's next call then goes to that one, and stays. Each 100 ms a worker that had nothing
    to do for that long takes the oldest call from the longest queue of two or more, at most four in all; KV does not
    move with it. Calls are ordered by fair-share urgency, first of the tenant, then of the run: remaining work over the
    time to 1.5 times the unloaded end, with the true remaining work. TTLs are the 95 % quantile of the time from a
    tool call to the next request, over
    its last 256 of each tool. The graph's last node tells the end. With a host tier, a session's KV is fetched when
    the median of its tool's time has passed.
    """

    name = "saga"
    tick = EPOCH

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.latencies: dict[str, Latencies] = {}
        self.since: dict[str, tuple[str, float]] = {}
        self.started: dict[str, tuple[float, float]] = {}
        self.live: dict[str, Run] = {}
        self.urgent: tuple[float, dict[str, float]] = (-1.0, {})
        self.idle_since: list[float | None] = [0.0] * len(cluster.engines)
        self.fetches: list[tuple[float, int, str, float, int, Piece]] = []
        self.asked = 0

    def policy(self) -> Policy:
        return WaLru()

    def began(self, run: Run) -> None:
        self.started[run.id] = self.cluster.now, self.cluster.profile.unloaded(run)
        self.live[run.id] = run

    def key(self, turn: Turn) -> float | None:
        return -self._urgency().get(turn.run.tenant, 0.0) - self._pressure(turn.run)

    def _urgency(self) -> dict[str, float]:
        """Of each tenant, the sum over its runs of remaining work over the time to the deadline (Eq. 8)."""
        if self.urgent[0] < self.cluster.now:
            found: dict[str, float] = {}
            for run in self.live.values():
                found[run.tenant] = found.get(run.tenant, 0.0) + self._pressure(run)
            self.urgent = self.cluster.now, {} if len(found) == 1 else {t: MAJOR * u for t, u in found.items()}
        return self.urgent[1]

    def _pressure(self, run: Run) -> float:
        start, unloaded = self.started[run.id]
        return self.cluster.left(run) / max(1.0, start + SLACK * unloaded - self.cluster.now)

    def home(self, turn: Turn) -> int:
        worker = super().home(turn)
        engines = self.cluster.engines
        if not engines[worker].waiting:
            return worker
        able = [e for e in engines if not e.waiting and e.load * IMBALANCE < engines[worker].load]
        if able:
            worker = min(able, key=lambda e: (e.load, e.index)).index
            self.seats.take(turn.run.id, worker)
        return worker

    def arrived(self, turn: Turn) -> None:
        if turn.owner in self.since:
            tool, since = self.since.pop(turn.owner)
            self.latencies.setdefault(tool, Latencies()).add(self.cluster.now - since)
        super().arrived(turn)

    def finished(self, turn: Turn) -> None:
        super().finished(turn)
        assert turn.worker is not None
        now, call = self.cluster.now, turn.call
        tool = call.tools[0] if call.tools else call.stop
        self.since[turn.owner] = tool, now
        times = self.latencies.get(tool) or Latencies()
        if turn.last:  # a node without successor
            self.cluster.engines[turn.worker].tell(turn.owner, Hint(now, reuse=0.0))
            return
        hint = Hint(now, hold=times.quantile(0.95), reuse=CONTINUES)
        self.cluster.engines[turn.worker].tell(turn.owner, hint)
        if self.cluster.tiered:
            self.asked += 1
            fetch = (now + times.quantile(0.5), self.asked, turn.owner, now, turn.worker, call.answer or call.prompt)
            heapq.heappush(self.fetches, fetch)

    def ended(self, run: Run) -> None:
        for owner in self.held.owners(run):
            self.since.pop(owner, None)
        del self.started[run.id], self.live[run.id]
        super().ended(run)

    def ticked(self) -> None:
        now = self.cluster.now
        while self.fetches and self.fetches[0][0] <= now:
            _, _, owner, since, worker, piece = heapq.heappop(self.fetches)
            if owner in self.since and self.since[owner][1] == since:  # it has not come back yet
                self.cluster.engines[worker].prefetch(piece)
        self._steal(now)

    def _steal(self, now: float) -> None:
        steals = 0
        for engine in self.cluster.engines:
            if engine.load:
                self.idle_since[engine.index] = None
                continue
            since = self.idle_since[engine.index]
            if since is None:
                self.idle_since[engine.index] = now
            elif now - since >= EPOCH - 1e-9 and steals < STEALS and self._steal_for(engine.index):
                self.idle_since[engine.index] = None
                steals += 1

    def _steal_for(self, thief: int) -> bool:
        victim = max(self.cluster.engines, key=lambda e: (len(e.waiting), -e.index))
        fresh = [turn for turn in victim.waiting if turn.record.first_token is None]  # a preempted one stays
        if len(victim.waiting) < 2 or not fresh:
            return False
        turn = min(fresh, key=lambda t: (t.sent, t.run.id, t.index))
        victim.withdraw(turn)
        self.seats.take(turn.run.id, thief)
        held = turn.record.held
        self.cluster.send(turn, thief)
        turn.record.held = held  # it waited in an engine
        return True
