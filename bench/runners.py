"""The runs of a cell, and what plays it on modelled workers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from bench import schedule
from bench.cells import TRACE, Cell
from bench.errors import BenchError
from bench.matrix import spoken
from bench.records import Played
from bench.simulation.cluster import simulate
from bench.simulation.profile import PROFILES, Profile
from bench.simulation.systems import SYSTEMS
from bench.workloads import catalog
from bench.workloads.runs import Workload

SEEDLESS = ("claude-code", "mooncake", "recorded")
"""Workloads that are what their file is, whatever the seed, which then only orders them: they are read once."""

FILE = "file:"
"""What the profile of a cell begins with that is read from a file; the file's digest follows."""

SECONDS_A_CALL = 1e-3
"""About what it takes to simulate a call on one core."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """Plays a cell on modelled workers. `trace` and `costs` are where this machine keeps the files that the workload
    and the profile are read from.
    """

    trace: Path | None = None
    costs: Path | None = None

    def __call__(self, cell: Cell) -> Played:
        return simulate(
            workload(cell, self.trace), SYSTEMS[cell.system], profile(cell, self.costs), workers=cell.workers,
            load=cell.load or 0.0, tier=cell.tier, arrivals=cell.arrivals, seed=cell.seed, supply=cell.supply,
        )  # fmt: skip

    def guess(self, cell: Cell) -> float:
        """About how many seconds the cell takes."""
        runs = workload(replace(cell, seed=cell.seed - cell.rep), self.trace)
        calls = sum(len(run.calls) for run in runs.runs) / len(runs.runs)
        return slots(cell, runs, profile(cell, self.costs).kv_tokens) * (cell.supply + 1) * calls * SECONDS_A_CALL


def profile(cell: Cell, costs: Path | None = None) -> Profile:
    """What a modelled worker of the cell costs: "NAME", or "file:DIGEST" of what is read from `costs`; with
    ":KV_TOKENS" behind it, one with another KV memory.
    """
    name, _, size = cell.profile.removeprefix(FILE).partition(":")
    found = _read(costs) if costs and cell.profile.startswith(FILE) else PROFILES[name]
    return replace(found, kv_tokens=int(size)) if size else found


@lru_cache(maxsize=2)
def _read(costs: Path) -> Profile:
    from bench.simulation import calibration

    return calibration.load(str(costs))


def traffic(cell: Cell, trace: Path, costs: Path | None = None) -> str:
    """How much was recorded, and the load it would be on the workers of the cell if each run had an engine alone."""
    runs, worker = workload(cell, trace), profile(cell, costs)
    alone = [worker.unloaded(run) for run in runs.runs]
    span = max((run.arrival or 0.0) + seconds for run, seconds in zip(runs.runs, alone, strict=True))
    live = sum(alone) / max(span, 1e-9)
    load = live * runs.mean_context / (cell.workers * worker.kv_tokens)
    calls = sum(len(run.calls) for run in runs.runs)
    return (
        f"Recorded: {len(runs.runs)} runs, {calls} calls. Unhindered, {live:.3g} would be live in the mean "
        f"for {spoken(span)}: load {load:.3g} on {cell.workers} x {worker.kv_tokens:,} KV tokens."
    )


def slots(cell: Cell, runs: Workload, kv_tokens: int) -> int:
    """How many runs are live at once in a closed loop; in an open one, how many there are for each of its supply."""
    if cell.load is None:
        return schedule.OPEN_RUNS
    return schedule.slots(cell.load, cell.workers * kv_tokens, runs)


def workload(cell: Cell, trace: Path | None) -> Workload:
    """The runs of a cell. Raises BenchError where there are none."""
    seed = 0 if cell.workload in SEEDLESS else cell.seed
    try:
        return _workload(cell.workload, trace, seed, cell.max_context, cell.half, cell.scale, cell.options)
    except (ValueError, OSError) as error:
        raise BenchError(str(error)) from error


def checked(cell: Cell, trace: Path | None) -> Workload:
    """The runs of a cell as `workload` has them. Raises BenchError too where cell and trace do not go together."""
    if trace is not None and cell.workload not in catalog.TRACES:
        raise BenchError(f"{cell.workload} is made by its seed, it reads no --trace")
    found = workload(cell, trace)
    if cell.arrivals == TRACE and any(run.arrival is None for run in found.runs):
        raise BenchError(f"{cell.workload} does not say when its runs arrived: --arrivals closed or poisson:R")
    return found


@lru_cache(maxsize=2)
def _workload(
    name: str, trace: Path | None, seed: int, max_context: int | None, half: str | None, scale: float, options: str
) -> Workload:
    own = parsed(options)
    if taken := own.keys() & inspect.signature(catalog.load).parameters.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: no workload has an option of that name")
    return catalog.load(name, trace, seed, max_context=max_context, half=half, scale=scale, **own)


def parsed(options: str) -> dict[str, Any]:
    """The options of a workload, from "name=value,...". Raises ValueError where a value is no JSON."""
    pairs = [one.partition("=") for one in options.split(",") if one]
    try:
        return {name: orjson.loads(value) for name, _, value in pairs}
    except orjson.JSONDecodeError:
        raise ValueError(f"{options!r} is not name=value,... with numbers, true or false for values") from None
