"""How many steps a session makes: the chance to end after a step, per depth, so that live sessions teach too."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from scheduler.chances import shrunk

# The first depth of each bin: every depth up to 8, then two bins an octave; the last has no end.
STARTS = [*range(1, 9), *(round(8 * 2 ** (i / 2)) for i in range(1, 17))]
BINS = len(STARTS)
PRIOR = 0.03  # the chance to end after a step
ROLE, DEPTH = 8.0, 4.0  # pseudo-events: sessions that ended as the level above says


def depth_bin(depth: int) -> int:
    """The bin of a session that has made so many steps."""
    return bisect_right(STARTS, depth) - 1


class StepsLeft:
    """A distribution of further steps: `ends` is the chance to end now, then after each step by the depth's chance."""

    __slots__ = ("depth", "ends", "hazards")

    def __init__(self, hazards: Sequence[float], depth: int, ends: float) -> None:
        self.hazards, self.depth, self.ends = hazards, depth, ends

    def quantile(self, q: float) -> int:
        """The smallest number of steps that is enough with probability `q` (below 1)."""
        alive = 1 - self.ends
        if alive <= 1 - q:
            return 0
        steps = 0
        for hazard, span in self._spans():
            needed = math.log((1 - q) / alive) / math.log1p(-hazard)
            if needed <= span:
                return steps + max(math.ceil(needed - 1e-9), 1)
            alive *= (1 - hazard) ** span
            steps += int(span)
        raise ValueError(f"no quantile {q}")

    def mean(self) -> float:
        """The expected number of steps."""
        alive, total = 1 - self.ends, 0.0
        for hazard, span in self._spans():
            after = alive * (1 - hazard) ** span
            total += (alive - after) / hazard
            alive = after
        return total

    def _spans(self) -> Iterable[tuple[float, float]]:
        depth = self.depth + 1
        for i in range(depth_bin(depth), BINS - 1):
            yield self.hazards[i], STARTS[i + 1] - depth
            depth = STARTS[i + 1]
        yield self.hazards[-1], math.inf


class Lengths:
    """Per (tenant, role) and depth: how many sessions ended there and how many were there. At most `capacity` roles.

    A depth's chance is drawn towards its role's, that towards everybody's, that towards `PRIOR`, each by pseudo-events.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._all = [0.0, 0.0]
        self._roles: OrderedDict[tuple[str, str], array[float]] = OrderedDict()

    def add(self, tenant: str, role: str, depth: int, ended: int) -> None:
        """Count a session that ended (1) or went on (0) after its step number `depth`."""
        counts = self._roles.get((tenant, role))
        if counts is None:
            counts = self._roles[tenant, role] = array("d", bytes(8 * 2 * BINS))
            if len(self._roles) > self.capacity:
                self._roles.popitem(last=False)
        else:
            self._roles.move_to_end((tenant, role))
        bin_ = depth_bin(max(depth, 1))
        counts[bin_] += ended
        counts[BINS + bin_] += 1
        self._all[0] += ended
        self._all[1] += 1

    def left(self, tenant: str, role: str, depth: int, ends: float = 0.0) -> StepsLeft:
        """The further steps of a session that has made `depth` and ends now with probability `ends`."""
        everybody = shrunk(self._all[0], self._all[1], PRIOR, ROLE)
        counts = self._roles.get((tenant, role))
        if counts is None:
            return StepsLeft([everybody] * BINS, depth, ends)
        ended, seen = counts[:BINS], counts[BINS:]
        own = shrunk(sum(ended), sum(seen), everybody, ROLE)
        trials = DEPTH / own
        return StepsLeft([(e + DEPTH) / (n + trials) for e, n in zip(ended, seen, strict=True)], depth, ends)

    def ended(self, tenant: str, role: str) -> float:
        """How many sessions of the role have ended."""
        counts = self._roles.get((tenant, role))
        return sum(counts[:BINS]) if counts is not None else 0.0

    def dump(self) -> list[Any]:
        """All roles, the least recent first, as plain JSON values."""
        return [list(self._all), *([*key, list(counts)] for key, counts in self._roles.items())]

    def load(self, rows: Sequence[Any]) -> None:
        """Replace all roles by those of a dump. Raises ValueError, and changes nothing, where it does not fit."""
        total, *roles = rows
        read = OrderedDict(((tenant, role), array("d", counts)) for tenant, role, counts in roles[-self.capacity :])
        if len(total) != 2 or any(not _sound(counts) for counts in read.values()):
            raise ValueError("lengths that do not fit")
        self._all, self._roles = list(total), read


def _sound(counts: array[float]) -> bool:
    return len(counts) == 2 * BINS and all(0 <= e <= n < math.inf for e, n in zip(counts, counts[BINS:], strict=False))
