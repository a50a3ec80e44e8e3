"""A retention index as numbers that can be sent: against the idle time, in steps of equal ratio."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from struct import Struct as Layout
from struct import pack

from msgspec import Struct

MOST_VALUES = 256
HIGHEST = 1e9  # 1/s

_VALUE = Layout("<f")  # of 4 bytes


def column(figures: Sequence[float]) -> bytes:
    """Numbers as they are sent: little-endian float32. OverflowError where one is none."""
    return pack(f"<{len(figures)}f", *figures)


class LogCurve(Struct, frozen=True, gc=False):
    """`values[i]` in 1/s holds from first x r^i idle seconds on, where r^(number of values) is last / first.

    `values` are little-endian float32. The first holds before `first`, too, the last one after `last`; what is no
    value from 0 to `HIGHEST` counts as 0. Who gets one from elsewhere calls `check` before it is used.
    """

    first: float
    last: float
    values: bytes

    @classmethod
    def of(cls, first: float, last: float, values: Sequence[float]) -> LogCurve:
        """With these values in 1/s. ValueError, as of `check`; OverflowError where a value is no float32."""
        curve = cls(first, last, column(values))
        curve.check()
        return curve

    def check(self) -> None:
        """ValueError where it is none: `first` at least a microsecond, `last` at most 1e9 seconds, 1 to `MOST_VALUES`
        values."""
        size = len(self.values)
        if not (1e-6 <= self.first < self.last <= 1e9 and 4 <= size <= 4 * MOST_VALUES and size % 4 == 0):
            raise ValueError(f"1e-6 <= first < last <= 1e9, and 1 to {MOST_VALUES} float32")

    def index(self, idle: float) -> float:
        """1/s, after `idle` seconds."""
        count, place = len(self.values) // 4, 0
        if idle > self.first:
            place = min(int(log(idle / self.first) / log(self.last / self.first) * count), count - 1)
        (value,) = _VALUE.unpack_from(self.values, 4 * place)
        return value if 0.0 <= value <= HIGHEST else 0.0
