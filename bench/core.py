"""What the core costs: time and memory per step, against the budgets of the design.

python -m bench.core [--sessions 10000] [--out DIR]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

import orjson

from scheduler.events import StepArrived, StepFinished, Usage, WorkerUp
from scheduler.identity import Identity, resolve
from scheduler.scheduler import Scheduler
from scheduler.segments import chain

STEPS = 20_000


def core(sessions: int, workers: int) -> Scheduler:
    """A scheduler with so many live sessions, one finished step each."""
    scheduler = Scheduler()
    for index in range(workers):
        scheduler.handle(WorkerUp(f"w{index}", "m", ("m",), "1", 1_000_000), 0.0)
    for index in range(sessions):
        step(scheduler, f"warm-{index}", f"session-{index}", 0.0)
    return scheduler


def step(scheduler: Scheduler, name: str, session: str, now: float) -> None:
    """One step, from arrival to end."""
    who = Identity(tenant="t", session=session, rule="x-session-id")
    scheduler.handle(StepArrived(name, "m", who), now)
    scheduler.handle(StepFinished(name, Usage(1000, 900, 50), "stop"), now)


def timed(work: Any, count: int) -> dict[str, float]:
    """p50 and p99 of `work(index)`, in microseconds."""
    spent = []
    gc.collect()
    for index in range(count):
        began = time.perf_counter_ns()
        work(index)
        spent.append((time.perf_counter_ns() - began) / 1000)
    cuts = statistics.quantiles(spent, n=100)
    return {"p50_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def bytes_per_session(sessions: int) -> int:
    """Memory of an idle session with its workflow and one step, in bytes."""
    gc.collect()
    tracemalloc.start()
    kept = core(sessions, 4)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept.graph.live) == sessions
    return used // sessions


def body(size: int) -> bytes:
    """A chat request of about `size` bytes, in messages of 2 KB."""
    messages = [{"role": "user", "content": "word " * 400} for _ in range(size // 2000)]
    return orjson.dumps({"model": "m", "messages": messages})


def measure(sessions: int) -> dict[str, Any]:
    """All figures."""
    few, many, fleet = core(100, 4), core(sessions, 4), core(0, 64)
    raw = body(400_000)

    def read(_: int) -> None:
        fields = orjson.loads(raw)
        resolve("t", {"x-session-id": "s", "user-agent": "x"}, fields)

    return {
        "continuing step, 100 live sessions": timed(lambda i: step(few, f"s{i}", f"session-{i % 100}", 1.0), STEPS),
        f"continuing step, {sessions} live sessions": timed(
            lambda i: step(many, f"s{i}", f"session-{i % sessions}", 1.0), STEPS
        ),
        "new step over 64 workers": timed(lambda i: step(fleet, f"s{i}", f"new-{i}", 1.0), STEPS // 4),
        "parse and identify 400 KB": timed(read, 200),
        "chain of segments of 400 KB": timed(lambda _: chain(orjson.loads(raw)), 200),
        "bytes per idle session": bytes_per_session(sessions),
    }


def main() -> None:
    """Run from the command line; prints the figures, and writes DIR/core.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.sessions)
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "core.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
