from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.workloads.recorded import load
from bench.workloads.runs import common
from server.trace import Trace
from tests.server.conftest import Start, start  # noqa: F401

HEADER = {"kind": "header", "format": 1, "weft": "0", "started": 1000.0}


def step(
    name: str, arrived: float, segments: list[tuple[str, int]], after: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    told = {
        "kind": "step", "step": name, "after": list(after), "tenant": "t", "workflow": "w", "session": "s", "parent": None,
        "role": "r", "template": None, "state": "finished", "arrived": arrived, "finished": arrived + 2, "segments": segments,
        "prompt_tokens": sum(n for _, n in segments), "output_tokens": 10, "stop": "stop",
    }  # fmt: skip
    return {**told, **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (HEADER, *rows)))
    return path


A, B, C = ("a", 100), ("b", 12), ("c", 30)


def test_a_session_is_rebuilt_with_its_gaps_and_answers(tmp_path: Path) -> None:
    rows = [
        step("1", 1005, [A], stop="tool_calls"),
        step("2", 1008, [A, B, C], ("1",)),
        step("3", 1020, [A, B, C, ("d", 90)], ("2",)),
    ]
    (run,) = load(write(tmp_path / "t.jsonl", *rows)).runs
    assert [call.prompt.end for call in run.calls] == [100, 142, 232]
    assert [call.gap for call in run.calls] == [0, 1, 10]
    assert [call.after for call in run.calls] == [(), (run.calls[0],), (run.calls[1],)]
    assert [call.answer and call.answer.tokens for call in run.calls] == [12, None, None]
    assert run.calls[0].answer in run.calls[1].prompt.path()
    assert [call.tools for call in run.calls] == [("tool",), (), ()]
    assert (run.tenant, run.arrival, run.calls[0].output) == ("t", 0, 10)


def test_runs_share_the_segments_whose_hashes_are_equal_within_a_file(tmp_path: Path) -> None:
    rows = [step("1", 1005, [A, B]), step("2", 1011, [A, C], workflow="v", tenant="u")]
    write(tmp_path / "1.jsonl", *rows)
    write(tmp_path / "2.jsonl", step("1", 1012, [A, B]))
    one, two, other = load(tmp_path).runs
    assert common(one.calls[0].prompt, two.calls[0].prompt) == 100
    assert [piece.shared for piece in two.calls[0].prompt.path()] == [True, False]
    assert common(one.calls[0].prompt, other.calls[0].prompt) == 0
    assert [run.arrival for run in (one, two, other)] == [0, 6, 7]
    assert [run.tenant for run in (one, two, other)] == ["t", "u", "t"]
    names = [piece.name for run in (one, two, other) for piece in run.calls[0].prompt.path()]
    assert len(set(names)) == 5


def test_prompts_have_their_exact_lengths_where_shares_were_guessed(tmp_path: Path) -> None:
    rows = [step("1", 1005, [("a", 90), ("b", 30), ("c", 30)]), step("2", 1020, [("a", 50), ("b", 50)], session="z")]
    calls = load(write(tmp_path / "t.jsonl", *rows)).runs[0].calls
    assert [call.prompt.end for call in calls] == [150, 100]
    assert common(calls[0].prompt, calls[1].prompt) == 100


def test_joins_and_side_branches_keep_their_edges(tmp_path: Path) -> None:
    rows = [
        step("plan", 1000, [A]),
        step("left", 1003, [A, B], ("plan",), session="left", parent="s"),
        step("right", 1003.5, [A, C], ("plan",), session="right", parent="s"),
        step("join", 1010, [A, ("j", 60)], ("left", "right")),
        step("late", 1010.5, [("x", 5)], session="own"),
    ]
    calls = {call.session + str(i): call for i, call in enumerate(load(write(tmp_path / "t", *rows)).runs[0].calls)}
    assert calls["left1"].parent == "s"
    assert set(calls["s3"].after) == {calls["left1"], calls["right2"]}
    assert calls["s3"].gap == 4.5
    assert (calls["own4"].after, calls["own4"].gap) == ((), 10.5)


def test_what_followed_a_failed_step_follows_what_that_one_followed(tmp_path: Path) -> None:
    rows = [
        step("1", 1000, [A]),
        step("2", 1004, [A, B], ("1",), state="failed", prompt_tokens=0),
        step("3", 1005, [A, B], ("2",), state="cancelled"),
        step("4", 1012, [A, B, C], ("3",)),
        step("5", 1020, [("n", 5)], state="finished", prompt_tokens=0, workflow="empty"),
    ]
    found = load(write(tmp_path / "t.jsonl", *rows))
    (run,) = found.runs
    assert found.left_out == {"step failed": 1, "step cancelled": 1, "step no prompt": 1}
    assert run.calls[1].after == (run.calls[0],)
    assert run.calls[1].gap == 10


def test_a_step_waits_only_for_what_had_ended_when_it_came(tmp_path: Path) -> None:
    rows = [
        step("1", 1000, [A]),
        step("fast", 1003, [A, B], ("1",), session="f"),
        step("slow", 1003, [A, C], ("1",), session="z", finished=1050.0),
        step("4", 1006, [A, ("e", 9)], ("fast", "slow")),
        step("5", 1006.5, [A, ("e", 9), C], ("slow",), session="other"),
    ]
    calls = load(write(tmp_path / "t.jsonl", *rows)).runs[0].calls
    assert calls[3].after == (calls[1],)
    assert calls[4].after == (calls[2],)
    assert calls[4].gap == 0


def test_a_session_whose_edges_are_lost_keeps_its_order(tmp_path: Path) -> None:
    rows = [step("1", 1000, [A]), step("2", 1004, [A, B], ("unknown",))]
    calls = load(write(tmp_path / "t.jsonl", *rows)).runs[0].calls
    assert calls[1].after == (calls[0],)


def test_a_truncated_last_line_is_passed_over_and_any_other_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", step("1", 1000, [A]), step("2", 1004, [A, B], ("1",)))
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert [len(run.calls) for run in load(path).runs] == [1]
    path.write_text(whole.replace('"kind": "step"', '"kind" "step"', 1))
    with pytest.raises(ValueError, match=r"t\.jsonl: line 2: not JSON"):
        load(path)


@pytest.mark.parametrize("change", [{"after": None}, {"segments": 3}, {"arrived": "x"}, {"prompt_tokens": "x"}])
def test_a_line_that_is_no_step_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "t.jsonl", step("1", 1000, [A]), {**step("2", 1004, [A]), **change})
    with pytest.raises(ValueError, match=r"t\.jsonl: line 3: not a line of a trace"):
        load(path)


def test_a_file_without_the_header_or_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(step("1", 1, [A])) + "\n")
    with pytest.raises(ValueError, match=r"line 1: .*no header"):
        load(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text(json.dumps({**HEADER, "format": 2}) + "\n")
    with pytest.raises(ValueError, match="format 2 is not known"):
        load(tmp_path / "t.jsonl")


def test_lengths_are_scaled_and_long_runs_left_out(tmp_path: Path) -> None:
    rows = [step("1", 1000, [A]), step("2", 1004, [("x", 400)], workflow="v")]
    found = load(write(tmp_path / "t.jsonl", *rows), scale=10, max_context=30)
    assert [call.prompt.end for run in found.runs for call in run.calls] == [10]
    assert found.left_out == {"longer than max_context": 1}


async def test_what_weft_records_is_read_back(start: Start, tmp_path: Path) -> None:  # noqa: F811
    trace = Trace(tmp_path)
    weft = await start(trace=trace)
    for session in ("one", "two"):
        messages = [{"role": "system", "content": "same " * 20}]
        for turn in range(3):
            messages = [*messages, {"role": "user", "content": f"{session} asks {turn} " * 5}]
            async with weft.chat(messages=messages, headers={"x-session-id": session}) as answer:
                told = await answer.json()
            messages = [*messages, told["choices"][0]["message"]]
    await weft.idle()
    trace.close()
    rows = [json.loads(line) for line in trace.path.read_text().splitlines()[1:]]
    runs = load(tmp_path).runs
    assert [len(run.calls) for run in runs] == [3, 3]
    assert sorted(call.prompt.end for run in runs for call in run.calls) == sorted(r["prompt_tokens"] for r in rows)
    for run in runs:
        assert [len(call.after) for call in run.calls] == [0, 1, 1]
        assert [common(a.prompt, b.prompt) for a, b in zip(run.calls, run.calls[1:], strict=False)] == [
            call.prompt.end for call in run.calls[:-1]
        ]
    first, second = (run.calls[0].prompt for run in runs)
    assert common(first, second) == first.path()[0].end > 0
