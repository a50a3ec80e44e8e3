"""Hand-made records for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from bench.cells import Cell, Done
from bench.metrics import NAMES
from bench.records import CallRecord, Played, RunRecord


def call(run: str, sent: float, first: float | None, finished: float | None, **more: Any) -> CallRecord:
    """A call of 100 prompt tokens and 10 out."""
    return CallRecord(
        run, 0, "s", "t", "0", sent, more.pop("prompt", 100), more.pop("output", 10),
        first_token=first, finished=finished, **more,
    )  # fmt: skip


def run(name: str, started: float, finished: float | None, **more: Any) -> RunRecord:
    """A run that takes 10 seconds alone."""
    return RunRecord(name, "t", started, more.pop("unloaded", 10.0), more.pop("warm", False), finished, **more)


def played(calls: list[CallRecord], runs: list[RunRecord], window: tuple[float, float] = (0.0, 100.0)) -> Played:
    """A cell with a window of 100 seconds."""
    return Played(calls, runs, window, {})


def cell(system: str = "stock", load: float | None = 1.0, rep: int = 0, **more: Any) -> Cell:
    """A cell of seed 7 and on."""
    return Cell("w1", system, load, more.pop("workers", 2), more.pop("tier", 0.0), rep, 7 + rep, **more)


def done(at: Cell, revision: str = "abc", **figures: Any) -> Done:
    """A finished cell in which all figures are 1 but those given; `cpu`, `extra`, `problems` are no figures."""
    metrics: dict[str, float | None] = dict.fromkeys(NAMES, 1.0)
    machine = {"cpu": figures.pop("cpu", "a processor"), "cores": 2, "memory_gib": 4.0}
    extra, problems = figures.pop("extra", {}), figures.pop("problems", [])
    return Done(at, metrics | figures, 2.0, revision, machine, extra, problems)
