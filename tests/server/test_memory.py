"""Templates and estimates outlive a restart of the front end."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from scheduler.events import StepArrived, StepFinished, Usage, WorkerUp, WorkflowFinished
from scheduler.identity import Identity
from scheduler.template import Template
from server.core import Core
from server.memory import Memory, save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "1.sqlite"


def learn(core: Core) -> None:
    """One run of two roles."""
    core.scheduler.handle(WorkerUp("w", "m", ("m",), "1"), 0.0)
    for n, role in enumerate(("plan", "write")):
        after = ("plan",) if n else ()
        who = Identity(tenant="t", workflow="run", session=role, role=role, template="report", after=after, rule="x")
        core.scheduler.handle(StepArrived(f"s{n}", "m", who), n * 10.0)
        core.scheduler.handle(StepFinished(f"s{n}", Usage(9, 0, 50), "stop"), n * 10.0 + 2)
    core.scheduler.handle(WorkflowFinished("t", "run"), 30.0)


async def test_what_was_declared_and_learned_is_there_after_a_restart(path: Path) -> None:
    core, memory = Core(), Memory(path)
    learn(core)
    core.scheduler.knowledge.declare("t", Template.parse("chain", {"nodes": {"a": {}, "b": {}}, "edges": []}))
    assert await save(core, memory, estimates=True)
    again = Core().scheduler.knowledge
    assert again.restore(Memory(path).read()) == []
    assert again.template("t", "chain") == core.scheduler.knowledge.template("t", "chain")
    learned = again.template("t", "report")
    assert learned is not None
    assert ("t", "report") not in again.declared
    assert [(edge.source, edge.target) for edge in learned.edges] == [("plan", "write")]
    assert again.estimates.dump() == core.scheduler.knowledge.estimates.dump()
    assert again.template("other", "report") is None


async def test_only_what_has_changed_is_written_again(path: Path) -> None:
    core, memory = Core(), Memory(path)
    learn(core)
    assert await save(core, memory)
    assert core.scheduler.knowledge.changes() == []


def test_a_broken_file_is_put_aside(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database, and long enough to look like one" * 100)
    memory = Memory(path)
    assert memory.read() == []
    assert path.with_name(path.name + ".broken").exists()
    memory.write([])
    assert memory.read() == []


async def test_a_record_that_does_not_fit_is_left_out_and_named(path: Path) -> None:
    core, memory = Core(), Memory(path)
    learn(core)
    records = [*core.scheduler.knowledge.changes(), core.scheduler.knowledge.estimated()]
    broken = [type(r)(r.kind, r.tenant, r.name, {"what": 1}) for r in records]
    memory.write(broken)
    again = Core().scheduler.knowledge
    assert len(again.restore(memory.read())) == len(broken)
    assert not again.programs


async def test_a_disk_that_fails_costs_only_what_was_learned(path: Path) -> None:
    core, memory = Core(), Memory(path)
    learn(core)
    path.mkdir()
    assert not await save(core, memory)
    path.rmdir()
    assert await save(core, memory)
    assert {record.kind for record in memory.read()} == {"learned"}


def test_a_file_that_is_locked_is_left_where_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(path)
    memory.write([])

    def locked() -> sqlite3.Connection:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(memory, "_open", locked)
    assert memory.read() == []
    assert path.exists()
