"""Cells side by side: repetitions as spreads, systems against each other in pairs of the same repetition."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cells import CLOSED, Cell, Done
from bench.metrics import NAMES, rounded

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

OURS = "weft"
"""What the names of our systems begin with."""

NO_RIVALS = ("unlimited", "belady", "oracle-gate")
"""Systems that nobody could run: endless memory, or knowledge of what is to come."""

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
    """A figure against another system's of the same seed: the mean over n pairs, and its 95 % interval (Student's t).

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


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison: a figure of a system at a column of its group against another system's."""

    group: Group
    system: str
    against: str
    at: Column
    name: str
    versus: Versus

    @property
    def worse(self) -> bool:
        """Whether the interval bears out that it is worse."""
        return self.versus.verdict(DIRECTION[self.name]) == "worse"

    @property
    def only_behind(self) -> bool:
        """Whether it is behind in the mean, of too few pairs to say more."""
        return self.versus.n < PAIRS and self.versus.behind(DIRECTION[self.name])


class Group:
    """The cells of one setting: same workload, workers, tier and all else but system, load and repetition."""

    def __init__(self, done: Iterable[Done]) -> None:
        self._done: dict[tuple[str, Column], dict[int, Done]] = defaultdict(dict)
        cells = []
        for one in done:
            cells.append(one.cell)
            self._done[one.cell.system, column(one.cell)][one.cell.rep] = one
        self.cell = cells[0]
        found = {cell.system for cell in cells}
        self.systems = sorted(found, key=lambda name: (name != BASELINE, name))
        self.columns = sorted({column(cell) for cell in cells}, key=lambda at: at or 0.0)
        self.reps = len({cell.rep for cell in cells})

    @property
    def seeds(self) -> list[int]:
        """The seeds of the repetitions."""
        reps = {rep for found in self._done.values() for rep in found}
        return sorted(self.cell.seed - self.cell.rep + rep for rep in reps)

    def spread(self, system: str, at: Column, name: str) -> Spread | None:
        """A figure of a system at a load; None where it was not played or nothing was counted."""
        return _spread(one.metrics[name] for one in self._repetitions(system, at))

    def extra(self, system: str, at: Column, name: str) -> Spread | None:
        """What else the player said of a system's cells at a load; None where it did not."""
        return _spread(one.extra.get(name) for one in self._repetitions(system, at))

    def versus(self, system: str, at: Column, name: str, against: str = BASELINE) -> Versus | None:
        """A figure against another system's, over the repetitions that both have of the same code and machine.

        None where there is no such pair.
        """
        if system == against or name not in DIRECTION:
            return None
        ours, theirs = self._done.get((system, at), {}), self._done.get((against, at), {})
        both = [(ours[rep], theirs[rep]) for rep in sorted(ours.keys() & theirs.keys())]
        pairs = [(one.metrics[name], other.metrics[name]) for one, other in both if one.origin == other.origin]
        return paired(pairs, shares=name in SHARES)

    def compared(self, names: Sequence[str]) -> Iterator[Compared]:
        """These figures of every system against the baseline, and of ours against every rival."""
        for system in self.systems:
            for against in self._rivals(system):
                for at in self.columns:
                    for name in names:
                        if versus := self.versus(system, at, name, against):
                            yield Compared(self, system, against, at, name, versus)

    def _rivals(self, system: str) -> list[str]:
        if not system.startswith(OURS):
            return [BASELINE]
        return [other for other in self.systems if not other.startswith(OURS) and other not in NO_RIVALS]

    def _repetitions(self, system: str, at: Column) -> list[Done]:
        return [one for _, one in sorted(self._done.get((system, at), {}).items())]

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


def _spread(figures: Iterable[float | None]) -> Spread | None:
    values = [value for value in figures if value is not None]
    if not values:
        return None
    return Spread(math.fsum(values) / len(values), min(values), max(values), len(values))


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
            "rivals": [_rival(one) for one in group.compared(NAMES) if one.against != BASELINE],
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
                figures[name] |= _judged(versus, name)
    return {"system": system, _axis(group): at, "metrics": figures}


def _rival(one: Compared) -> Mapping[str, Any]:
    where = {"system": one.system, "against": one.against, _axis(one.group): one.at, "metric": one.name}
    return where | {"n": one.versus.n} | _judged(one.versus, one.name)


def _judged(versus: Versus, name: str) -> dict[str, Any]:
    interval = [rounded(versus.mean), rounded(versus.low), rounded(versus.high)]
    return {"difference" if name in SHARES else "ratio": interval, "verdict": versus.verdict(DIRECTION[name])}


def _axis(group: Group) -> str:
    return "load" if group.cell.arrivals == CLOSED else "runs_per_hour"
