"""A matrix from its cells to its report: plays them, writes results.json and run.json, prints the chief figures."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.cells import Cell, Done, Ledger, commands, write_json, write_results
from bench.comparison import Group, grouped
from bench.matrix import Guess, Runner, play


def carry_out(
    cells: Sequence[Cell],
    runner: Runner,
    guess: Guess,
    directory: Path,
    jobs: int = 1,
    about: Callable[[], Mapping[str, Any]] = dict,
) -> list[Group]:
    """Play what is missing of the cells and write DIR's files; returns the groups of these cells.

    `about` is asked at the end for what else run.json shall tell. A command that played nothing leaves no record there.
    Raises SystemExit: 130 after an interrupt, 1 where cells failed; what had finished is kept, a rerun goes on.
    """
    origin = (machine.revision(), machine.machine())
    ledger = Ledger(directory)
    before = ledger.read()
    began, started = time.perf_counter(), datetime.now(UTC)
    try:
        with _ended_as_interrupted():
            done, failed = play(cells, ledger, runner, guess, origin, jobs)
    except KeyboardInterrupt:
        print(
            f"weft: interrupted; what had finished is in {directory}, the same command goes on there", file=sys.stderr
        )
        raise SystemExit(130) from None
    groups = grouped(done)
    if played := [one for one in done if one != before.get(one.cell)]:
        record = {
            **_record(origin, played),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began, 1),
            "failed": len(failed),
            "jobs": jobs,
            **about(),
        }
        write_json(directory / "run.json", {"commands": [*commands(directory), record]})
    if done:
        write_results(directory, done)
        print("\n".join(report.compact(groups)))
        report.write(directory)
    if failed:
        print(f"weft: {len(failed)} of {len(cells)} cells failed; the same command tries them again", file=sys.stderr)
        raise SystemExit(1)
    return groups


def _record(origin: tuple[str, Mapping[str, Any]], played: Sequence[Done]) -> dict[str, Any]:
    return {
        "command": shlex.join(["weft", *map(machine.nameless, sys.argv[1:])]),
        "played_seconds": round(sum(one.seconds for one in played), 1),
        "cells": len(played),
        "revision": origin[0],
        "machine": origin[1],
        "versions": machine.versions(),
    }


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """Treat a request to terminate as Ctrl-C, so that engines and processes are ended with us."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a shell has it for what runs in the background
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
