"""Cells side by side: repetitions as spreads, systems against the baseline in pairs of the same repetition."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cells import CLOSED, Cell, Done
from bench.metrics import NAMES, Metrics, rounded

BASELINE = "stock"
GOAL = 0.95
PAIRS = 3
"""Repetitions below which nothing is said to be better or worse."""

HIGHER, LOWER = 1, -1
DIRECTION = {
    "turns_per_second": HIGHER,
    "output_tokens_per_second": HIGHER,
    "session_seconds_mean": LOWER,
    "session_seconds_p50": LOWER,
    "session_seconds_p95": LOWER,
    "ttft_seconds_p50": LOWER,
    "ttft_seconds_p99": LOWER,
    "worst_turn_seconds_p50": LOWER,
    "worst_turn_seconds_p90": LOWER,
    "worst_turn_seconds_max": LOWER,
    "slo_attainment": HIGHER,
}
"""The figures in which a system can be better or worse than the baseline, and which way is better."""

SHARES = ("slo_attainment",)

Column = float | None
"""The load of a closed loop, the runs an hour of an open one, None for arrivals as recorded."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over repetitions: mean, least, greatest, and how many there were."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Versus:
    """A figure against the baseline's of the same seed: the mean over n pairs, and its 95 % interval (Student's t).

    `even` is where neither is better: 1 for ratios, 0 for differences, which are taken of shares. One pair has no
    interval.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    even: float = 1.0

    def verdict(self, direction: int) -> str:
        """`better` or `worse` where the whole interval of at least `PAIRS` pairs says so, else nothing."""
        if self.low is None or self.high is None or self.n < PAIRS:
            return ""
        if self.low > self.even:
            return "better" if direction == HIGHER else "worse"
        if self.high < self.even:
            return "worse" if direction == HIGHER else "better"
        return ""

    def behind(self, direction: int) -> bool:
        """Whether it is on the worse side at all."""
        return (self.mean - self.even) * direction < 0

    @property
    def brief(self) -> str:
        """The mean alone: `1.10x`, or `+0.10` of a share."""
        return f"{self.mean:.2f}x" if self.even else f"{self.mean:+.2f}"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return self.brief
        form, unit = (".3f", "x") if self.even else ("+.3f", "")
        return f"{self.mean:{form}}{unit} ({self.low:{form}}..{self.high:{form}})"


class Group:
    """The cells of one setting: same workload, workers, tier and all else but system, load and repetition."""

    def __init__(self, done: Iterable[Done]) -> None:
        self._figures: dict[tuple[str, Column], dict[int, Metrics]] = defaultdict(dict)
        cells = []
        for one in done:
            cells.append(one.cell)
            self._figures[one.cell.system, column(one.cell)][one.cell.rep] = one.metrics
        self.cell = cells[0]
        found = {cell.system for cell in cells}
        self.systems = sorted(found, key=lambda name: (name != BASELINE, name))
        self.columns = sorted({column(cell) for cell in cells}, key=lambda at: at or 0.0)
        self.reps = len({cell.rep for cell in cells})

    @property
    def seeds(self) -> list[int]:
        """The seeds of the repetitions."""
        reps = {rep for figures in self._figures.values() for rep in figures}
        return sorted(self.cell.seed - self.cell.rep + rep for rep in reps)

    def spread(self, system: str, at: Column, name: str) -> Spread | None:
        """A figure of a system at a load; None where it was not played or nothing was counted."""
        figures = self._figures.get((system, at), {})
        values = [value for rep in sorted(figures) if (value := figures[rep][name]) is not None]
        if not values:
            return None
        return Spread(math.fsum(values) / len(values), min(values), max(values), len(values))

    def versus(self, system: str, at: Column, name: str) -> Versus | None:
        """A figure against the baseline's, over the repetitions that both have; None where there is no pair."""
        if system == BASELINE or name not in DIRECTION:
            return None
        ours, base = self._figures.get((system, at), {}), self._figures.get((BASELINE, at), {})
        pairs = [(ours[rep][name], base[rep][name]) for rep in sorted(ours.keys() & base.keys())]
        return paired(pairs, shares=name in SHARES)

    def capacity(self, system: str) -> str | None:
        """Runs an hour up to which `GOAL` of the runs keep the objective; None unless arrivals are Poisson.

        The mean attainment over repetitions is interpolated between the rates played; the first time it falls below
        counts.
        """
        if self.cell.rate is None:
            return None
        met = [
            (at, spread.mean)
            for at in self.columns
            if at is not None and (spread := self.spread(system, at, "slo_attainment"))
        ]
        if not met:
            return None
        last: tuple[float, float] | None = None
        for at, share in met:
            if share < GOAL:
                if last is None:
                    return f"< {at:g}"
                return f"{last[0] + (at - last[0]) * (last[1] - GOAL) / (last[1] - share):.3g}"
            last = (at, share)
        return f">= {met[-1][0]:g}"


def column(cell: Cell) -> Column:
    """Where a cell stands on the axis of its group."""
    return cell.load if cell.arrivals == CLOSED else cell.rate


def grouped(done: Iterable[Done]) -> list[Group]:
    """The groups of these cells, in the order of their settings."""
    groups: dict[tuple[Any, ...], list[Done]] = defaultdict(list)
    for one in sorted(done, key=lambda each: each.cell.place):
        groups[one.cell.setting].append(one)
    return [Group(cells) for cells in groups.values()]


def paired(pairs: Sequence[tuple[float | None, float | None]], shares: bool = False) -> Versus | None:
    """The ratio of pairs (ours, theirs), or their difference where they are shares.

    Pairs without a figure are left out, and for a ratio those where theirs is 0.
    """
    known = [(ours, base) for ours, base in pairs if ours is not None and base is not None]
    each = [ours - base for ours, base in known] if shares else [ours / base for ours, base in known if base]
    even = 0.0 if shares else 1.0
    if not each:
        return None
    middle = math.fsum(each) / len(each)
    if len(each) < 2:
        return Versus(middle, None, None, 1, even)
    reach = student(len(each) - 1) * statistics.stdev(each) / math.sqrt(len(each))
    return Versus(middle, middle - reach, middle + reach, len(each), even)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, tabled to 10, then by expansion in
    1 / degrees (Abramowitz and Stegun 26.7.5), which is right to 0.0002 from there on.
    """
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if degrees <= len(table):
        return table[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def document(groups: Sequence[Group]) -> list[Mapping[str, Any]]:
    """The groups as JSON: every spread and comparison that the report shows."""
    return [
        {
            "workload": group.cell.workload,
            "engine": group.cell.engine,
            "profile": group.cell.profile,
            "workers": group.cell.workers,
            "tier": group.cell.tier,
            "arrivals": group.cell.arrivals.partition(":")[0],
            "seeds": group.seeds,
            "baseline": BASELINE,
            "capacity": {system: group.capacity(system) for system in group.systems},
            "rows": [_row(group, system, at) for system in group.systems for at in group.columns],
        }
        for group in groups
    ]


def _row(group: Group, system: str, at: Column) -> Mapping[str, Any]:
    figures: dict[str, Any] = {}
    for name in NAMES:
        if spread := group.spread(system, at, name):
            figures[name] = {
                "mean": rounded(spread.mean), "min": spread.low, "max": spread.high, "n": spread.n,
            }  # fmt: skip
            if versus := group.versus(system, at, name):
                kind = "difference" if name in SHARES else "ratio"
                figures[name][kind] = [rounded(versus.mean), rounded(versus.low), rounded(versus.high)]
                figures[name]["verdict"] = versus.verdict(DIRECTION[name])
    return {"system": system, "load" if group.cell.arrivals == CLOSED else "runs_per_hour": at, "metrics": figures}
