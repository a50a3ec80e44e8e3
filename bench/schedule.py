"""When runs begin and which of them count: one rule for real and simulated cells. Times in seconds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from bench.simulation.profile import Profile
from bench.workloads.runs import Run, Workload

PARTWAY = 0.75
TURNS_TO_START = 5  # mean turns over which the first runs of the slots begin
WARM_SHARE = 0.2
"""Of the runs of an open loop, those that come first and are not counted."""

OPEN_RUNS = 40
"""Runs of an open loop for each of its supply."""


def slots(load: float, kv_tokens: int, workload: Workload) -> int:
    """How many concurrent runs make a load: their mean context over the KV tokens of all engines. At least one."""
    return max(1, round(load * kv_tokens / workload.mean_context))


def starts(seed: int, count: int, workload: Workload, profile: Profile) -> list[tuple[float, float]]:
    """Of `count` slots of a closed loop, when the first run of each begins, and the share of its calls it begins after.

    The slots are then about as spread as they will be later.
    """
    rng = random.Random(f"{seed} starts")
    runs = workload.runs[:100]
    turn = sum(profile.unloaded(run) for run in runs) / sum(len(run.calls) for run in runs)
    return [(rng.uniform(0, TURNS_TO_START * turn), rng.uniform(0, PARTWAY)) for _ in range(count)]


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """The times of `count` arrivals at `rate` an hour."""
    rng, now, times = random.Random(f"{seed} arrivals"), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate / 3600)
        times.append(now)
    return times


def traced(workload: Workload) -> tuple[list[Run], list[float]]:
    """The runs in the order of their arrival, and when that was. ValueError where one does not say."""
    if any(run.arrival is None for run in workload.runs):
        raise ValueError(f"{workload.name} does not say when its runs arrived")
    runs = sorted(workload.runs, key=lambda run: run.arrival or 0.0)
    return runs, [run.arrival or 0.0 for run in runs]


@dataclass(slots=True)
class Turnover:
    """The window of a closed loop: from when the first run of every slot has ended until a slot finds no run left.

    It opens at the latest when half of the `supply` has begun, without the slots that have not turned over by then:
    their first runs are counted all the same, for a run that starves must not hide.
    """

    first: set[str]
    supply: int
    turned: set[str] = field(default_factory=set)
    opened: float | None = None
    closed: float | None = None
    begun: int = 0

    def began(self, now: float) -> None:
        """A run of the supply begins."""
        self.begun += 1
        if self.opened is None and 2 * self.begun >= self.supply:
            self.opened = now

    def ended(self, run: str, now: float) -> None:
        """A run has ended."""
        if self.opened is None and run in self.first:
            self.turned.add(run)
            if len(self.turned) == len(self.first):
                self.opened = now

    def ran_out(self, now: float) -> None:
        """A slot found no run left."""
        if self.closed is None:
            self.closed = now

    @property
    def window(self) -> tuple[float, float]:
        """From and to; to be asked when the supply has ended."""
        end = self.closed or 0.0
        return (end if self.opened is None else self.opened), end

    @property
    def starved(self) -> int:
        """First runs that had not ended when the window opened."""
        return len(self.first) - len(self.turned)
