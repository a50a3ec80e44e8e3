"""A retention index as numbers that can be sent: against the idle time, in steps of equal ratio."""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from math import log

from msgspec import Struct

MOST_VALUES = 256
HIGHEST = 1e9  # 1/s


class LogCurve(Struct, frozen=True):
    """`values[i]` in 1/s holds from first x r^i idle seconds on, where r^len(values) is last / first.

    The first value holds before `first`, too, the last one after `last`; what is no value from 0 to `HIGHEST` counts
    as 0. ValueError where that is no curve: `first` at least a microsecond, `last` at most 1e9 seconds, 1 to
    `MOST_VALUES` values.
    """

    first: float
    last: float
    values: Sequence[float]

    def __post_init__(self) -> None:
        if not (1e-6 <= self.first < self.last <= 1e9 and 1 <= len(self.values) <= MOST_VALUES):
            raise ValueError(f"1e-6 <= first < last <= 1e9, and 1 to {MOST_VALUES} values")

    @property
    def packed(self) -> str:
        """The values as little-endian float32, in base64: a message of many curves is read in no time."""
        return b64encode(_turned(array("f", self.values)).tobytes()).decode()

    @classmethod
    def unpacked(cls, first: float, last: float, values: bytes) -> LogCurve:
        """With these float32. ValueError, as above."""
        return cls(first, last, _turned(array("f", values)))

    def index(self, idle: float) -> float:
        """1/s, after `idle` seconds."""
        place = 0
        if idle > self.first:
            place = int(log(idle / self.first) / log(self.last / self.first) * len(self.values))
        value = self.values[min(place, len(self.values) - 1)]
        return value if 0.0 <= value <= HIGHEST else 0.0


def _turned(values: array[float]) -> array[float]:
    """From this machine's byte order to little-endian, or back."""
    if sys.byteorder == "big":
        values.byteswap()
    return values
