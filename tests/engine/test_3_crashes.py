"""SIGKILL, of everything there is to kill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import aiohttp
import openai
import pytest

from server.embedded import NAME
from tests.engine.conftest import Served, wait_for

SAID = [{"role": "user", "content": "Talk."}]


def nothing_is_left(served: Served) -> None:
    """Nothing runs any more: not in vLLM, not in Weft; and each worker is one process group, no more."""
    wait_for(lambda: all(engine.running() == 0 for engine in served.engines()))
    wait_for(lambda: served.metric("weft_open_steps") == 0 and served.metric("weft_running_steps") == 0)
    workers = {(worker, group) for _, group, worker, _ in served.processes()}
    assert len(workers) == 2, f"orphans: {served.processes()}"


async def stream(client: openai.AsyncOpenAI, index: int, begun: list[int], tokens: int) -> tuple[str, str]:
    """(`done` or the error, worker) of one stream, a workflow of its own that then says it has finished."""
    opened = await client.chat.completions.with_raw_response.create(
        model=NAME, messages=SAID, max_tokens=tokens, stream=True,
        extra_body={"ignore_eos": True}, extra_headers={"x-session-id": f"crash-{time.time_ns()}-{index}"},
    )  # fmt: skip
    worker, finish = opened.headers["x-weft-worker"], None
    finished = f"/workflows/{opened.headers['x-weft-workflow']}/finish"
    try:
        async for chunk in opened.parse():
            begun[index] += 1
            finish = chunk.choices[0].finish_reason or finish
    except openai.APIError as error:
        return str(error), worker
    finally:
        await client.post(finished, cast_to=object)
    return ("done" if finish == "length" else "cut short"), worker


@pytest.mark.parametrize("victim", ["server", "actor"])
async def test_killed_under_16_streams(served: Served, sdk: openai.AsyncOpenAI, victim: str) -> None:
    engine = served.engines()[0]
    begun = [0] * 16
    running = [asyncio.create_task(stream(sdk, index, begun, 1000)) for index in range(16)]
    while min(begun) < 3:
        await asyncio.sleep(0.02)
    late = [asyncio.create_task(stream(sdk, index, [0] * 16, 5)) for index in range(8)]
    early = [task.done() for task in running]
    os.kill(engine.pid if victim == "server" else actor_of(engine.pid), signal.SIGKILL)
    late += [asyncio.create_task(stream(sdk, index, [0] * 16, 5)) for index in range(8, 16)]
    ended = await asyncio.gather(*running)
    for told, worker in ended:  # on the victim: cut off with an error, or whole, where it ended before the server did
        assert told == "done" or (worker == engine.worker and "worker failed" in told), (told, worker)
    assert any("worker failed" in told for told, _ in ended), (early, ended)
    hits = [worker for (_, worker), over in zip(ended, early, strict=True) if not over]
    assert set(hits) == {"weft-embedded-0", "weft-embedded-1"}
    for told, _ in await asyncio.gather(*late):
        assert told == "done" or "worker failed" in told  # begun on the victim in the very last moment
    wait_for(lambda: engine.pid not in {e.pid for e in served.engines()})
    wait_for(lambda: served.up() == 2 and len(served.engines()) == 2, 180)
    opened = await stream(sdk, 0, [0], 3)
    assert opened == ("done", engine.worker)  # back without help, and first new workflows go to it
    nothing_is_left(served)


def actor_of(server: int) -> int:
    """The Ray actor: the parent of the supervisor, which is the parent of the server."""
    for _ in range(2):
        with open(f"/proc/{server}/stat") as stat:
            server = int(stat.read().rsplit(")", 1)[1].split()[1])
    return server


async def test_200_clients_that_leave_at_random_leave_nothing_running(served: Served) -> None:
    chance = random.Random(2)
    body = {"model": NAME, "messages": SAID, "max_tokens": 64, "ignore_eos": True}

    async def leave(http: aiohttp.ClientSession, index: int) -> None:
        try:
            async with asyncio.timeout(chance.random() * 3):
                stream = {"stream": chance.random() < 0.7}
                async with http.post(served.url + "/v1/chat/completions", json=body | stream) as answer:
                    await answer.read()
        except TimeoutError:
            pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(leave(http, index) for index in range(200)))
    nothing_is_left(served)


async def test_a_front_end_that_is_killed_comes_back_and_adopts_the_workers(
    served: Served, sdk: openai.AsyncOpenAI
) -> None:
    before = [(engine.worker, engine.pid) for engine in served.engines()]
    begun = [0]
    cut = asyncio.create_task(stream(sdk, 0, begun, 2000))
    while not begun[0]:
        await asyncio.sleep(0.02)
    served.stop(signal.SIGKILL)
    await asyncio.gather(cut, return_exceptions=True)
    wait_for(lambda: all(engine.running() == 0 for engine in served.engines()))
    began = time.monotonic()
    served.start().ready(2)
    assert time.monotonic() - began < 60
    assert [(engine.worker, engine.pid) for engine in served.engines()] == before
    assert "adopted weft-embedded-0" in served.said()
    assert (await stream(sdk, 0, [0], 3))[0] == "done"
    nothing_is_left(served)
