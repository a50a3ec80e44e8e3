"""The estimators that `bench.predict` compares: Weft's own, a first-order Markov chain and SAGA's."""

from __future__ import annotations

import math
from bisect import insort
from collections import defaultdict
from collections.abc import Callable
from statistics import NormalDist
from typing import Protocol

from scheduler.estimates import Estimates, Place

Quantile = Callable[[float], float]
BASE_RATE, BASE_STEPS = 0.02, 50.0  # what the plain estimators start from, as pseudo-counts of steps
TERMINATION = 0.05  # SAGA's termination_prob
Z95 = 1.6449
NORMAL = NormalDist()


class Predictor(Protocol):
    """What is asked of each: quantiles of gaps (seconds), outputs (tokens) and steps left, and the chance of no gap."""

    def gap(self, place: Place) -> tuple[Quantile, float]:
        """Quantiles of the gap after a step, and the chance that the session is over."""

    def returned(self, place: Place, seconds: float | None) -> None:
        """The session went on."""

    def never(self, place: Place) -> None:
        """The session was over."""

    def output(self, place: Place) -> Quantile:
        """Quantiles of the answer's length at its arrival."""

    def answered(self, place: Place, tokens: int) -> None:
        """The answer had this length."""

    def steps_left(self, place: Place) -> Quantile:
        """Quantiles of the steps left after a step."""


class Weft:
    """The real thing."""

    def __init__(self, estimates: Estimates) -> None:
        self.estimates = estimates
        self.returned, self.never, self.answered = estimates.returned, estimates.never, estimates.output

    def gap(self, place: Place) -> tuple[Quantile, float]:
        """See `Predictor`."""
        gap = self.estimates.gap(place)
        return gap.quantile, gap.never

    def output(self, place: Place) -> Quantile:
        """See `Predictor`."""
        return self.estimates.output_tokens(place).quantile

    def steps_left(self, place: Place) -> Quantile:
        """See `Predictor`."""
        return self.estimates.steps_left(place).quantile


class Markov:
    """A chain over kinds of stop, with an end: empirical quantiles per state, then a constant chance to end."""

    def __init__(self) -> None:
        self.gaps: dict[str, list[float]] = defaultdict(list)
        self.outputs: dict[str, list[float]] = defaultdict(list)
        self.ended: dict[str, float] = defaultdict(lambda: BASE_RATE * BASE_STEPS)
        self.steps: dict[str, float] = defaultdict(lambda: BASE_STEPS)

    def gap(self, place: Place) -> tuple[Quantile, float]:
        """See `Predictor`."""
        stop = place.past.stop
        return empirical(self.gaps[stop], 10.0), self.ended[stop] / self.steps[stop]

    def returned(self, place: Place, seconds: float | None) -> None:
        """See `Predictor`."""
        if seconds is not None:
            insort(self.gaps[place.past.stop], seconds)
        for state in (place.past.stop, ""):
            self.steps[state] += 1

    def never(self, place: Place) -> None:
        """See `Predictor`."""
        for state in (place.past.stop, ""):
            self.steps[state] += 1
            self.ended[state] += 1

    def output(self, place: Place) -> Quantile:
        """See `Predictor`."""
        return empirical(self.outputs[place.past.stop], 200.0)

    def answered(self, place: Place, tokens: int) -> None:
        """See `Predictor`."""
        insort(self.outputs[place.past.stop], float(max(tokens, 1)))

    def steps_left(self, place: Place) -> Quantile:
        """See `Predictor`."""
        return geometric(self.gap(place)[1], self.ended[""] / self.steps[""])


class LogNormal:
    """SAGA's estimator: exponential averages of the logarithm and its variance; the first value resets the prior."""

    def __init__(self, p50: float, p95: float) -> None:
        self.mu, self.variance, self.fresh = math.log(p50), (math.log(p95 / p50) / Z95) ** 2, True

    def add(self, value: float) -> None:
        """Count a value."""
        x = math.log(max(value, 0.01))
        if self.fresh:
            self.mu, self.variance, self.fresh = x, 1.0, False
            return
        off = x - self.mu
        self.mu += 0.1 * off
        self.variance = 0.9 * (self.variance + 0.1 * off * off)

    def quantile(self, q: float) -> float:
        """The value that a share `q` does not exceed."""
        return math.exp(self.mu + math.sqrt(self.variance) * NORMAL.inv_cdf(q))


class Saga:
    """SAGA's log-normal per tool, the kind of stop in the tool's place; a constant chance to end; its step count.

    Its own length estimate is a constant without a spread; the same log-normal is used for lengths instead.
    """

    def __init__(self) -> None:
        self.gaps: dict[str, LogNormal] = defaultdict(lambda: LogNormal(0.18, 2.4))
        self.outputs: dict[str, LogNormal] = defaultdict(lambda: LogNormal(250, 1000))
        self.ended, self.steps = BASE_RATE * BASE_STEPS, BASE_STEPS

    def gap(self, place: Place) -> tuple[Quantile, float]:
        """See `Predictor`."""
        return self.gaps[place.past.stop].quantile, self.ended / self.steps

    def returned(self, place: Place, seconds: float | None) -> None:
        """See `Predictor`."""
        self.steps += 1
        if seconds is not None:
            self.gaps[place.past.stop].add(seconds)

    def never(self, place: Place) -> None:
        """See `Predictor`."""
        self.steps += 1
        self.ended += 1

    def output(self, place: Place) -> Quantile:
        """See `Predictor`."""
        return self.outputs[place.past.stop].quantile

    def answered(self, place: Place, tokens: int) -> None:
        """See `Predictor`."""
        self.outputs[place.past.stop].add(max(tokens, 1))

    def steps_left(self, place: Place) -> Quantile:
        """SAGA's min(|V|, 1 / termination_prob) as its median, |V| the mean length so far; geometric beyond it."""
        count = min(self.steps / self.ended, 1 / TERMINATION)
        spread = geometric(TERMINATION, TERMINATION)
        return lambda q: count if q == 0.5 else spread(q)


def empirical(values: list[float], default: float) -> Quantile:
    """Quantiles of sorted values, interpolated; the default where there is none."""

    def quantile(q: float) -> float:
        if not values:
            return default
        at = q * (len(values) - 1)
        low = int(at)
        high = min(low + 1, len(values) - 1)
        return values[low] + (at - low) * (values[high] - values[low])

    return quantile


def geometric(first: float, hazard: float) -> Quantile:
    """Quantiles of the steps left: none with chance `first`, then each is the last with chance `hazard`."""

    def quantile(q: float) -> float:
        return 0 if q <= first else max(math.ceil(math.log((1 - q) / (1 - first)) / math.log(1 - hazard)), 1)

    return quantile
