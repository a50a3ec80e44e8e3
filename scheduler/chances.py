"""Chances of rare events, counted per key in a hierarchy, each level drawn towards the one above."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from scheduler.histogram import Key, as_key


def shrunk(happened: float, seen: float, towards: float, weight: float) -> float:
    """The chance after so many happened of those seen, with `weight` pseudo-events at the rate of `towards`.

    Counting the prior in events and not in trials lets a rare event keep its rate through a long quiet run, and a
    frequent one be learned from a few.
    """
    return (happened + weight) / (seen + weight / towards)


class Chances:
    """Per key, how often the event happened. At most `capacity` keys: the least recent is forgotten."""

    def __init__(self, weight: float, capacity: int) -> None:
        self.weight, self.capacity = weight, capacity
        self._counts: OrderedDict[Key, list[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def chance(self, path: Iterable[Key], prior: float) -> float:
        """The chance at the end of a path, the widest key first; a key never seen is like the one above it."""
        for key in path:
            counts = self._counts.get(key)
            if counts is not None:
                prior = shrunk(counts[0], counts[1], prior, self.weight)
        return prior

    def add(self, path: Iterable[Key], happened: bool) -> None:
        """Count one trial at every level of the path."""
        for key in reversed(tuple(path)):  # the widest last: it is forgotten after what lies under it
            counts = self._counts.get(key)
            if counts is None:
                counts = self._counts[key] = [0.0, 0.0]
                if len(self._counts) > self.capacity:
                    self._counts.popitem(last=False)
            else:
                self._counts.move_to_end(key)
            counts[0] += happened
            counts[1] += 1

    def dump(self) -> list[Any]:
        """All keys, the least recent first, as plain JSON values."""
        return [[list(key), *counts] for key, counts in self._counts.items()]

    def load(self, rows: Iterable[Any]) -> None:
        """Replace all keys by those of a dump. Raises ValueError, and changes nothing, where it does not fit."""
        read: OrderedDict[Key, list[float]] = OrderedDict()
        for key, happened, seen in rows:
            if not 0 <= happened <= seen < math.inf:
                raise ValueError(f"{happened} of {seen}")
            read[as_key(key)] = [float(happened), float(seen)]
        while len(read) > self.capacity:
            read.popitem(last=False)
        self._counts = read
