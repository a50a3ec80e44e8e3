"""A retention index as numbers that can be sent: against the idle time, in steps of equal ratio."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log
from typing import Annotated

from msgspec import Meta, Struct

MOST_VALUES = 256
HIGHEST = 1e9  # 1/s


class LogCurve(Struct, frozen=True):
    """`values[i]` in 1/s holds from first x r^i idle seconds on, where r^len(values) is last / first.

    The first value holds before `first`, too, the last one after `last`. ValueError where that is no curve: `first` at
    least a microsecond, `last` at most 1e9 seconds, and finite values.
    """

    first: float
    last: float
    values: Annotated[Sequence[Annotated[float, Meta(ge=0.0, le=HIGHEST)]], Meta(max_length=MOST_VALUES)]

    def __post_init__(self) -> None:
        if not 1e-6 <= self.first < self.last <= 1e9 or not self.values or not isfinite(sum(self.values)):
            raise ValueError("1e-6 <= first < last <= 1e9, and at least one value, all finite")

    def index(self, idle: float) -> float:
        """1/s, after `idle` seconds."""
        if idle <= self.first:
            return self.values[0]
        step = log(idle / self.first) / log(self.last / self.first) * len(self.values)
        return self.values[min(int(step), len(self.values) - 1)]
