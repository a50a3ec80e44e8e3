"""Which sessions are overdue: few clients say that they are done, so one counts only as long as its kind returns."""

from __future__ import annotations

import heapq

from scheduler.gaps import Gap
from scheduler.graph import Graph, Session

RETURNING, PATIENCE = 0.95, 10.0  # the share of sessions that return before they are overdue, and seconds for all
SPARE = 1024  # stale entries that the heap may always have


class Awaited:
    """Sessions that are expected back, by when. Amortised O(log sessions)."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Session]] = []
        self._number = 0

    def expect(self, session: Session, gap: Gap, graph: Graph, now: float) -> None:
        """The session is idle now, if it is live: it is overdue once most of its kind would have returned."""
        if session not in graph.live:
            return
        session.due = now + max(PATIENCE, gap.quantile(RETURNING))
        if session.due >= now + graph.limits.live_seconds:
            return
        self._number += 1
        heapq.heappush(self._due, (session.due, self._number, session))
        if len(self._due) > 2 * len(graph.live) + SPARE:
            self._due = [entry for entry in self._due if entry[0] == entry[2].due]
            heapq.heapify(self._due)

    def lapsed(self, now: float) -> list[Session]:
        """Take those that are overdue and have no step."""
        found = []
        while self._due and self._due[0][0] <= now:
            due, _, session = heapq.heappop(self._due)
            if session.due == due and not session.running:
                found.append(session)
        return found
