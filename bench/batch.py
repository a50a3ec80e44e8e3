"""A batch: all runs are there at the start, and nobody waits for any single one. How soon is the work done?

    python -m bench.batch --trace claude_code_sessions.tar.xz [--tier 0,2] [--runs 160] [--half report] [--out DIR]

Four workers. Against batch scheduling that is the best there is for throughput: so many whole runs at once, first come,
first served, and the limit chosen by hindsight, from those of `SHARES` times the number that has room with a mean
context each. Told: the hours until 90 % of the calls have ended (the rest is the longest runs, one beside the other)
and until all have, and the longest time that a call waited for its first token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from bench import runners, schedule
from bench.cells import Cell, write_json
from bench.machine import origin
from bench.metrics import percentile
from bench.records import Played
from bench.simulation.cluster import simulate
from bench.simulation.system import System
from bench.simulation.systems import SYSTEMS
from bench.simulation.systems.semaphore import Semaphore

WORKERS, AT_ONCE = 4, "poisson:1e9"
SHARES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)


def limited(share: float) -> type[System]:
    """A semaphore with so many times its usual number of runs at once."""
    return type("Limited", (Semaphore,), {"share": share})


def systems() -> Iterator[tuple[str, type[System]]]:
    """All that are played, with their names."""
    yield from ((name, SYSTEMS[name]) for name in ("stock", "weft"))
    yield from ((f"semaphore x {share:g}", limited(share)) for share in SHARES)


def told(name: str, played: Played) -> dict[str, float | str]:
    """The figures of one play. Times are seconds, but where they are hours."""
    ends = [call.finished for call in played.calls if call.finished is not None]
    begin = min(run.started for run in played.runs)
    waits = [call.first_token - call.sent for call in played.calls if call.first_token is not None]
    most, all_ = (((percentile(ends, percent) or 0.0) - begin) / 3600 for percent in (90, 100))
    return {
        "system": name, "runs": len(played.runs), "hours to 90 %": round(most, 2), "hours to all": round(all_, 2),
        "longest wait": round(max(waits)), "errors": sum(call.error is not None for call in played.calls),
    }  # fmt: skip


def main() -> None:
    """Read the command line, play, tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--tier", type=lambda text: [float(one) for one in text.split(",")], default=[0.0, 2.0])
    parser.add_argument("--runs", type=int, default=160)
    parser.add_argument("--half", default="report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cell = Cell(
        "claude-code", "stock", 1.0, WORKERS, 0.0, 0, args.seed, profile="l70", half=args.half, max_context=127_000
    )
    workload, profile = runners.workload(cell, args.trace), runners.profile(cell)
    rows = []
    for tier in args.tier:
        for name, system in systems():
            played = simulate(
                workload, system, profile, workers=WORKERS, load=0.0, tier=tier, arrivals=AT_ONCE, seed=args.seed,
                supply=max(1, args.runs // schedule.OPEN_RUNS),
            )  # fmt: skip
            rows.append({"tier": tier, **told(name, played)})
            print(rows[-1], flush=True)
    if args.out:
        write_json(args.out / "batch.json", {**origin("bench.batch"), "rows": rows})


if __name__ == "__main__":
    main()
