from __future__ import annotations

from pathlib import Path

import pytest

from bench.workloads import mini_swe_agent
from bench.workloads.mini_swe_agent import load
from bench.workloads.runs import common
from tests.bench.test_sessions import write

OPENING = "You are an agent.\nSolve"


def grown(task: str, turns: int) -> list[str]:
    return [f"{OPENING} {task * 60}" + "".join(f"[{n}]" + "o" * 87 for n in range(k)) for k in range(turns)]


def test_tasks_answers_and_observations_take_turns_after_a_shared_opening(tmp_path: Path) -> None:
    runs = load(write(tmp_path / "t.tar.xz", {"a": grown("x", 5), "b": grown("y", 4)}), 1).runs
    assert [run.id for run in runs] == ["a", "b"]
    system = runs[0].calls[0].prompt.path()[0]
    assert (system.text, system.shared, system.speaker) == ("You are an agent.\n", True, "system")
    assert runs[1].calls[0].prompt.path()[0] is system
    last = runs[0].calls[-1].prompt.path()
    assert [piece.speaker for piece in last] == ["system", "user", *["assistant", "user"] * 4]
    assert last[3].text == ("[0]" + "o" * 87)[:30]
    assert last[2].text == "o"
    assert all(piece.text is not None and piece.tokens == -(-len(piece.text) // 3) for piece in last)
    for one, two in zip(runs[0].calls, runs[0].calls[1:], strict=False):
        assert common(one.prompt, two.prompt) == one.prompt.end
        assert two.after == (one,)
        assert 0 < two.gap <= mini_swe_agent.LONGEST_GAP
    assert all(call.answer is None for run in runs for call in run.calls)


def test_answers_are_generated_where_it_is_asked_for(tmp_path: Path) -> None:
    (run, _) = load(write(tmp_path / "t.tar.xz", {"a": grown("x", 5), "b": grown("y", 4)}), 1, answers=True).runs
    for one, two in zip(run.calls, run.calls[1:], strict=False):
        assert one.answer in two.prompt.path()
        assert one.answer is not None
        assert one.output == one.answer.tokens
    assert run.calls[-1].answer is None


def test_calls_are_taken_evenly_and_sessions_end_at_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar.xz", {"a": grown("x", 21), "b": grown("y", 3)})
    whole = load(path, 1, calls=100)
    assert [len(run.calls) for run in whole.runs] == [21]
    assert whole.left_out == {"sessions of fewer than 4 calls": 1}
    few = load(path, 1, calls=5)
    ends = [call.prompt.end for call in whole.runs[0].calls]
    assert [call.prompt.end for call in few.runs[0].calls] == ends[::5]
    short = load(path, 1, calls=100, max_context=ends[9])
    assert [call.prompt.end for call in short.runs[0].calls] == ends[:10]
    assert short.left_out["calls above max_context"] == 11


def test_the_seed_decides_the_gaps(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar.xz", {"a": grown("x", 9), "b": grown("y", 9)})
    one, same, other = ([c.gap for run in load(path, seed).runs for c in run.calls] for seed in (1, 1, 2))
    assert one == same != other


def test_so_many_characters_count_as_a_token(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tar.xz", {"a": grown("x", 5), "b": grown("y", 5)})
    (one, _), (two, _) = load(path, 1).runs, load(path, 1, characters=1.5).runs
    assert [c.prompt.end for c in two.calls] == pytest.approx([2 * c.prompt.end for c in one.calls], abs=12)


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.tar.xz").write_text("no")
    with pytest.raises(ValueError, match=r"t\.tar\.xz: cannot be read"):
        load(tmp_path / "t.tar.xz", 1)
