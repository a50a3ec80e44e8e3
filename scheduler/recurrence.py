"""How soon a step of a role comes to a worker again: what foretells a role's common prefix where no graph does."""

from __future__ import annotations

from collections import OrderedDict

from scheduler.forecast import Key
from scheduler.gaps import GAPS, Gap
from scheduler.histogram import blend, remember

MOST = 4096  # roles on workers that are remembered: those that came last
PRIOR = GAPS.log_normal(30.0, 2.0)  # seconds; counts as `KAPPA` steps, before there are many
KAPPA = 2.0
NEVER = 0.02  # the chance that no step of the role comes there any more


class Recurrence:
    """The time of the latest step of each role on each worker, and of the latest gaps before it. Times in seconds."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def came(self, key: Key, now: float) -> bool:
        """A step of the role was sent to the worker. Returns whether it was not the first."""
        last, gaps = self._seen.pop(key, (None, b""))
        self._seen[key] = now, gaps if last is None else remember(gaps, GAPS.bin(now - last))
        if len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return last is not None

    def gap(self, key: Key) -> tuple[float, Gap] | None:
        """When the latest step came, and the gap to the next one. None before a second one has come."""
        last, gaps = self._seen.get(key, (0.0, b""))
        return (last, Gap(blend(PRIOR, gaps, KAPPA), NEVER)) if gaps else None
