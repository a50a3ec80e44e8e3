from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.cells import Cell, Done, Ledger, write_results
from bench.errors import BenchError
from bench.matrix import expected, plan, play, spoken
from bench.records import Played
from tests.bench.records import call, cell, done, played, run

ORIGIN = ("abc", {"cpu": "a processor"})
POINTS = [{"load": 0.5}, {"load": 2.0}]


def figures(at: Cell) -> Played:
    """Records that depend on the cell alone."""
    took = 1.0 + len(at.system) * (at.load or 0) + at.seed
    return played([call("a", 0, took, took + 1)], [run("a", 0, took + 1)])


@dataclass
class Fake:
    """Plays at once, remembers what, and can be stopped or broken at a cell."""

    stop_at: int | None = None
    broken: str | None = None
    cells: list[Cell] = field(default_factory=list)

    def __call__(self, at: Cell) -> Played:
        if len(self.cells) == self.stop_at:
            raise KeyboardInterrupt
        if at.system == self.broken:
            raise RuntimeError("the engine did not start")
        self.cells.append(at)
        return figures(at)


def playing(
    cells: Sequence[Cell], folder: Path, runner: Any, jobs: int = 1, revision: str = "abc"
) -> tuple[list[Done], list[Cell], str]:
    said = io.StringIO()
    finished, failed = play(
        cells, Ledger(folder), runner, lambda _: 5.0, (revision, {}), jobs, Console(file=said, width=200)
    )  # fmt: skip
    return finished, failed, said.getvalue()


def a_plan(systems: Sequence[str] = ("stock", "weft", "unlimited"), reps: int = 3) -> list[Cell]:
    return plan(cell(""), systems, POINTS, reps)


def test_every_system_meets_every_point_in_every_repetition_with_the_same_seeds() -> None:
    cells = a_plan()
    assert len(cells) == len(set(cells)) == 18
    seeds = {(one.system, one.load, one.rep): one.seed for one in cells}
    assert {seeds[key] - key[2] for key in seeds} == {7}


def test_systems_are_interleaved_in_an_order_that_changes() -> None:
    cells = plan(cell(""), ("a", "b", "c", "d", "e"), POINTS, 3)
    blocks = [[one.system for one in cells[at : at + 5]] for at in range(0, 30, 5)]
    assert all(set(block) == {*"abcde"} for block in blocks)
    assert len({tuple(block) for block in blocks}) > 2
    assert cells == plan(cell(""), ("a", "b", "c", "d", "e"), POINTS, 3)


def test_a_rerun_plays_only_what_is_missing(tmp_path: Path) -> None:
    playing(a_plan(["stock", "weft"]), tmp_path, Fake())
    more = Fake()
    finished, failed, said = playing(a_plan(), tmp_path, more)
    assert {one.system for one in more.cells} == {"unlimited"}
    assert (len(finished), failed) == (18, [])
    assert "cells to play: 6, there already: 12" in said


def test_an_interrupt_leaves_what_had_ended_and_a_rerun_comes_to_the_same_results(tmp_path: Path) -> None:
    cells = a_plan()
    with pytest.raises(KeyboardInterrupt):
        playing(cells, tmp_path / "a", Fake(stop_at=7))
    assert len(Ledger(tmp_path / "a").read()) == 7
    path = Ledger(tmp_path / "a").path
    path.write_bytes(path.read_bytes()[:-25])  # and the machine went down
    rest = Fake()
    finished, _, _ = playing(cells, tmp_path / "a", rest)
    assert len(rest.cells) == 12
    write_results(tmp_path / "a", finished)
    at_once, _, _ = playing(cells[::-1], tmp_path / "b", Fake())
    write_results(tmp_path / "b", at_once)
    assert (tmp_path / "a" / "results.json").read_bytes() == (tmp_path / "b" / "results.json").read_bytes()


def test_another_seed_trace_or_tier_is_another_cell(tmp_path: Path) -> None:
    playing([cell()], tmp_path, Fake())
    others = [cell(tier=1.0), cell(trace="t@1"), cell(max_context=5), cell(half="tune"), cell(workers=1), cell(rep=1)]
    runner = Fake()
    playing([cell(), *others], tmp_path, runner)
    assert runner.cells == others


def test_real_cells_of_other_code_are_kept_and_said_to_be(tmp_path: Path) -> None:
    playing([cell(engine="real")], tmp_path, Fake())
    runner = Fake()
    finished, _, said = playing([cell(engine="real")], tmp_path, runner, revision="def")
    assert (runner.cells, finished[0].revision) == ([], "abc")
    assert "1 of those there were played by other code (abc, not def)" in said


def test_simulated_cells_of_other_code_are_played_again(tmp_path: Path) -> None:
    playing([cell()], tmp_path, Fake())
    runner = Fake()
    finished, _, said = playing([cell(), cell("weft")], tmp_path, runner, revision="def")
    assert len(runner.cells) == 2
    assert {one.revision for one in finished} == {one.revision for one in Ledger(tmp_path).read().values()} == {"def"}
    assert "1 of them are played again: other code simulated them before" in said


def test_cells_of_another_machine_are_kept_and_said_to_be(tmp_path: Path) -> None:
    Ledger(tmp_path).append(done(cell()))
    _, _, said = playing([cell()], tmp_path, Fake())
    assert "1 of those there were played on another machine" in said


def test_lines_that_are_not_understood_are_said(tmp_path: Path) -> None:
    Ledger(tmp_path).path.write_text("{}\n")
    assert "1 lines of cells.jsonl were not understood" in playing([cell()], tmp_path, Fake())[2]


def test_what_the_player_said_is_written_down_and_failed_calls_are_said(tmp_path: Path) -> None:
    def runner(at: Cell) -> Played:
        errors = ["gone", "gone", "500" + "x" * 300, "a", "b"]
        found = played([call("a", 0, None, None, error=text) for text in errors], [run("a", 0, 2)])
        found.extra.update(starved=2.0, load=math.inf)
        return found

    (one,), _, said = playing([cell()], tmp_path, runner)
    assert (one.extra, one.problems) == ({"starved": 2.0}, ["gone", "500" + "x" * 197, "a"])
    assert list(Ledger(tmp_path).read().values()) == [one]
    assert "5 calls failed: gone | 500x" in said.replace("\n", "")


def test_a_cell_that_fails_is_said_left_out_and_tried_again(tmp_path: Path) -> None:
    finished, failed, said = playing(a_plan(["stock", "weft"], 1), tmp_path, Fake(broken="weft"))
    assert (len(finished), len(failed)) == (2, 2)
    assert "RuntimeError: the engine did not start" in said
    runner = Fake()
    _, failed, _ = playing(a_plan(["stock", "weft"], 1), tmp_path, runner)
    assert (len(runner.cells), failed) == (2, [])


def failing(at: Cell) -> Played:
    if at.system == "broken":
        raise RuntimeError("the engine did not start")
    return figures(at)


def test_processes_come_to_the_same_results_and_failures_as_one(tmp_path: Path) -> None:
    cells = a_plan(["stock", "weft", "broken"], 1)
    for folder, jobs in (("one", 1), ("two", 2)):
        finished, failed, said = playing(cells, tmp_path / folder, failing, jobs)
        assert [one.system for one in failed] == ["broken", "broken"]
        assert "RuntimeError: the engine did not start" in said
        write_results(tmp_path / folder, finished)
    assert (tmp_path / "one" / "results.json").read_bytes() == (tmp_path / "two" / "results.json").read_bytes()


def refusing(at: Cell) -> Played:
    if at.system == "weft":
        raise BenchError("it has no such part")
    return figures(at)


def test_what_the_user_must_change_ends_the_matrix_at_once(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no such part"):
        playing([cell("weft"), cell("stock"), cell("stock", rep=1)], tmp_path, refusing)
    assert Ledger(tmp_path).read() == {}


def test_the_expected_time_is_of_cells_like_those_and_else_a_guess(tmp_path: Path) -> None:
    known = {one.cell: one for one in [done(cell("weft", rep=0)), done(cell("weft", rep=1))]}
    missing = [cell("weft", rep=2), cell("stock", rep=2)]
    assert expected(missing, known, lambda _: 30.0) == 32
    assert expected(missing, known, lambda _: 30.0, jobs=2) == 16
    assert expected([], known, lambda _: 30.0) == 0
    slow = replace(done(cell("weft", 4.0)), seconds=50.0)
    known[slow.cell] = slow
    assert expected([cell("weft", 4.0, rep=1)], known, lambda _: 30.0) == 50
    assert expected([cell("weft", 2.0, rep=1)], known, lambda _: 30.0) == (2 + 2 + 50) / 3
    _, _, said = playing([cell()], tmp_path, Fake())
    assert said.startswith("cells to play: 1, there already: 0; expected: 5 s\n")


def test_lengths_of_time_are_said_plainly() -> None:
    assert [spoken(s) for s in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]
