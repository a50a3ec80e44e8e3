"""One cell of a matrix, and the file that finished cells are appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.metrics import NAMES, Metrics

CLOSED, TRACE = "closed", "trace"
SIMULATED, REAL = "simulated", "real"
SHOWN = ("workload", "system", "load", "workers", "tier", "rep", "seed")


@dataclass(frozen=True, slots=True)
class Cell:
    """Everything that determines one cell: equal cells have equal figures, as far as a seed determines them.

    `load` is None in an open loop, where `arrivals` stands for it: "poisson:R", R runs an hour; "trace", as recorded.
    `tier` is the host tier's size over the KV memory of the engines. `engine` is "simulated" or "real"; `profile` what
    a worker costs, or is. `trace` is a file's name and digest. `supply` is how many runs a slot of a closed loop gets.
    `options` are those of the workload, "name=value,..." in the order of their names.
    """

    workload: str
    system: str
    load: float | None
    workers: int
    tier: float
    rep: int
    seed: int
    arrivals: str = CLOSED
    engine: str = SIMULATED
    profile: str = "l70"
    trace: str | None = None
    half: str | None = None
    scale: float = 1.0
    max_context: int | None = None
    supply: int = 4
    options: str = ""

    @property
    def rate(self) -> float | None:
        """Runs an hour of Poisson arrivals, else None."""
        return float(self.arrivals.partition(":")[2]) if self.arrivals.startswith("poisson:") else None

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two cells must share to be compared: all but system, load, rate, repetition and its seed."""
        return (
            self.engine, self.workload, self.trace or "", self.half or "", self.scale, self.max_context or 0,
            self.options, self.profile, self.supply, self.arrivals.partition(":")[0], self.workers, self.tier,
            self.seed - self.rep,
        )  # fmt: skip

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands among others."""
        return (self.setting, self.system, self.load or 0.0, self.rate or 0.0, self.rep)

    def __str__(self) -> str:
        at = f"load {self.load:g}" if self.load is not None else self.arrivals
        return f"{self.system}, {at}, tier {self.tier:g}, rep {self.rep}"


@dataclass(frozen=True, slots=True)
class Done:
    """A finished cell: its figures, the seconds it took, the revision and the machine that it ran on.

    `extra` is what else the player said of it, `problems` the first few texts of calls that failed.
    """

    cell: Cell
    metrics: Metrics
    seconds: float
    revision: str
    machine: Mapping[str, Any]
    extra: Mapping[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def origin(self) -> tuple[str, str]:
        """Code and machine. Only cells that share both are compared in pairs."""
        return self.revision, json.dumps(self.machine, sort_keys=True)

    def line(self) -> dict[str, Any]:
        """As it stands in cells.jsonl."""
        rest = {"metrics": self.metrics, "seconds": self.seconds, "revision": self.revision, "machine": self.machine}
        return asdict(self.cell) | rest | {"extra": self.extra, "problems": self.problems}

    def result(self) -> dict[str, Any]:
        """As it stands in results.json: what the seed determines. An open-loop cell says its arrivals too."""
        shown = {name: getattr(self.cell, name) for name in SHOWN}
        if self.cell.arrivals != CLOSED:
            shown["arrivals"] = self.cell.arrivals
        return shown | {"metrics": self.metrics}


class Ledger:
    """DIR/cells.jsonl: one finished cell a line. A line that a crash tore is skipped, and parted from the next.

    `unread` is how many lines were not understood when it was last read.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "cells.jsonl"
        self.unread = 0

    def read(self) -> dict[Cell, Done]:
        """The finished cells, the latest of equal ones."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        parsed = [_parsed(line) for line in lines]
        self.unread = parsed.count(None)
        return {done.cell: done for done in parsed if done is not None}

    def append(self, done: Done) -> None:
        """Write a cell down for good. Raises ValueError, and writes nothing, for a figure that is no number."""
        line = json.dumps(done.line(), allow_nan=False).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


def write_results(directory: Path, done: Iterable[Done]) -> None:
    """DIR/results.json: what the seed determines of these cells, in one order, whatever order they were played in."""
    ordered = sorted(done, key=lambda one: one.cell.place)
    write_json(directory / "results.json", {"cells": [one.result() for one in ordered]})


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file at once, so that no reader and no crash sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def commands(directory: Path) -> list[dict[str, Any]]:
    """What DIR/run.json tells of each command that played cells, the newest last; nothing where there is no file."""
    try:
        read = json.loads((directory / "run.json").read_bytes())
    except (OSError, ValueError):
        return []
    return list(read["commands"]) if "commands" in read else [read]


def _parsed(line: bytes) -> Done | None:
    try:
        read = json.loads(line)
        named = {one.name: read[one.name] for one in fields(Cell) if one.name in read or one.default is MISSING}
        metrics = dict.fromkeys(NAMES) | read["metrics"]
        more = read.get("extra", {}), read.get("problems", [])
        return Done(Cell(**named), metrics, read["seconds"], read["revision"], read["machine"], *more)
    except (ValueError, KeyError, TypeError):
        return None
