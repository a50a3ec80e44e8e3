"""The distribution of a gap, and what follows from it for a session that has been idle for a while."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import accumulate

from kvcache.curve import LogCurve
from scheduler.histogram import LogBins, Spread

DAY = 86_400.0
GAPS = LogBins(0.01, DAY, 48)  # seconds; a longer gap counts as a day

_LENGTHS = [b - a for a, b in zip(GAPS.edges, GAPS.edges[1:], strict=False)]
# The integral over a bin of the share of its mass that lies before a time, the mass being uniform in log time.
_RISES = [b - length / GAPS.width for b, length in zip(GAPS.edges[1:], _LENGTHS, strict=True)]


class Gap:
    """Seconds to the next step: `spread` given that there is one, `never` the chance that there is none.

    `idle` is how many seconds have already passed without it. Times are floats in seconds. Not to be changed.
    """

    __slots__ = ("_areas", "_best", "never", "spread")

    def __init__(self, probabilities: Iterable[float], never: float) -> None:
        self.spread = Spread(GAPS, probabilities)
        self.never = never
        self._areas: Sequence[float] = ()
        self._best = b""

    def unlikely(self, never: float) -> Gap:
        """The same gap where the chance that there is no next step is at least `never`."""
        if never <= self.never:
            return self
        gap = copy(self)
        gap.never, gap._areas, gap._best = never, (), b""
        return gap

    def quantile(self, q: float, idle: float = 0.0) -> float:
        """The further wait that a share `q` of the returning does not exceed."""
        passed = self.spread.below(idle)
        return max(self.spread.quantile(passed + q * (1 - passed)) - idle, 0.0)

    def never_after(self, idle: float) -> float:
        """The chance that the session is gone, now that it has been idle so long."""
        waiting = (1 - self.never) * (1 - self.spread.below(idle))
        return self.never / (self.never + waiting) if self.never + waiting > 0 else 1.0

    def returns_by(self, seconds: float, idle: float = 0.0) -> float:
        """The chance that the next step arrives within so many further seconds."""
        awaited = 1 - self._risen(idle)
        return (self._risen(idle + seconds) - self._risen(idle)) / awaited if awaited > 0 else 0.0

    def mean_within(self, seconds: float, idle: float = 0.0) -> float:
        """The expected further wait, cut off after so many seconds: E[min(G - idle, seconds) | G > idle]."""
        awaited = 1 - self._risen(idle)
        return (self._area(idle + seconds) - self._area(idle)) / awaited if awaited > 0 else seconds

    def index(self, idle: float) -> float:
        """The retention index, in 1/s: max over h of P(G <= idle + h | G > idle) / E[min(G - idle, h) | G > idle].

        That is the steepest slope from here to a later point of the curve (mean wait, chance), found once for all bins
        by the curve's least concave majorant, then looked up in O(1). Horizons are edges of bins. 0 after a day.
        """
        if idle >= DAY:
            return 0.0
        if not self._best:
            self._best = self._majorant()
        i = min(int(GAPS.position(idle)), GAPS.count - 1)
        area, risen = self._area(idle), self._risen(idle)
        later = {self._best[i], self._best[min(i + 1, GAPS.count - 1)]}
        return max((self._risen_at(j) - risen) / max(self._edge_areas()[j] - area, 1e-12) for j in later)

    def curve(self) -> LogCurve:
        """The retention index at the edges of the bins, as an engine can be told it."""
        if not self._best:
            self._best = self._majorant()
        areas, cdf, comes = self._edge_areas(), self.spread.cdf, 1 - self.never
        slopes = [comes * (cdf[j] - cdf[i]) / max(areas[j] - areas[i], 1e-12) for i, j in enumerate(self._best)]
        return LogCurve.of(GAPS.edges[0], DAY, slopes)

    def _risen(self, seconds: float) -> float:
        return (1 - self.never) * self.spread.below(seconds)

    def _risen_at(self, edge: int) -> float:
        return (1 - self.never) * self.spread.cdf[edge]

    def _edge_areas(self) -> Sequence[float]:
        """The integral of P(G > t) from 0 to each edge."""
        if not self._areas:
            comes, cdf = 1 - self.never, self.spread.cdf
            waits = [
                (1 - comes * before) * length - comes * (after - before) * rise
                for before, after, length, rise in zip(cdf, cdf[1:], _LENGTHS, _RISES, strict=False)
            ]
            self._areas = array("d", accumulate(waits, initial=GAPS.edges[0]))
        return self._areas

    def _area(self, seconds: float) -> float:
        """The integral of P(G > t) from 0 to a time."""
        if seconds <= GAPS.edges[0]:
            return seconds
        if seconds >= DAY:
            return self._edge_areas()[-1] + self.never * (seconds - DAY)
        i = min(int(GAPS.position(seconds)), GAPS.count - 1)
        start = GAPS.edges[i]
        mass = self._risen_at(i + 1) - self._risen_at(i)
        rise = (seconds * math.log(seconds / start) - (seconds - start)) / GAPS.width
        return self._edge_areas()[i] + (1 - self._risen_at(i)) * (seconds - start) - mass * rise

    def _majorant(self) -> bytes:
        """Per edge the later edge to which the slope is steepest, found from the end."""
        points = list(zip(self._edge_areas(), self.spread.cdf, range(GAPS.count + 1), strict=True))
        best = bytearray(GAPS.count)
        hull = [points.pop()]
        for x, y, i in reversed(points):
            top = hull[-1]
            while len(hull) > 1:
                below = hull[-2]
                if (top[1] - y) * (below[0] - x) > (below[1] - y) * (top[0] - x):
                    break
                hull.pop()
                top = below
            best[i] = top[2]
            hull.append((x, y, i))
        return bytes(best)
