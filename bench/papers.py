"""The comparisons of the SAGA and KVFlow papers, rebuilt on modelled workers; what they published stands beside.

    python -m bench.papers --trace mini_swe_agent.tar.xz --out DIR [--reps 3] [--seed 1] [--jobs 2]

`saga` and `kvflow` are ours, after the papers. What the papers leave open is chosen here, and named in each table:

* SAGA, completion and eviction: coding sessions of at most 32k tokens on four modelled workers of its model on its
  GPUs (`l70`), a closed loop. Against Bélády: tokens that were computed again over those of Bélády's rule.
* SAGA, ten tenants: the same sessions from two heavy, three medium and five light tenants (half, 30 % and 20 % of the
  runs), Poisson arrivals at 80 % of the rate at which `stock` finishes them at load 1; a run is in time within 1.5
  times what it takes alone.
* KVFlow, E1 and E2: `w1` and `w2` on a model of the paper's card, by arithmetic: 32B beside 24,576 tokens of KV, 8B
  beside 425,000; the host tier is six times that (all fixed prompts fit, as in the paper's warm-up), behind an
  effective 6 GB/s (what its HiCache figures imply) or 40.

Recomputed tokens are of the whole system, placement included. `--reps` seeds; the tables show means, and in brackets of
the completion the least and the greatest. What is left open by a paper is a choice of ours: read the ratios as orders.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import machine
from bench.cells import write_json
from bench.metrics import Metrics, hourly, in_time, mean, measure
from bench.schedule import OPEN_RUNS
from bench.simulation.cluster import simulate
from bench.simulation.profile import L70, Profile
from bench.simulation.systems import SYSTEMS
from bench.workloads import catalog
from bench.workloads.runs import Run, Workload

CODING, TENANTS = "mini-swe-agent", "tenants"
CONTEXT = 32_768
WHOLE: dict[str, Any] = {"calls": 150, "keep": 1.0, "shorten": 1.0, "answers": True}
"""Sessions as they were, answers generated again."""
CLASSES = {"heavy": (2, 0.5), "medium": (3, 0.3), "light": (5, 0.2)}
"""How many tenants of a class there are, and their share of the runs."""

COMPLETION = {  # mean completion over SAGA's: SWE-bench, 64 GPUs
    "stock-least-loaded": ("vLLM 0.6.0, no affinity", 3.01),
    "vllm-router-cache-aware": ("SGLang 0.5.8, cache-aware", 1.90),
    "vllm-router-consistent-hash": ("vLLM 0.15.1, prefix affinity", 1.73),
    "kvflow": ("vLLM with KVFlow", 1.47),
    "saga": ("SAGA", 1.0),
}
BELADY = {"stock": ("LRU", 2.84), "saga": ("WA-LRU", 1.31)}
IN_TIME = {  # heavy, medium, light, overall
    "stock-least-loaded": ("vLLM", (0.894, 0.721, 0.432, 0.673)),
    "vllm-router-cache-aware": ("SGLang", (0.912, 0.786, 0.514, 0.734)),
    "saga": ("SAGA", (0.991, 0.994, 0.987, 0.992)),
}
E1 = {4096: (1.42, 1.24)}  # over SGLang, over HiCache; branches=1
AVERAGE = {4096: 1.22, 8192: 1.30}  # over the lengths of outputs; over which rival the paper does not say
E2 = {"most over SGLang": 1.25, "most over HiCache": 2.19}

CODERS = (
    "stock", "stock-least-loaded", "vllm-router-cache-aware", "vllm-router-consistent-hash", "saga", "kvflow",
    "continuum", "thunderagent", "index", "belady", "oracle-gate", "weft-attached", "weft", "weft-hinted", "unlimited",
)  # fmt: skip
SERVERS = (
    "stock", "stock-least-loaded", "vllm-router-cache-aware", "semaphore", "saga", "thunderagent", "weft",
    "weft-hinted",
)  # fmt: skip
TIERED = ("stock", "kvflow", "belady", "weft", "weft-hinted")
LOADS = (0.75, 1.0, 2.0)
LINKS = (6e9, 40e9)
TIER = 6.0
TENANT_SUPPLY = 12
"""40 runs each: arrivals then last several times as long as a run, so that the cluster fills."""

FEW = 1000.0
"""Recomputed tokens of Bélády's rule below which a ratio to them says nothing."""

H100_32B = Profile(
    "h100-32b", step=0.022, decode=0.03e-3, context=9e-8, prefill=0.16e-3, attention=3.3e-9,
    kv_tokens=24_576, kv_bytes=262_144, block=16, budget=8192, sequences=256, link=6e9,
)  # fmt: skip
H100_8B = Profile(
    "h100-8b", step=0.008, decode=0.02e-3, context=4.5e-8, prefill=0.04e-3, attention=1.3e-9,
    kv_tokens=425_000, kv_bytes=131_072, block=16, budget=8192, sequences=256, link=6e9,
)  # fmt: skip


Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One point of one table. `live` runs at once, else `load`, else Poisson arrivals at 80 % of what `stock` does."""

    table: str
    system: str
    workload: str
    profile: Profile
    workers: int
    seed: int
    tier: float = 0.0
    load: float | None = None
    live: int | None = None
    options: Options = ()
    supply: int = 4


def cases(seeds: Sequence[int]) -> list[Case]:
    """Everything that is played."""
    made: list[Case] = []
    for seed in seeds:
        made += [Case("saga", name, CODING, L70, 4, seed, load=load) for load in LOADS for name in CODERS]
        made += [Case("tenants", name, TENANTS, L70, 4, seed, supply=TENANT_SUPPLY) for name in SERVERS]
        for fixed in (4096, 8192):
            for branches in (1, 2):
                stages: Options = (("fixed", fixed), ("branches", branches))
                made += _tiers(Case("e1", "", "w1", H100_32B, 1, seed, live=1, options=stages, supply=20))
        for fixed, live in ((512, 128), (1024, 64)):
            many: Options = (("fixed", fixed), ("runs", 2 * live), ("passes", 5))
            made += _tiers(Case("e2", "", "w2", H100_8B, 1, seed, live=live, options=many, supply=2))
    return made


def _tiers(case: Case) -> list[Case]:
    """Without a host tier, and with one behind either link."""
    found = [replace(case, system="stock")]
    for link in LINKS:
        found += [replace(case, system=s, tier=TIER, profile=replace(case.profile, link=link)) for s in TIERED]
    return found


def play(case: Case, trace: Path) -> dict[str, Metrics]:
    """The figures of one case; of tenants also the share of runs in time for each class."""
    workload = _workload(case.workload, trace, case.seed, case.options)
    load, arrivals = case.load or 0.0, "closed"
    if case.live:
        load = case.live * workload.mean_context / (case.profile.kv_tokens * case.workers)
    elif case.load is None:
        arrivals = f"poisson:{0.8 * _rate(trace, case.seed, case.profile, case.workers):.6g}"
    played = simulate(
        workload, SYSTEMS[case.system], case.profile, workers=case.workers, load=load, tier=case.tier,
        arrivals=arrivals, seed=case.seed, supply=case.supply,
    )  # fmt: skip
    found: dict[str, Metrics] = {"metrics": measure(played)}
    if case.workload == TENANTS:
        found["in_time"] = {kind: in_time(played, kind) for kind in CLASSES}
    return found


@lru_cache(maxsize=2)
def _workload(name: str, trace: Path, seed: int, options: Options) -> Workload:
    if name == TENANTS:
        return tenants(_workload(CODING, trace, seed, ()), seed)
    if name == CODING:
        return catalog.load(name, trace, seed, max_context=CONTEXT, **WHOLE)
    return catalog.load(name, seed=seed, **dict(options))


def tenants(coding: Workload, seed: int) -> Workload:
    """As many runs as are played, each its tenant's own: of ten, whose class is in the name."""
    runs: list[Run] = []
    draw = coding.draw(seed)
    for kind, (count, share) in CLASSES.items():
        for number in range(round(OPEN_RUNS * TENANT_SUPPLY * share)):
            tenant = f"{kind}-{number % count}"
            runs.append(replace(next(draw).again(f"~{tenant}-{number}"), tenant=tenant))
    return Workload(TENANTS, runs)


@lru_cache(maxsize=4)
def _rate(trace: Path, seed: int, profile: Profile, workers: int) -> float:
    """Runs an hour that `stock` ends at load 1."""
    workload = _workload(CODING, trace, seed, ())
    played = simulate(workload, SYSTEMS["stock"], profile, workers=workers, load=1.0, seed=seed)
    return hourly(played)


Row = tuple[Case, dict[str, Metrics]]


def tables(rows: Sequence[Row]) -> list[str]:
    """Markdown, a table after the other."""
    return [*_completion(rows), *_belady(rows), *_tenants(rows), *_kvflow(rows, "e1"), *_kvflow(rows, "e2")]


def _completion(rows: Sequence[Row]) -> list[str]:
    lines = ["### SAGA: mean completion over that of `saga` at the same load (and its seconds)", ""]
    lines += [f"| system | published | {' | '.join(f'load {load:g}' for load in LOADS)} |", "|---|---|---|---|---|"]
    for name in CODERS:
        said, ratio = COMPLETION.get(name, ("", None))
        told = f"{said}: {ratio:.2f}" if ratio else "-"
        cells = []
        for load in LOADS:
            mine, theirs = (_seconds(rows, table="saga", system=s, load=load) for s in (name, "saga"))
            each = [
                row["metrics"]["session_seconds_mean"] for _, row in _where(rows, table="saga", system=name, load=load)
            ]
            spread = f"{min(filter(None, each)):,.0f}..{max(filter(None, each)):,.0f}"
            cells.append(f"{mine / theirs:.2f} ({spread} s)")
        lines.append(f"| `{name}` | {told} | {' | '.join(cells)} |")
    return [*lines, ""]


def _belady(rows: Sequence[Row]) -> list[str]:
    lines = ["### SAGA: tokens computed again over those of Bélády's rule", ""]
    lines += [f"| system | published | {' | '.join(f'load {load:g}' for load in LOADS)} |", "|---|---|---|---|---|"]
    for name in ("stock", "kvflow", "saga", "index", "weft", "weft-hinted"):
        said, ratio = BELADY.get(name, ("", None))
        told = f"{said}: {ratio:.2f}" if ratio else "-"
        cells = []
        for load in LOADS:
            figures = [_mean(rows, "recomputed_tokens", table="saga", system=s, load=load) for s in (name, "belady")]
            cells.append(f"{figures[0] / figures[1]:.2f}" if figures[1] > FEW else "-")
        lines.append(f"| `{name}` | {told} | {' | '.join(cells)} |")
    return [*lines, ""]


def _tenants(rows: Sequence[Row]) -> list[str]:
    lines = ["### SAGA: share of runs in time, ten tenants at 80 % load", ""]
    lines += ["| system | heavy | medium | light | overall | published (heavy/medium/light/overall) |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for name in SERVERS:
        mine = _where(rows, table="tenants", system=name)
        shares = [_average(row["in_time"][kind] for _, row in mine) for kind in CLASSES]
        shares.append(_average(row["metrics"]["slo_attainment"] for _, row in mine))
        said, theirs = IN_TIME.get(name, ("", ()))
        told = f"{said}: {' / '.join(f'{100 * one:.1f}' for one in theirs)}" if theirs else "-"
        lines.append(f"| `{name}` | {' | '.join(f'{100 * one:.1f} %' for one in shares)} | {told} |")
    return [*lines, ""]


def _kvflow(rows: Sequence[Row], table: str) -> list[str]:
    mine = _where(rows, table=table)
    points = list(dict.fromkeys(case.options for case, _ in mine))
    title = "10 agents, one run at a time" if table == "e1" else "runs of 10 agents at once"
    lines = [f"### KVFlow {table.upper()}: {title}; speed over `stock` without a tier / with the same tier", ""]
    lines += [f"| system, link | {' | '.join(_point(one) for one in points)} |", f"|---|{'---|' * len(points)}"]
    for link in LINKS:
        for name in TIERED:
            cells = []
            for own in points:
                alone = _seconds(rows, table=table, options=own, system="stock", tier=0.0)
                at = {"table": table, "options": own, "link": link, "tier": TIER}
                tiered, seconds = (_seconds(rows, system=s, **at) for s in ("stock", name))
                cells.append(f"{alone / seconds:.2f} / {tiered / seconds:.2f}")
            lines.append(f"| `{name}`, {link / 1e9:g} GB/s | {' | '.join(cells)} |")
    if table == "e1":
        lines.append(f"| published, KVFlow | {' | '.join(_published(one) for one in points)} |")
    else:
        said = ", ".join(f"{what} {ratio:.2f}" for what, ratio in E2.items())
        lines += ["", f"Published: {said} (HiCache was 0.57 of SGLang there)."]
    return [*lines, ""]


def _point(options: Options) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options if name != "passes")


def _published(options: Options) -> str:
    known = dict(options)
    figures = E1.get(int(known["fixed"])) if known["branches"] == 1 else None
    return " / ".join(f"{one:.2f}" for one in figures) if figures else f"{AVERAGE[int(known['fixed'])]:.2f} over all"


def _where(rows: Sequence[Row], link: float | None = None, **same: object) -> list[Row]:
    return [
        (case, found)
        for case, found in rows
        if all(getattr(case, name) == value for name, value in same.items()) and link in (None, case.profile.link)
    ]


def _seconds(rows: Sequence[Row], **same: Any) -> float:
    return _mean(rows, "session_seconds_mean", **same)


def _mean(rows: Sequence[Row], figure: str, link: float | None = None, **same: Any) -> float:
    return _average(found["metrics"][figure] for _, found in _where(rows, link, **same))


def _average(values: Iterable[float | None]) -> float:
    return mean([value for value in values if value is not None]) or 0.0


def _result(row: Row) -> dict[str, object]:
    case, found = row
    return {**asdict(case), "profile": {"name": case.profile.name, "link": case.profile.link}, **found}


def main() -> None:
    """Play all cases and write DIR/results.json, DIR/run.json and DIR/report.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="sessions of mini-swe-agent")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    todo = cases(range(asked.seed, asked.seed + asked.reps))
    with ProcessPoolExecutor(asked.jobs) as pool:
        playing = pool.map(play, todo, [asked.trace] * len(todo))
        rows = [(case, next(playing)) for case in track(todo, "papers")]
    lines = tables(rows)
    write_json(asked.out / "results.json", {"cells": [_result(row) for row in rows]})
    about = {"revision": machine.revision(), "machine": machine.machine(), "versions": machine.versions()}
    write_json(asked.out / "run.json", {**about, "trace": machine.named(asked.trace)})
    (asked.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
