"""What a worker's death, its return and a drain do to those who are served, simulated, beside the same runs without.

    python -m bench.faults --trace claude_code_sessions.tar.xz [--load 0.77,1.54] [--half report] [--out DIR]

Four workers, closed loop. In the middle of the window one dies, and is up again, empty, two minutes later; or one is
drained for good, as only Weft can. Told of the runs that were live then: their time over that of the same runs without
the fault (p50 and p95), the largest wait for a first token after it, and how many calls were cut off after their first
token, which no front can help.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import runners
from bench.cells import Cell, write_json
from bench.machine import origin
from bench.metrics import percentile
from bench.records import Played
from bench.simulation.cluster import Fault, simulate
from bench.simulation.systems import SYSTEMS

WORKERS, DOWN = 4, 120.0
SYSTEMS_TOLD = ("stock", "weft")


@dataclass(frozen=True, slots=True)
class Told:
    """Of the runs that were live when it happened."""

    system: str
    load: float
    fault: str
    runs: int
    slower_p50: float
    slower_p95: float
    worst_wait: float
    cut: int
    errors: int


def told(cell: Cell, trace: Path, kind: str) -> Told:
    """Play a cell with and without the fault."""
    workload, profile = runners.workload(cell, trace), runners.profile(cell)

    def play(faults: tuple[Fault, ...]) -> Played:
        return simulate(
            workload, SYSTEMS[cell.system], profile, workers=WORKERS, load=cell.load or 0.0, tier=cell.tier,
            seed=cell.seed, faults=faults,
        )  # fmt: skip

    plain = play(())
    at = sum(plain.window) / 2
    drain = kind == "drain"
    hit = play((Fault(0, at, None if drain else at + DOWN, drain),))
    before = {run.run: run for run in plain.runs}
    live = [run for run in hit.runs if run.started <= at and run.finished is not None and run.finished > at]
    slower = []
    for run in live:
        same = before.get(run.run)
        if same is not None and same.finished is not None and run.finished is not None:
            slower.append((run.finished - run.started) / (same.finished - same.started))
    waits = [call.first_token - call.sent for call in hit.calls if call.first_token is not None and call.sent >= at]
    errors = sum(call.error is not None for call in hit.calls)
    return Told(
        cell.system, cell.load or 0.0, kind, len(slower), round(percentile(slower, 50) or 0.0, 3),
        round(percentile(slower, 95) or 0.0, 3), round(max(waits, default=0.0), 1), int(hit.extra["cut"]), errors,
    )  # fmt: skip


def main() -> None:
    """Read the command line, play, tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--load", type=lambda text: [float(one) for one in text.split(",")], default=[0.77, 1.54])
    parser.add_argument("--half", default="report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for load in args.load:
        for kind in ("death", "drain"):
            for system in SYSTEMS_TOLD:
                cell = Cell(
                    "claude-code", system, load, WORKERS, 0.0, 0, args.seed, profile="l70", half=args.half,
                    max_context=127_000,
                )  # fmt: skip
                rows.append(told(cell, args.trace, kind))
                print(rows[-1], flush=True)
    if args.out:
        write_json(args.out / "faults.json", {**origin("bench.faults"), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
