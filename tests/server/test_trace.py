from __future__ import annotations

import json
from pathlib import Path

from server.trace import Trace
from tests.server.conftest import Start, Weft


async def turns(weft: Weft, prompts: list[list[str]], session: str) -> None:
    for prompt in prompts:
        messages = [{"role": "user", "content": text} for text in prompt]
        async with weft.chat(messages=messages, headers={"x-session-id": session}) as answer:
            await answer.read()


async def test_the_trace_holds_shape_and_counts_but_no_text(start: Start, tmp_path: Path) -> None:
    trace = Trace(tmp_path)
    weft = await start(trace=trace)
    await turns(weft, [["SECRET one"], ["SECRET one", "SECRET two"]], "SECRET-session")
    await weft.idle()
    text = trace.path.read_text()
    assert "SECRET" not in text
    assert "tok0" not in text
    header, first, second = map(json.loads, text.splitlines())
    assert header["kind"] == "header"
    assert first["segments"][0][0] == second["segments"][0][0]
    assert first["session"] == second["session"]
    assert second["after"] == [first["step"]]
    assert second["gap_seconds"] >= 0
    assert first["gap_seconds"] is None
    assert (second["prompt_tokens"], second["cached_tokens"], second["decision"]) == (20, 16, "continues")


async def test_a_prompts_segments_add_up_to_its_tokens(start: Start, tmp_path: Path) -> None:
    trace = Trace(tmp_path)
    weft = await start(trace=trace)
    await turns(weft, [["a" * 100], ["a" * 100, "b", "c" * 50], ["other"]], "s")
    await weft.idle()
    for line in trace.path.read_text().splitlines()[1:]:
        step = json.loads(line)
        assert sum(tokens for _, tokens in step["segments"]) == step["prompt_tokens"]


async def test_equal_prompts_look_different_in_different_files(start: Start, tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "two"):
        trace = Trace(tmp_path / name)
        weft = await start(trace=trace)
        await turns(weft, [["same"]], "s")
        await weft.idle()
        step = json.loads(trace.path.read_text().splitlines()[1])
        hashes |= {step["segments"][0][0], step["session"]}
    assert len(hashes) == 4


async def test_a_large_file_is_followed_by_another(start: Start, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("server.trace.LARGEST_FILE", 500)
    weft = await start(trace=Trace(tmp_path))
    await turns(weft, [["x"]] * 4, "s")
    await weft.idle()
    assert len(list(tmp_path.iterdir())) > 1
