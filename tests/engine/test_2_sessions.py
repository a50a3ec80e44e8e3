"""The main job in small: growing sessions over two workers keep their worker and find their prefix there."""

from __future__ import annotations

import asyncio
import itertools
import json

import openai

from server.embedded import NAME
from tests.engine.conftest import Served

BLOCK = 32


async def session(client: openai.AsyncOpenAI, name: str, turns: int) -> list[tuple[str, int, int]]:
    """Each turn's (worker, prompt tokens, cached tokens); each prompt extends the one before."""
    messages = [{"role": "user", "content": f"Task of {name}: " + "read the file and mend it. " * 40}]
    seen = []
    for turn in range(turns):
        raw = await client.chat.completions.with_raw_response.create(
            model=NAME, messages=messages, max_tokens=8, temperature=0, extra_headers={"x-session-id": name}
        )
        done = raw.parse()
        details = done.usage.prompt_tokens_details
        seen.append((raw.headers["x-weft-worker"], done.usage.prompt_tokens, details.cached_tokens or 0))
        messages += [
            {"role": "assistant", "content": done.choices[0].message.content},
            {"role": "user", "content": f"Result {turn}: " + "line of output\n" * 20},
        ]
    return seen


async def test_sessions_keep_their_worker_and_hit_what_they_left_there(served: Served, sdk: openai.AsyncOpenAI) -> None:
    names = [f"growing-{index}" for index in range(8)]
    runs = await asyncio.gather(*(session(sdk, name, 4) for name in names))
    for run in runs:
        assert len({worker for worker, _, _ in run}) == 1
        for (_, before, _), (_, _, cached) in itertools.pairwise(run):
            # All full blocks of the prompt before; the chat template ends a prompt with what an answer replaces.
            assert cached >= (before // BLOCK - 1) * BLOCK
    homes = [run[0][0] for run in runs]
    assert sorted(homes.count(worker) for worker in set(homes)) == [4, 4]


def test_the_run_graph_and_the_trace_show_them(served: Served) -> None:
    told = served.get("/v1/workflows/growing-0")
    assert [step["decision"].split(";")[0] for step in told["steps"]] == ["fewest-live"] + ["continues"] * 3
    assert [bool(step["after"]) for step in told["steps"]] == [False, True, True, True]
    lines = [json.loads(line) for file in (served.home / "trace").iterdir() for line in file.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step" and line["decision"] == "continues"]
    assert len(steps) >= 24
    answered = [step for step in steps if step["state"] == "finished"]
    assert all(sum(n for _, n in step["segments"]) == step["prompt_tokens"] for step in answered)
    assert "mend it" not in json.dumps(lines)


def test_one_structured_line_is_logged_per_step(served: Served) -> None:
    lines = [json.loads(line) for line in served.out.with_suffix(".err").read_text().splitlines() if line[:1] == "{"]
    steps = [line for line in lines if line["event"] == "step" and line["workflow"] == "growing-1"]
    assert len(steps) == 4
    assert all(line["state"] == "finished" and line["ttft_ms"] > 0 for line in steps)
