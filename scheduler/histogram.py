"""Log histograms: values in bins of equal ratio, counted per key in levels, each drawn towards the one above."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

Key = tuple[str | int | tuple[str, ...], ...]

REMEMBERED = 16  # values that a session remembers of its own
_RECENCY = [0.95**age for age in range(REMEMBERED)]  # newest first
_WEIGHT = [0.0, *accumulate(_RECENCY)]


class LogBins:
    """`count` bins of equal ratio from `low` to `high`; what lies outside falls into the first or the last."""

    def __init__(self, low: float, high: float, count: int) -> None:
        self.count = count
        self.width = math.log(high / low) / count
        self.edges = [low * math.exp(self.width * i) for i in range(count)] + [high]
        # The mean of a bin whose values are uniform in their logarithm.
        self.middles = [(b - a) / self.width for a, b in zip(self.edges, self.edges[1:], strict=False)]
        self._low, self._scale = math.log(low), 1 / self.width

    def position(self, value: float) -> float:
        """Where a positive value lies, in bins from `low`, within 0 and `count`."""
        return min(max((math.log(value) - self._low) * self._scale, 0.0), float(self.count)) if value > 0 else 0.0

    def bin(self, value: float) -> int:
        """The bin that counts the value."""
        return min(int(self.position(value)), self.count - 1)

    def log_normal(self, median: float, sigma: float, floor: float = 0.05) -> list[float]:
        """The probability of each bin under a log-normal; `floor` of the mass is spread evenly over all bins."""
        at = self.position(median)
        bell = [math.exp(-(((i + 0.5 - at) * self.width / sigma) ** 2) / 2) for i in range(self.count)]
        scale = (1 - floor) / sum(bell)
        return [floor / self.count + scale * height for height in bell]


def remember(memory: bytes, bin_: int) -> bytes:
    """The bins of a session's latest values, oldest first, at most `REMEMBERED`, with one more."""
    return memory[1 - REMEMBERED :] + bytes((bin_,))


def blend(base: Sequence[float], memory: bytes, kappa: float) -> list[float]:
    """The bins' probabilities for a session: its own latest values over `kappa` pseudo-counts of `base`.

    A value counts half in its bin and a quarter on either side; one that is k values old counts 0.95**k.
    """
    scale = 1 / (kappa + _WEIGHT[len(memory)])
    share, quarter = kappa * scale, scale / 4
    row = [0.0, *[share * p for p in base], 0.0]
    for recency, bin_ in zip(_RECENCY, reversed(memory), strict=False):
        weight = recency * quarter
        row[bin_] += weight
        row[bin_ + 1] += 2 * weight
        row[bin_ + 2] += weight
    row[1] += row[0]
    row[-2] += row[-1]
    return row[1:-1]


class Spread:
    """A distribution over bins, its logarithm uniform inside each. Units are those of the bins. Not to be changed."""

    __slots__ = ("bins", "cdf")

    def __init__(self, bins: LogBins, probabilities: Iterable[float]) -> None:
        self.bins = bins
        self.cdf = array("d", accumulate(probabilities, initial=0.0))  # at each edge
        self.cdf[-1] = 1.0

    def quantile(self, q: float) -> float:
        """The value that a share `q` of the values does not exceed."""
        i = min(max(bisect_left(self.cdf, q) - 1, 0), self.bins.count - 1)
        mass = self.cdf[i + 1] - self.cdf[i]
        inside = min(max((q - self.cdf[i]) / mass, 0.0), 1.0) if mass > 0 else 0.0
        return self.bins.edges[i] * math.exp(inside * self.bins.width)

    def below(self, value: float) -> float:
        """The probability of a value of at most this."""
        position = self.bins.position(value)
        i = min(int(position), self.bins.count - 1)
        return self.cdf[i] + (position - i) * (self.cdf[i + 1] - self.cdf[i])

    def mean(self) -> float:
        """The expected value."""
        cdf = self.cdf
        return math.fsum((b - a) * middle for (a, b), middle in zip(pairwise(cdf), self.bins.middles, strict=True))


class _Node:
    __slots__ = ("base", "counts", "due", "mixture", "n")

    def __init__(self, bins: int) -> None:
        self.counts = array("f", bytes(4 * bins))
        self.n = 0.0
        self.due = 0.0  # the mixture is rebuilt when `n` has reached this, or when the level above has been
        self.mixture: Sequence[float] = ()
        self.base: Sequence[float] = ()


class Tree:
    """Counts per key. A path names the levels from the widest to the narrowest, each inside the one before.

    A level's mixture is its counts plus `kappa` pseudo-counts of the mixture above it (the prior at the top), so that
    the first value already counts and no threshold exists. At most `capacity` keys: the one that learned least recently
    is forgotten. A key's counts are halved when they reach `most`: the past cannot outweigh the present for long.
    """

    def __init__(self, bins: int, kappa: float, capacity: int, most: float) -> None:
        self.bins, self.kappa, self.capacity, self.most = bins, kappa, capacity, most
        self._nodes: OrderedDict[Key, _Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def mixture(self, path: Iterable[Key], prior: Sequence[float]) -> Sequence[float]:
        """The bins' probabilities at the end of the path. A key that was never seen is like the level above it.

        A mixture lags by at most 1 in 64 of its counts, which makes it free in most calls.
        """
        above = prior
        for key in path:
            node = self._nodes.get(key)
            if node is not None:
                if node.n >= node.due or node.base is not above:
                    self._rebuild(node, above)
                above = node.mixture
        return above

    def add(self, path: Iterable[Key], bin_: int) -> None:
        """Count a value at every level of the path."""
        for key in reversed(tuple(path)):  # the widest last: it is forgotten after what lies under it
            node = self._nodes.get(key)
            if node is None:
                node = self._nodes[key] = _Node(self.bins)
                if len(self._nodes) > self.capacity:
                    self._nodes.popitem(last=False)
            else:
                self._nodes.move_to_end(key)
            node.counts[bin_] += 1
            node.n += 1
            if node.n >= self.most:
                self._halve(node)

    def dump(self) -> list[Any]:
        """All keys, the least recent first, with their counts by bin, as plain JSON values."""
        return [
            [list(key), [[i, round(c, 3)] for i, c in enumerate(node.counts) if c]] for key, node in self._nodes.items()
        ]

    def load(self, rows: Iterable[Any]) -> None:
        """Replace all keys by those of a dump. Raises ValueError, and changes nothing, where it does not fit."""
        nodes: OrderedDict[Key, _Node] = OrderedDict()
        for key, counts in rows:
            node = nodes[as_key(key)] = _Node(self.bins)
            for i, count in counts:
                if not 0 <= i < self.bins or not 0 <= count < math.inf:
                    raise ValueError(f"bin {i} with {count} counts")
                node.counts[i] = count
            node.n = sum(node.counts)
        while len(nodes) > self.capacity:
            nodes.popitem(last=False)
        self._nodes = nodes

    def _rebuild(self, node: _Node, above: Sequence[float]) -> None:
        kappa, scale = self.kappa, 1 / (node.n + self.kappa)
        node.mixture = array("d", [(c + kappa * p) * scale for c, p in zip(node.counts, above, strict=True)])
        node.base = above
        node.due = node.n + 1 + node.n // 64

    def _halve(self, node: _Node) -> None:
        node.counts = array("f", [c / 2 for c in node.counts])
        node.n /= 2
        node.due = 0.0


def as_key(parts: Iterable[Any]) -> Key:
    """A key as it was before JSON made lists of its tuples."""
    return tuple(tuple(part) if isinstance(part, list) else part for part in parts)
