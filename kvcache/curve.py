"""A retention index as numbers that can be sent: against the idle time, in steps of equal ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log


@dataclass(frozen=True, slots=True)
class LogCurve:
    """`values[i]` in 1/s holds from first x r^i idle seconds on, where r^len(values) is last / first.

    The first value holds before `first`, too, the last one after `last`. ValueError where that is no curve: `first` at
    least a microsecond, `last` at most 1e9 seconds.
    """

    first: float
    last: float
    values: Sequence[float]
    _width: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1e-6 <= self.first < self.last <= 1e9 or not self.values:
            raise ValueError("1e-6 <= first < last <= 1e9, and at least one value")
        object.__setattr__(self, "_width", log(self.last / self.first) / len(self.values))

    def index(self, idle: float) -> float:
        """1/s, after `idle` seconds."""
        if idle <= self.first:
            return self.values[0]
        return self.values[min(int(log(idle / self.first) / self._width), len(self.values) - 1)]
