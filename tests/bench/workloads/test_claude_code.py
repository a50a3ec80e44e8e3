from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bench.workloads.claude_code import load
from bench.workloads.runs import common


def request(t: float, tokens: int, ids: list[int], output: int = 100, **more: Any) -> dict[str, Any]:
    told = {"t": t, "type": "n", "in": tokens, "out": output, "hash_ids": ids, "stop": "tool_use", "api_time": 5.0}
    return {**told, "think_time": 2.0, **more}


def session(*requests: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "x", "tool_tokens": 0, "system_tokens": 0, "requests": list(requests), **more}


def blocks(upto: int, start: int = 1) -> list[int]:
    return list(range(start, start + upto))


def growing(last: int = 700) -> dict[str, Any]:
    return session(request(0, 200, blocks(3)), request(7, 500, blocks(7)), request(14, last, blocks(last // 64)))


def write(folder: Path, **sessions: dict[str, Any]) -> Path:
    for name, document in sessions.items():
        (folder / f"trace_{name.strip('_')}.json").write_text(json.dumps(document))
    return folder


def test_a_session_is_one_growing_prompt(tmp_path: Path) -> None:
    document = growing()
    document["requests"][2] |= {"think_time": 4000, "stop": "end_turn"}
    (run,) = load(write(tmp_path, _0002=document)).runs
    assert [call.prompt.end for call in run.calls] == [200, 500, 700]
    assert [call.gap for call in run.calls] == [0, 2, 300]
    assert [call.tools for call in run.calls] == [("tool",), ("tool",), ()]
    assert [common(a.prompt, b.prompt) for a, b in zip(run.calls, run.calls[1:], strict=False)] == [200, 500]
    answers = [call.answer for call in run.calls]
    assert [answer and (answer.start, answer.end) for answer in answers] == [(200, 300), (500, 600), None]
    assert [call.after for call in run.calls] == [(), (run.calls[0],), (run.calls[1],)]


def test_a_prompt_that_does_not_extend_the_last_one_leaves_no_answer(tmp_path: Path) -> None:
    document = session(request(0, 640, blocks(10)), request(9, 640, [*blocks(4), *blocks(6, 50)]))
    (run,) = load(write(tmp_path, _0002=document)).runs
    assert run.calls[0].answer is None
    assert common(run.calls[0].prompt, run.calls[1].prompt) == 256


def test_a_short_continuation_keeps_that_much_of_the_answer(tmp_path: Path) -> None:
    document = session(request(0, 200, blocks(3), 500), request(9, 300, blocks(4)))
    (run,) = load(write(tmp_path, _0002=document)).runs
    assert run.calls[0].answer is not None
    assert (run.calls[0].answer.tokens, run.calls[0].output) == (100, 500)


def test_the_system_prompt_is_said_by_the_system(tmp_path: Path) -> None:
    (run,) = load(write(tmp_path, _0002={**growing(), "tool_tokens": 80, "system_tokens": 40})).runs
    assert [(piece.speaker, piece.tokens) for piece in run.calls[0].prompt.path()] == [("system", 120), ("user", 80)]


def agent(ended: float, seconds: float, start: int) -> dict[str, Any]:
    calls = [request(0, 200, blocks(3, start)), request(8, 400, blocks(6, start))]
    told = {"t": ended, "type": "subagent", "subagent_type": "Explore", "duration_ms": seconds * 1000}
    return {**told, "requests": calls}


def with_agents() -> dict[str, Any]:
    """Both begin when the second main call has ended, at 12 s; the third main call comes 3 s after the last."""
    first, second, third = growing()["requests"]
    third |= {"t": 65.0, "think_time": 53.0}
    return session(first, second, agent(32.0, 20, 500), agent(62.0, 49, 600), third)


def test_sub_agents_are_sessions_that_the_main_one_waits_for(tmp_path: Path) -> None:
    (run,) = load(write(tmp_path, _0002=with_agents())).runs
    by = {name: [c for c in run.calls if c.session == name] for name in ("main", "Explore-1", "Explore-2")}
    assert [call.parent for call in run.calls if call.session != "main"] == ["main"] * 4
    for name, gap in (("Explore-1", 0.0), ("Explore-2", 1.0)):
        assert by[name][0].after == (by["main"][1],)
        assert by[name][0].gap == gap
        assert by[name][1].after == (by[name][0],)
    assert set(by["main"][2].after) == {by["main"][1], by["Explore-1"][1], by["Explore-2"][1]}
    assert by["main"][2].gap == 3.0
    place = {call: i for i, call in enumerate(run.calls)}
    assert all(place[one] < place[call] for call in run.calls for one in call.after)


def test_without_sub_agents_the_gap_is_the_think_time(tmp_path: Path) -> None:
    (run,) = load(write(tmp_path, _0002=with_agents()), subagents=False).runs
    assert [(call.session, call.gap) for call in run.calls] == [("main", 0), ("main", 2), ("main", 53)]


def test_what_is_left_out_is_counted_and_copies_go_wherever_they_are(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        _0002=growing(),
        _0004=session(request(0, 200, blocks(3))),
        _0006=growing(6400),
        _0008=growing(),
        _0010=growing(800),
        _0012=growing(),
    )
    found = load(folder, max_context=3200)
    assert [run.id for run in found.runs] == ["trace_0002", "trace_0010"]
    assert found.left_out == {"fewer than 2 calls": 1, "longer than max_context": 1, "duplicate": 2}
    report, tune = load(folder, half="report"), load(folder, half="tune")
    assert [run.id for run in report.runs] == ["trace_0002", "trace_0006", "trace_0010"]
    assert [run.id for run in tune.runs] == []
    assert tune.left_out == {"other half": 3, "fewer than 2 calls": 1, "duplicate": 2}
    with pytest.raises(ValueError, match="none of tune, report"):
        load(folder, half="third")


def test_lengths_are_divided_by_the_scale(tmp_path: Path) -> None:
    folder = write(tmp_path, _0002=growing())
    (run,) = load(folder, scale=10, max_context=70).runs
    assert [(call.prompt.end, call.output) for call in run.calls] == [(20, 10), (50, 10), (70, 10)]
    assert run.calls[0].answer is not None
    assert run.calls[0].answer.tokens == 10
    assert load(folder, scale=10, max_context=69).left_out == {"longer than max_context": 1}


def test_an_archive_is_read_like_a_directory(tmp_path: Path) -> None:
    write(tmp_path, _0002=growing(), _0004=growing(900))
    with tarfile.open(tmp_path / "all.tar.xz", "w:xz") as archive:
        for file in sorted(tmp_path.glob("*.json"), reverse=True):
            archive.add(file, f"sessions/{file.name}")
    assert [run.id for run in load(tmp_path / "all.tar.xz").runs] == ["trace_0002", "trace_0004"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ('{"id": "x"}', "not a Claude Code session"),
     ('{"requests": [{"type": "n"}]}', None), ('{"requests": [3]}', "not a Claude Code session")],
)  # fmt: skip
def test_a_file_that_is_no_session_is_named(tmp_path: Path, text: str, reason: str | None) -> None:
    (tmp_path / "trace_0002.json").write_text(text)
    if reason is None:
        assert load(tmp_path).left_out == {"fewer than 2 calls": 1}
    else:
        with pytest.raises(ValueError, match=f"trace_0002.json: {reason}"):
            load(tmp_path)
