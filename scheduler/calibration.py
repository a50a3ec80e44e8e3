"""How good the predictions are: every one is scored when the truth arrives."""

from __future__ import annotations

import math
from functools import cache

from scheduler.histogram import Spread

WINDOW = 1000  # scores; a plain mean up to here, then an exponentially weighted one with this time constant
QUANTILES = (0.5, 0.9, 0.99)


class Calibration:
    """Running means of scores, by name."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def score(self, name: str, value: float) -> None:
        """Count one score."""
        n = self._counts[name] = self._counts.get(name, 0) + 1
        mean = self._means.get(name, 0.0)
        self._means[name] = mean + (value - mean) / min(n, WINDOW)

    def spread(self, name: str, predicted: Spread, truth: float) -> None:
        """Score a distribution: was the truth below each quantile, and how far off (in log) was the median."""
        below = predicted.below(truth)
        for q, label in _labels(name):
            self.score(label, float(below <= q))
        self.score(name + "_log_error", abs(math.log(max(truth, predicted.bins.edges[0]) / predicted.quantile(0.5))))

    def values(self) -> dict[str, float]:
        """All means, by name; a name appears with its first score."""
        return dict(self._means)


@cache
def _labels(name: str) -> list[tuple[float, str]]:
    return [(q, f"{name}_below_p{q * 100:.0f}_ratio") for q in QUANTILES]
