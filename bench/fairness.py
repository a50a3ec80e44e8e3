"""Ten tenants, one of them greedy and one lying, in open loop: who is in time, and how evenly all are slowed down.

    python -m bench.fairness [--load 0.32,0.5,0.8] [--systems stock,saga,weft] [--seed 1] [--reps 3] [--out DIR]

Workload W8 on four workers (`l70`, 40,000 KV tokens each): eight light tenants, one with six times their runs and
contexts three times as long, one that says of each of its agents that it runs next. Runs arrive at a share of the rate
at which `stock` ends them in a closed loop at load 1. At 0.4 of that rate it has 95 % in time, so that 0.32 is 80 % of
what it can take. Told: the share of runs within 1.5 times their unloaded time, of all, of the light tenants, of the
greedy and of the lying one; and Jain's index of the tenants' mean speeds, unloaded time over time taken: 1 where all
are slowed down alike.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from bench.cells import write_json
from bench.machine import origin
from bench.metrics import hourly, in_time, measure
from bench.records import Played
from bench.simulation.cluster import simulate
from bench.simulation.profile import PROFILES
from bench.simulation.systems import SYSTEMS
from bench.workloads.tenants import GREEDY, LIAR, LIGHT, w8

PROFILE = replace(PROFILES["l70"], kv_tokens=40_000)
WORKERS, TENANTS, SUPPLY = 4, 10, 8


def jain(played: Played) -> float:
    """Jain's index (1984) of the tenants' mean speeds: the square of the sum over n times the sum of the squares."""
    speeds = defaultdict(list)
    for run in played.runs:
        if not run.warm and run.finished is not None and run.unloaded:
            speeds[run.tenant].append(run.unloaded / (run.finished - run.started))
    means = [statistics.mean(one) for one in speeds.values()]
    return sum(means) ** 2 / (len(means) * sum(one * one for one in means))


def row(system: str, load: float, seed: int) -> dict[str, float]:
    """The figures of one play."""
    workload = w8(seed, tenants=TENANTS)
    full = simulate(workload, SYSTEMS["stock"], PROFILE, workers=WORKERS, load=1.0, seed=seed)
    played = simulate(
        workload, SYSTEMS[system], PROFILE, workers=WORKERS, load=0.0, arrivals=f"poisson:{load * hourly(full):g}",
        seed=seed, supply=SUPPLY,
    )  # fmt: skip
    found = {name: in_time(played, name) or 0.0 for name in ("", LIGHT, GREEDY, LIAR)}
    worst = measure(played)["worst_turn_seconds_p90"] or 0.0
    return {"all": found[""], **{name: found[name] for name in (LIGHT, GREEDY, LIAR)}, "jain": jain(played),
            "worst turn p90": worst}  # fmt: skip


def main() -> None:
    """Read the command line, play, tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__)
    parser.add_argument("--load", type=lambda text: [float(one) for one in text.split(",")], default=[0.32, 0.5, 0.8])
    parser.add_argument("--systems", type=lambda text: text.split(","), default=["stock", "saga", "weft"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    told = []
    for load in args.load:
        for system in args.systems:
            rows = [row(system, load, args.seed + rep) for rep in range(args.reps)]
            mean = {name: round(statistics.mean(one[name] for one in rows), 4) for name in rows[0]}
            told.append({"load": load, "system": system, **mean, "reps": rows})
            print(f"load {load:g} {system}: {mean}", flush=True)
    if args.out:
        write_json(args.out / "fairness.json", {**origin("bench.fairness"), "rows": told})


if __name__ == "__main__":
    main()
