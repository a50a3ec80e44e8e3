from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.cells import Ledger, commands, write_results
from bench.machine import machine, named, revision
from tests.bench.records import cell, done


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new")
    assert ledger.read() == {}
    cells = [
        done(cell("stock")),
        done(cell("weft", tier=2.0), extra={"starved": 1.0}, problems=["gone"]),
        done(cell(load=None, arrivals="poisson:20")),
    ]
    for one in cells:
        ledger.append(one)
    assert list(ledger.read().values()) == cells


def test_the_later_of_equal_cells_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for hits in (0.5, 0.75):
        ledger.append(done(cell(), hit_ratio=hits))
    (one,) = ledger.read().values()
    assert one.metrics["hit_ratio"] == 0.75


def test_a_line_torn_by_a_crash_costs_that_cell_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(done(cell("stock")))
    ledger.append(done(cell("weft")))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-40])
    assert {one.system for one in ledger.read()} == {"stock"}
    assert ledger.unread == 1
    ledger.append(done(cell("weft")))
    assert {one.system for one in ledger.read()} == {"stock", "weft"}


def test_a_line_from_before_a_field_or_a_figure_was_added_is_still_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    old = done(cell()).line()
    for name in ("options", "supply", "extra", "problems"):
        del old[name]
    del old["metrics"]["slo_attainment"]
    ledger.path.write_text(json.dumps(old) + "\n")
    (one,) = ledger.read().values()
    assert one == done(cell(), slo_attainment=None)
    assert ledger.unread == 0


def test_lines_that_are_not_understood_are_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    nameless = {name: value for name, value in done(cell()).line().items() if name != "system"}
    for line in ("[1]", "5", '"x"', "{}", json.dumps(nameless), json.dumps(done(cell()).line() | {"metrics": [1]})):
        with ledger.path.open("a") as file:
            file.write(line + "\n")
    assert ledger.read() == {}
    assert ledger.unread == 6


def test_a_figure_that_is_no_number_is_never_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.append(done(cell(), hit_ratio=math.nan))
    assert ledger.read() == {}


def test_a_run_json_of_one_command_counts_as_a_list_of_it(tmp_path: Path) -> None:
    assert commands(tmp_path) == []
    (tmp_path / "run.json").write_text('{"command": "weft simulate"}')
    assert commands(tmp_path) == [{"command": "weft simulate"}]


def test_each_line_says_code_and_machine(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(done(cell()))
    line = json.loads(ledger.path.read_text())
    assert (line["revision"], line["machine"]["cores"], line["seed"], line["system"]) == ("abc", 2, 7, "stock")


def test_results_hold_only_what_the_seed_determines_in_one_order(tmp_path: Path) -> None:
    cells = [done(cell(system, load, rep)) for system in ("weft", "stock") for load in (10.0, 2.0) for rep in (1, 0)]
    write_results(tmp_path / "a", cells)
    slower = [
        replace(one, seconds=99.0, extra={"x": 2.0}, revision="other", machine={"cpu": "another"})
        for one in reversed(cells)
    ]
    write_results(tmp_path / "b", slower)
    text = (tmp_path / "a" / "results.json").read_bytes()
    assert text == (tmp_path / "b" / "results.json").read_bytes()
    first, second, third, *_ = json.loads(text)["cells"]
    assert list(first) == ["workload", "system", "load", "workers", "tier", "rep", "seed", "metrics"]
    assert [(c["system"], c["load"], c["rep"], c["seed"]) for c in (first, second, third)] == [
        ("stock", 2.0, 0, 7),
        ("stock", 2.0, 1, 8),
        ("stock", 10.0, 0, 7),
    ]


def test_an_open_loop_cell_says_its_arrivals(tmp_path: Path) -> None:
    write_results(tmp_path, [done(cell(load=None, arrivals="poisson:20"))])
    (one,) = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert (one["load"], one["arrivals"]) == (None, "poisson:20")


def test_a_trace_is_named_by_its_content_and_never_by_its_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "t.jsonl", tmp_path / "b" / "t.jsonl"
    for path in (one, two):
        path.parent.mkdir()
        path.write_text("same")
    assert named(one) == named(two)
    two.write_text("other")
    assert named(one) != named(two)
    assert str(tmp_path) not in named(one)


def test_machine_and_revision_are_known_here() -> None:
    known = machine()
    assert known["cores"] >= 1
    assert known["memory_gib"] > 0
    assert known["cpu"]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", revision()) or revision() == version("weft")
