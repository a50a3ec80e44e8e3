from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.workloads.catalog import NAMES, TRACES, load
from tests.bench.test_sessions import write as write_texts
from tests.bench.workloads import test_claude_code, test_mini_swe_agent, test_mooncake, test_recorded


@pytest.fixture
def traces(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "sessions"
    folder.mkdir()
    texts = {name: test_mini_swe_agent.grown(name, 6) for name in "ab"}
    return {
        "claude-code": test_claude_code.write(folder, _0002=test_claude_code.growing()),
        "mooncake": test_mooncake.write(tmp_path / "mooncake.jsonl"),
        "recorded": test_recorded.write(tmp_path / "weft.jsonl", test_recorded.step("1", 1, [("a", 500)])),
        "mini-swe-agent": write_texts(tmp_path / "texts.tar.xz", texts),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_workload_is_had_by_its_name_at_any_scale(name: str, traces: dict[str, Path]) -> None:
    one = load(name, traces.get(name), 1)
    assert one.name == name
    assert len({run.id for run in one.runs}) == len(one.runs)
    assert load(name, traces.get(name), 1, scale=5).mean_context < one.mean_context / 2


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_longer_than_the_limit(name: str, traces: dict[str, Path]) -> None:
    if name in ("recorded", "claude-code"):
        with pytest.raises(ValueError, match=r"no run in it can be played; left out: .*longer than max_context"):
            load(name, traces[name], 1, max_context=100)
        return
    lengths = sorted(max(call.prompt.end for call in run.calls) for run in load(name, traces.get(name), 1).runs)
    limit = lengths[len(lengths) // 2] - (name == "mini-swe-agent")
    found = load(name, traces.get(name), 1, max_context=limit)
    assert max(call.prompt.end for run in found.runs for call in run.calls) <= limit
    if name not in ("w1", "w2"):
        assert len(found.runs) + sum(found.left_out.values()) >= len(lengths)


def test_names_that_are_not_known_are_told_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"no workload is called 'w9'; known are mini-swe-agent, .*w8, react, .*rollouts"
    ):
        load("w9")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "w4",
            {"mispredicted": 0.1},
            "w4 has no option 'mispredicted'; it has runs, misprediction, again, fixed, output",
        ),
        ("react", {"scale_": 1}, "react has no option 'scale_'; it has runs"),
        ("mooncake", {"path": 1}, "mooncake has no option 'path'; it has speed"),
        ("recorded", {"x": 1}, "recorded has no option 'x'; it has none"),
        ("w6", {"path": 1}, "w6 has no option 'path'; it has runs"),
        ("w1", {"stages": 1.5}, "w1: stages=1.5 is no int"),
        ("w8", {"light": True}, "w8: light=True is no int"),
        ("w3", {"runs": 0}, "w3: with these options it has no run"),
    ],
)
def test_options_that_a_workload_does_not_have_are_told_with_those_that_it_has(
    name: str, options: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        load(name, **options)


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a trace"):
        load(name)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        load(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", TRACES)
def test_a_file_of_something_else_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a trace\n")
    with pytest.raises(ValueError, match=r"notes\.txt: (cannot be read|line 1: not JSON)"):
        load(name, tmp_path / "notes.txt")


def test_only_claude_code_has_halves_and_lengths_are_not_divided_by_nothing(traces: dict[str, Path]) -> None:
    assert load("claude-code", traces["claude-code"], 1, half="report").runs
    with pytest.raises(ValueError, match="no run in it can be played"):
        load("claude-code", traces["claude-code"], 1, half="tune")
    with pytest.raises(ValueError, match="half: w1 has no halves"):
        load("w1", half="tune")
    with pytest.raises(ValueError, match="scale: 0 is not above 0"):
        load("w1", scale=0)
