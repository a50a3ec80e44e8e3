"""The commands that measure: `weft bench`, `weft simulate`, `weft replay`, `weft report`."""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bench.cells import CLOSED, TRACE, Cell
from bench.comparison import BASELINE
from bench.errors import BenchError
from server import cli as server

if TYPE_CHECKING:
    from bench.comparison import Group
    from bench.runners import Simulated

SUPPLY = 4
"""Runs a slot of a closed loop below which its figures are too short to be claimed."""

Number = TypeVar("Number", int, float)

TraceOption = Annotated[Path | None, typer.Option(help="The trace file that the workload is read from.")]
WorkloadOption = Annotated[str, typer.Option(help="What to play; an unknown name lists them all.")]
LoadOption = Annotated[str, typer.Option(metavar="L,...", help="Live contexts over the engines' KV tokens.")]
WorkersOption = Annotated[str, typer.Option(metavar="N,...", help="Engines.")]
TierOption = Annotated[str, typer.Option(metavar="T,...", help="Host tier, as a multiple of the engines' KV; 0: none.")]
ArrivalsOption = Annotated[
    str, typer.Option(metavar="closed|poisson:R,...|trace", help="A closed loop, or R runs an hour, or as recorded.")
]
RepsOption = Annotated[int, typer.Option(min=1, help="Repetitions, each with the next seed.")]
SeedOption = Annotated[int, typer.Option(help="The first repetition's seed.")]
ContextOption = Annotated[int | None, typer.Option(min=1, help="Leave out runs with longer prompts, in tokens.")]
HalfOption = Annotated[str | None, typer.Option(help="Only this half of the trace: `tune` or `report`.")]
ScaleOption = Annotated[float, typer.Option(help="Divide all lengths by this.")]
OptionsOption = Annotated[
    str, typer.Option("--options", metavar="NAME=VALUE,...", help="Of the workload itself: misprediction=0.3, calls=4.")
]
SupplyOption = Annotated[int, typer.Option(min=1, help="Runs for each slot of a closed loop, after the first.")]
ProfileOption = Annotated[
    str,
    typer.Option(metavar="NAME|FILE[:KV_TOKENS]", help="A modelled worker: l70, q30, cpu, or as measured; its KV."),
]
JobsOption = Annotated[int, typer.Option(min=1, help="Cells to simulate at once, a process each.")]
NamesOption = Annotated[str, typer.Option(metavar="A,B", help="What to compare; an unknown name lists them all.")]
OutOption = Annotated[Path | None, typer.Option(help="Where cells, results and report go; none: only the table.")]


def main() -> None:
    """Run the `weft` command with all its commands."""
    try:
        server.main()
    except BenchError as error:
        server.fail(str(error))


def points(load: str, workers: str, tier: str, arrivals: str) -> list[dict[str, Any]]:
    """Where in the matrix the systems meet, from the lists of a command line. Raises BenchError for what is no list."""
    loads: list[float | None] = list(numbers(load, "--load", float, 0.0))
    return [
        {"workers": count, "tier": size, "load": at, "arrivals": kind}
        for count in numbers(workers, "--workers", int, 0)
        for size in numbers(tier, "--tier", float, -1.0)
        for kind in _arrivals(arrivals)
        for at in (loads if kind == CLOSED else [None])
    ]


def systems(text: str, known: Collection[str]) -> list[str]:
    """A list of names. Raises BenchError where one is not known."""
    return [one_of(name, known, "system") for name in _parts(text, "the list of systems")]


def numbers(text: str, option: str, kind: Callable[[str], Number], above: float) -> list[Number]:
    """A list of numbers above a bound, or above -1 at least 0. Raises BenchError otherwise."""
    found = []
    for part in _parts(text, option):
        try:
            value = kind(part)
        except ValueError:
            raise BenchError(f"{option}: {part!r} is not a number") from None
        if not above < value < float("inf") or (above < 0 and value < 0):
            raise BenchError(f"{option}: {part} must be {'0 or more' if above < 0 else 'above 0'}")
        found.append(value)
    return list(dict.fromkeys(found))


def one_of(name: str, known: Collection[str], what: str) -> str:
    """The name, if it is known. Raises BenchError naming the nearest and all others."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise BenchError(f"unknown {what} {name!r}{hint}; there are {', '.join(sorted(known))}")


def _parts(text: str, what: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise BenchError(f"{what} is empty")
    return parts


def _sorted(options: str) -> str:
    return ",".join(sorted(one.strip() for one in options.split(",") if one.strip()))


def _arrivals(text: str) -> list[str]:
    if text in (CLOSED, TRACE):
        return [text]
    kind, _, rates = text.partition(":")
    if kind != "poisson":
        raise BenchError(f"--arrivals: {text!r} is neither closed nor poisson:RUNS_PER_HOUR nor trace")
    return [f"poisson:{rate:g}" for rate in numbers(rates, "--arrivals", float, 0.0)]


@server.app.command()
def bench(
    workload: WorkloadOption,
    out: Annotated[Path, typer.Option(help="Where cells, results, report and the engines' logs go.")],
    trace: TraceOption = None,
    url: Annotated[str | None, typer.Option(help="Measure this running server, as the one name in --systems.")] = None,
    systems: NamesOption = "stock,weft",
    load: LoadOption = "1",
    workers: Annotated[int, typer.Option(min=1, help="Engines to start.")] = 2,
    tier: TierOption = "0",
    max_context: ContextOption = None,
    arrivals: ArrivalsOption = "closed",
    half: HalfOption = None,
    scale: ScaleOption = 1.0,
    options: OptionsOption = "",
    supply: SupplyOption = 4,
    reps: RepsOption = 3,
    seed: SeedOption = 0,
    model: Annotated[str | None, typer.Option(help="The model to serve; none: the embedded one.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="KV tokens of each engine; default 27040.")] = None,
    link_gbps: Annotated[
        float, typer.Option(min=0, help="GB/s to a host tier that the CPU backend pretends to have; 0: its own.")
    ] = 0.0,
) -> None:
    """Play a workload on real engines behind Weft and what users would pick instead, side by side."""
    from bench import real
    from bench.workloads import catalog

    one_of(workload, catalog.NAMES, "workload")
    base = Cell(
        workload, "", None, workers, 0.0, 0, seed, engine="real", half=half, scale=scale, max_context=max_context,
        supply=supply, options=_sorted(options),
    )  # fmt: skip
    places = points(load, str(workers), tier, arrivals)
    _note_supply(base, places)
    real.compare(base, places, _parts(systems, "--systems"), trace, reps, out, model, kv_tokens, url, link_gbps)


@server.app.command()
def simulate(
    workload: WorkloadOption,
    trace: TraceOption = None,
    policies: NamesOption = "stock,weft",
    workers: WorkersOption = "4",
    load: LoadOption = "1",
    tier: TierOption = "0",
    profile: ProfileOption = "l70",
    max_context: ContextOption = None,
    arrivals: ArrivalsOption = "closed",
    half: HalfOption = None,
    scale: ScaleOption = 1.0,
    options: OptionsOption = "",
    supply: SupplyOption = 4,
    reps: RepsOption = 1,
    seed: SeedOption = 0,
    jobs: JobsOption = 1,
    out: OutOption = None,
) -> None:
    """Play a workload on modelled workers, with the real scheduler and policies in front of them."""
    from bench import runners

    name, costs = _profile(profile)
    base = Cell(
        workload, "", None, 0, 0.0, 0, seed, profile=name, half=half, scale=scale, max_context=max_context,
        supply=supply, options=_sorted(options),
    )  # fmt: skip
    runner = runners.Simulated(trace, costs)
    _simulate(base, runner, policies, points(load, workers, tier, arrivals), reps, jobs, out)


@server.app.command()
def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.jsonl", help="What `weft serve --trace-dir` recorded.")],
    policies: NamesOption = "stock,weft",
    workers: WorkersOption = "4",
    load: Annotated[str | None, typer.Option(metavar="L,...", help="A closed loop at these loads instead.")] = None,
    tier: TierOption = "0",
    profile: ProfileOption = "l70",
    max_context: ContextOption = None,
    arrivals: ArrivalsOption = "trace",
    supply: SupplyOption = 4,
    reps: RepsOption = 1,
    seed: SeedOption = 0,
    jobs: JobsOption = 1,
    out: OutOption = None,
) -> None:
    """What a policy, more workers or a host tier would gain on the traffic that Weft recorded (simulated)."""
    from bench import report as reports
    from bench import runners

    against = policies if BASELINE in policies.split(",") else f"{BASELINE},{policies}"
    places = points(load or "1", workers, tier, "closed" if load else arrivals)
    name, costs = _profile(profile)
    base = Cell("recorded", "", None, 0, 0.0, 0, seed, profile=name, max_context=max_context, supply=supply)
    groups = _simulate(base, runners.Simulated(trace, costs), against, places, reps, jobs, out)
    print(runners.traffic(groups[0].cell, trace, costs))
    print("\n".join(reports.gains(groups)))


@server.app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where cells.jsonl lies.")]) -> None:
    """Write DIR/report.md, report.json and the plots from the cells that are there."""
    from bench import report as reports

    reports.write(directory)
    print(directory / "report.md")


def _simulate(
    base: Cell, runner: Simulated, policies: str, places: list[dict[str, Any]], reps: int, jobs: int, out: Path | None
) -> list[Group]:
    from bench import runners
    from bench.campaign import carry_out
    from bench.machine import named
    from bench.matrix import plan
    from bench.simulation.systems import SYSTEMS
    from bench.workloads import catalog

    names = systems(policies, SYSTEMS)
    one_of(base.workload, catalog.NAMES, "workload")
    trace = runner.trace
    runs = runners.checked(replace(base, **places[0]), trace)
    _note_supply(base, places)
    base = replace(base, trace=named(trace) if trace else None)
    with _directory(out) as directory:
        cells = plan(base, names, places, reps)
        return carry_out(cells, runner, runner.guess, directory, jobs, lambda: {"left_out": dict(runs.left_out)})


def _profile(text: str) -> tuple[str, Path | None]:
    """What a cell calls the profile asked for, which never says where it lies, and the file to read it from, if any.

    Raises BenchError where it is neither a name nor a file with a profile.
    """
    from bench.machine import named
    from bench.runners import FILE
    from bench.simulation.profile import PROFILES

    before, colon, after = text.rpartition(":")
    name, size = (before, after) if colon and not Path(text).is_file() else (text, "")
    if name != text and (not size.isdecimal() or not int(size)):
        raise BenchError(f"--profile: {size!r} is not a number of KV tokens")
    if name in PROFILES or not Path(name).is_file():
        one_of(name, PROFILES, "profile")
        return text, None
    from bench.simulation import calibration

    calibration.load(name)
    digest = named(Path(name)).rpartition("@")[2]
    return f"{FILE}{digest}" + (f":{size}" if size else ""), Path(name)


def _note_supply(base: Cell, places: list[dict[str, Any]]) -> None:
    """Say where a closed loop is too short for a figure that may be claimed."""
    if base.supply < SUPPLY and any(place["arrivals"] == CLOSED for place in places):
        said = f"--supply {base.supply}: figures are claimed of at least {SUPPLY} runs for each slot only"
        print(f"weft: {said}", file=sys.stderr)


@contextmanager
def _directory(out: Path | None) -> Iterator[Path]:
    """Where the files go; for a while, where nobody asked for them."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="weft-") as name:
        yield Path(name)


if __name__ == "__main__":
    main()
