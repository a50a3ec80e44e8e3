"""Which sessions are overdue: few clients say that they are done, so one counts only as long as its kind returns."""

from __future__ import annotations

import heapq

from scheduler.graph import Session

SPARE = 1024  # stale entries that the heap may always have


class Awaited:
    """Sessions that are expected back, by when. Amortised O(log sessions)."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Session]] = []
        self._number = 0

    def expect(self, session: Session, due: float, live: int) -> None:
        """The session is overdue from `due` on; `live` is how many are live."""
        self._number += 1
        heapq.heappush(self._due, (due, self._number, session))
        if len(self._due) > 2 * live + SPARE:
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
