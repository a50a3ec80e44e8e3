from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from bench import plots, report
from bench.cells import Done, Ledger
from bench.comparison import Group, grouped, paired, student
from bench.errors import BenchError
from tests.bench.records import cell, done

TURNS = {"stock": (10.0, 12.0, 11.0), "weft": (15.0, 18.5, 16.0), "slow": (8.0, 9.7, 9.0), "same": (10.1, 11.8, 11.0)}


def a_matrix(loads: Sequence[float] = (0.5, 2.0)) -> list[Done]:
    return [
        done(cell(system, load, rep), turns_per_second=turns, worst_turn_seconds_p90=100 / turns)
        for system, values in TURNS.items()
        for load in loads
        for rep, turns in enumerate(values)
    ]


def open_loop(attained: dict[str, dict[float, float]]) -> Group:
    cells = [
        done(cell(system, None, arrivals=f"poisson:{rate:g}"), slo_attainment=share)
        for system, shares in attained.items()
        for rate, share in shares.items()
    ]
    (group,) = grouped(cells)
    return group


def written(folder: Path, cells: Sequence[Done]) -> str:
    for one in cells:
        Ledger(folder).append(one)
    report.write(folder)
    return (folder / "report.md").read_text()


def test_a_ratio_is_the_mean_over_pairs_with_students_interval() -> None:
    ratio = paired([(2.0, 1.0), (3.0, 2.0), (5.0, 2.0)])
    assert ratio is not None
    assert ratio.low is not None
    assert ratio.mean == pytest.approx(2.0)
    assert ratio.mean - ratio.low == pytest.approx(4.3027 * 0.5 / math.sqrt(3))


@pytest.mark.parametrize(("degrees", "known"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (30, 2.042)])
def test_students_quantiles_are_right(degrees: int, known: float) -> None:
    assert student(degrees) == pytest.approx(known, abs=6e-4)


def test_one_pair_has_no_interval_and_no_verdict() -> None:
    ratio = paired([(1.0, 2.0)])
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.verdict(1), ratio.behind(1)) == (0.5, None, "", True)


def test_two_pairs_are_too_few_for_a_verdict() -> None:
    two, three = paired([(0.5, 1.0)] * 2), paired([(0.5, 1.0)] * 3)
    assert two is not None
    assert three is not None
    assert (two.verdict(1), three.verdict(1)) == ("", "worse")


def test_a_figure_that_fell_to_zero_is_a_loss_and_no_missing_pair() -> None:
    ratio = paired([(0.0, 0.9), (0.0, 1.0), (0.0, 0.8)])
    assert ratio is not None
    assert ratio.verdict(1) == "worse"


def test_shares_are_compared_by_their_difference() -> None:
    found = paired([(0.5, 0.25), (0.25, 0.5)], shares=True)
    assert found is not None
    assert (found.mean, found.verdict(1), found.brief) == (0, "", "+0.00")
    (group,) = grouped([done(cell("stock"), slo_attainment=0.0), done(cell("weft"), slo_attainment=0.5)])
    assert str(group.versus("weft", 1.0, "slo_attainment")) == "+0.50"


def test_systems_are_paired_by_seed_and_only_with_the_baseline_at_the_same_load() -> None:
    (group,) = grouped([*a_matrix(), done(cell("late", 2.0, 2), turns_per_second=22.0)])
    ratio = group.versus("late", 2.0, "turns_per_second")
    assert ratio is not None
    assert (ratio.mean, ratio.n) == (2.0, 1)
    assert group.versus("late", 0.5, "turns_per_second") is None


def test_losses_are_said_plainly_with_their_interval() -> None:
    text = report.markdown(a_matrix(), [])
    losses = text[text.index("## Losses") : text.index("## Where weft loses")]
    assert "slow, w1" in losses
    assert "weft" not in losses
    assert "same" not in losses
    assert "**worse**" in losses
    row = next(line for line in text.splitlines() if line.startswith("| slow | 8.9 [8..9.7] "))
    assert row.count("**worse**") == 2


def lost(text: str) -> str:
    return text[text.index("## Where weft loses") : text.index("## w1")]


def test_weft_is_held_against_every_rival_and_not_against_what_nobody_could_run() -> None:
    others = ("unlimited", "belady", "oracle-gate", "weft-no-evict", "saga")
    cells = [*a_matrix(), *(done(cell(s, 2.0, rep), turns_per_second=30.0 + rep) for s in others for rep in range(3))]
    said = lost(report.markdown(cells, [])).split("\n- ")
    assert [" ".join(line.split()[:3]) for line in said[1:]] == ["weft against saga,"] * 2
    assert "load 2: turns_per_second 0." in said[1]
    assert "load 2: worst_turn_seconds_p90 6." in said[2]
    assert all("**worse**" in line for line in said[1:])


def test_what_weft_loses_of_too_few_pairs_is_said_to_be_behind() -> None:
    cells = [done(cell("saga"), turns_per_second=2.0), done(cell("weft")), done(cell("weft-no-evict"))]
    said = lost(report.markdown(cells, []))
    assert "None that the interval bears out." in said
    behind = said[said.index("Behind in the mean") :]
    assert "- weft against saga" in behind
    assert "- weft-no-evict against saga" in behind


def test_the_head_says_how_many_comparisons_there_were_and_how_many_mislead_by_chance() -> None:
    text = report.markdown(a_matrix(), [])
    shown = sum(name in report.DIRECTION for name in report.TITLES)
    made = (3 + 2) * 2 * shown  # three systems against stock, weft against the two others also, at two loads
    assert f"Comparisons: {made}, of them {made} of at least 3 pairs." in text
    assert f"5 % of those (about {0.05 * made:.0f})" in text


def test_cells_of_other_code_or_another_machine_are_no_pair() -> None:
    mine, other = done(cell("weft"), "abc"), done(cell("weft", rep=1), "abc", turns_per_second=9.0)
    theirs = [done(cell("stock"), "abc"), done(cell("stock", rep=1), "def"), done(cell("saga"), cpu="another")]
    (group,) = grouped([mine, other, *theirs])
    found = group.versus("weft", 1.0, "turns_per_second")
    assert found is not None
    assert (found.mean, found.n) == (1, 1)
    assert group.versus("weft", 1.0, "turns_per_second", "saga") is None


def test_what_was_seen_of_real_cells_is_a_table_of_its_own() -> None:
    seen = {"load_played": 1.25, "starved": 2.0, "front_cpus": 0.5}
    real = [done(cell(s, rep=rep, engine="real"), extra=seen) for s in ("stock", "weft") for rep in (0, 1)]
    text = report.markdown(real, [])
    assert "| weft | load 1 | 1.25 | 2 | 0.5 | - | - | - |" in text[text.index("### As played") :]
    assert "### As played" not in report.markdown(a_matrix(), [])


def test_all_systems_stand_in_one_table_with_spread_and_ratio() -> None:
    text = report.markdown(a_matrix(), [])
    table = text[text.index("### Turns a second") :].split("\n\n")[1].splitlines()
    assert table[0] == "| system | load 0.5 | load 2 |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| stock", "| same", "| slow", "| weft"]
    assert table[2].startswith("| stock | 11 [10..12] | ")
    assert "better" in table[5]
    assert "x (" in table[5]


def test_every_figure_can_be_traced_to_seed_code_and_machine() -> None:
    run = {"command": "weft simulate", "versions": {"vllm": "0.32.0"}, "left_out": {"duplicate": 5}}
    later = {"command": "weft bench", "versions": {"vllm": "0.33.0"}}
    cells = [*a_matrix(), done(cell("weft", 4.0), revision="def-dirty")]
    text = report.markdown(cells, [run, later], 2)
    for fact in (
        "weft simulate",
        "weft bench",
        "vllm 0.32.0",
        "vllm 0.33.0",
        "The code was dirty",
        "more than one code or machine",
        "2 lines of cells.jsonl were not understood",
        "abc, def-dirty",
        "a processor, 2 cores",
        "seeds: 7, 8, 9",
        "5 duplicate",
    ):
        assert fact in text


def test_one_repetition_says_that_it_has_no_interval() -> None:
    text = report.markdown([one for one in a_matrix() if one.cell.rep == 0], [])
    assert "Fewer than 3 repetitions" in text
    assert "None that the interval bears out." in text
    assert "Behind in the mean, of fewer than 3 repetitions" in text


def test_without_the_baseline_nothing_is_compared() -> None:
    text = report.markdown([one for one in a_matrix() if one.cell.system != "stock"], [])
    assert "`stock` was not played" in text
    assert "worse**" not in text.split("## w1")[1]


def test_workers_and_tiers_are_tables_of_their_own(tmp_path: Path) -> None:
    text = written(tmp_path, [*a_matrix(), done(cell(tier=2.0)), done(cell(workers=64))])
    heads = [line for line in text.splitlines() if line.startswith("## w1")]
    assert len(heads) == 3
    assert len(list((tmp_path / "plots").iterdir())) == 3
    assert all(f"]({path.relative_to(tmp_path)})" in text for path in (tmp_path / "plots").iterdir())


def test_the_json_has_what_the_markdown_shows(tmp_path: Path) -> None:
    written(tmp_path, a_matrix())
    (group,) = json.loads((tmp_path / "report.json").read_text())["groups"]
    row = next(row for row in group["rows"] if (row["system"], row["load"]) == ("slow", 2.0))
    figure = row["metrics"]["turns_per_second"]
    assert (figure["min"], figure["max"], figure["n"], figure["verdict"]) == (8.0, 9.7, 3, "worse")
    assert figure["ratio"][1] < figure["ratio"][0] < figure["ratio"][2] < 1
    faster = next(one for one in group["rivals"] if one["metric"] == "turns_per_second")
    assert [faster[name] for name in ("system", "against", "load", "n", "verdict")] == [
        "weft",
        "same",
        0.5,
        3,
        "better",
    ]


def test_plots_are_pictures_with_an_axis_a_figure_and_a_line_a_system(tmp_path: Path) -> None:
    written(tmp_path, a_matrix())
    (path,) = (tmp_path / "plots").iterdir()
    with Image.open(path) as picture:
        picture.verify()
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    (group,) = grouped(a_matrix())
    figure = plots.drawn(group)
    named = [axis.get_ylabel() for axis in figure.axes]
    assert named == ["turns_per_second over stock", "worst_turn_seconds_p90", "session_seconds_p95", "hit_ratio"]
    for axis in figure.axes:
        assert axis.get_xlabel()
        assert [line.get_label() for line in axis.containers] == ["stock", "same", "slow", "weft"]
    colours = {line.get_color() for line in figure.axes[0].get_lines() if line.get_marker() not in ("", "None", None)}
    assert len(colours) >= 4


def test_capacity_is_interpolated_where_the_objective_is_first_missed() -> None:
    group = open_loop(
        {
            "stock": {20: 1.0, 30: 0.9, 40: 0.96},
            "all": {20: 1.0, 30: 1.0, 40: 0.95},
            "none": {20: 0.9, 30: 0.8, 40: 0.5},
        }
    )
    assert [group.capacity(system) for system in ("stock", "all", "none")] == ["25", ">= 40", "< 20"]
    assert "slo_attainment" in [axis.get_ylabel() for axis in plots.drawn(group).axes]


def test_the_table_on_the_screen_has_a_line_a_system_and_load() -> None:
    lines = list(report.compact(grouped(a_matrix())))
    assert lines[0] == "w1, simulated, l70, 2 workers, no host tier"
    assert len(lines) == 1 + 1 + 8 + 1
    slow = next(line for line in lines if "slow" in line)
    assert "8.9 (0.81x)" in slow


def test_gains_are_changes_over_stock() -> None:
    cells = [
        done(cell("stock"), recomputed_tokens=0.0),
        done(cell("weft"), turns_per_second=1.5, recomputed_tokens=7.0),
    ]
    head, columns, line = report.gains(grouped(cells))
    assert "over stock" in head
    assert len(columns.split()) > 5
    assert line.startswith("2 workers, tier 0, load 1  weft")
    assert "+50.0%" in line
    assert "0 -> 7" in line


def test_a_directory_without_cells_is_said_to_be_empty(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(BenchError, match=r"no finished cells|no directory"):
            report.write(path)


def test_plots_without_matplotlib_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    (group,) = grouped(a_matrix())
    with pytest.raises(BenchError, match=r"pip install 'weft\[bench\]'"):
        plots.drawn(group)
