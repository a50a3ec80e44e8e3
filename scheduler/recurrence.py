"""How soon a step of a role comes to a worker again: what foretells a role's common prefix where no graph does."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

from scheduler.awaited import PATIENCE, RETURNING
from scheduler.forecast import Key
from scheduler.gaps import GAPS, Gap
from scheduler.histogram import blend, remember

MOST = 4096  # roles on workers that are remembered: those that came last
TOGETHER = 1.0  # seconds; steps of a role that come closer are one use, such as a fan-out's
PRIOR = GAPS.log_normal(30.0, 2.0)  # seconds; counts as `KAPPA` gaps
KAPPA = 2.0
ENDS = 0.02  # the chance that no step of the role comes there any more


@dataclass(slots=True)
class _Role:
    last: float
    gaps: bytes = b""
    gap: Gap | None = None  # made of `gaps` when it is asked for
    due: float = 0.0


class Recurrence:
    """Of each role on each worker, the time of the latest step and the gaps before it. Times in seconds.

    A role that is overdue, as nearly all come sooner, is forgotten.
    """

    def __init__(self) -> None:
        self._roles: OrderedDict[Key, _Role] = OrderedDict()
        self._due: list[tuple[float, Key]] = []

    def __len__(self) -> int:
        return len(self._roles)

    def came(self, key: Key, now: float) -> None:
        """A step of the role was sent to the worker."""
        role = self._roles.pop(key, None) or _Role(now)
        self._roles[key] = role
        if now - role.last >= TOGETHER:
            role.gaps = remember(role.gaps, GAPS.bin(now - role.last))
        role.last, role.gap = now, None
        if len(self._roles) > MOST:
            self._roles.popitem(last=False)

    def gap(self, key: Key) -> tuple[float, Gap] | None:
        """When the latest step came, and the gap to the next one. None before a second one has come."""
        role = self._roles.get(key)
        if role is None or not role.gaps:
            return None
        if role.gap is None:
            role.gap = Gap(blend(PRIOR, role.gaps, KAPPA), ENDS)
            self._expect(key, role, role.last + max(PATIENCE, role.gap.quantile(RETURNING)))
        return role.last, role.gap

    def lapsed(self, now: float) -> list[Key]:
        """Forget the roles that are overdue, of those that were asked for."""
        found = []
        while self._due and self._due[0][0] <= now:
            due, key = heapq.heappop(self._due)
            role = self._roles.get(key)
            if role is not None and role.gap is not None and role.due == due:
                del self._roles[key]
                found.append(key)
        return found

    def _expect(self, key: Key, role: _Role, due: float) -> None:
        role.due = due
        heapq.heappush(self._due, (due, key))
        if len(self._due) > 2 * len(self._roles) + 1024:
            self._due = [(one.due, name) for name, one in self._roles.items() if one.gap is not None]
            heapq.heapify(self._due)
