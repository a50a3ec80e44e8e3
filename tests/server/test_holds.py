"""A step at the gate, as its client sees it."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI

from server import relay
from tests.fake_worker import FakeWorker, chat_events
from tests.server.conftest import Start, Weft

LARGE = {"prompt_tokens": 1000}  # of the 1,600 that the worker holds


@pytest.fixture
async def full(start: Start, monkeypatch: pytest.MonkeyPatch) -> Weft:
    """One worker with room for one large workflow; how large they are is known from a first one, which is over."""
    monkeypatch.setattr(relay, "WATCH_SECONDS", 0.02)
    weft = await start(FakeWorker())
    async with weft.chat(LARGE, headers={"x-session-id": "first"}) as answer:
        assert answer.status == 200
    async with weft.http.post(weft.url + "/v1/workflows/first/finish") as answer:
        assert answer.status == 200
    return weft


def busy(weft: Weft, seconds: float = 1.0) -> asyncio.Task[int]:
    """A large workflow that runs for so long, and is then over."""

    async def run() -> int:
        async with weft.chat({**LARGE, "silence": seconds}, headers={"x-session-id": "busy"}) as answer:
            await answer.read()
        async with weft.http.post(weft.url + "/v1/workflows/busy/finish"):
            return answer.status

    return asyncio.create_task(run())


async def held(weft: Weft) -> None:
    async with asyncio.timeout(5):
        while not weft.core.scheduler.gate.held:
            await asyncio.sleep(0.01)


async def test_a_stream_that_waits_is_committed_kept_alive_and_told_where_it_went(full: Weft) -> None:
    full.core.hold_commit_seconds = 0.1
    first = busy(full)
    await asyncio.sleep(0.2)
    async with full.chat(LARGE, headers={"x-session-id": "next"}, stream=True) as answer:
        assert answer.status == 200
        assert answer.headers["x-weft-decision"].startswith("held: no room for")
        assert answer.headers["x-weft-workflow"] == "next"
        assert "x-weft-worker" not in answer.headers
        body = await answer.read()
    assert body.startswith(b": keep-alive\n\n")
    assert b": x-weft-worker: w0\n" in body
    assert b"held_seconds=" in body
    assert body.endswith(b"".join(chat_events(3, False)))
    assert await first == 200
    await full.idle()


async def test_a_short_hold_leaves_status_and_headers_exact(full: Weft) -> None:
    first = busy(full, 0.5)
    await asyncio.sleep(0.1)
    async with full.chat({"status": 400}, headers={"x-session-id": "next"}, stream=True) as answer:
        assert answer.status == 400
        assert "held" in answer.headers["x-weft-decision"]
    assert await first == 200


async def test_what_is_not_streamed_is_refused_after_a_while_and_keeps_its_place_when_it_is_sent_again(
    full: Weft,
) -> None:
    full.core.hold_unary_seconds = 0.3
    first = busy(full, 1.5)
    await asyncio.sleep(0.1)
    async with full.chat(LARGE, headers={"x-session-id": "next"}) as answer:
        assert answer.status == 503
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
        error = (await answer.json())["error"]
        assert "keeps its place" in error["message"]
    full.core.hold_unary_seconds = 5.0
    async with full.chat(LARGE, headers={"x-session-id": "next"}) as answer:
        assert answer.status == 200
        waited = float(answer.headers["x-weft-decision"].split("held_seconds=")[1].split(";")[0])
        assert waited > 1.0, "from the first time that it came"
    assert await first == 200
    await full.idle()


async def test_an_sdk_with_a_short_timeout_and_two_retries_is_served_past_capacity(full: Weft) -> None:
    first = busy(full, 60)
    await asyncio.sleep(0.1)
    tries: set[str] = set()
    async with AsyncOpenAI(base_url=full.url + "/v1", api_key="none", timeout=1.5, max_retries=2) as client:
        asked = asyncio.create_task(client.chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "hi"}], extra_body={"fake": LARGE},
            extra_headers={"x-session-id": "next"},
        ))  # fmt: skip
        async with asyncio.timeout(20):
            while len(tries) < 3 and not asked.done():
                tries |= full.core.scheduler.gate.held.keys()
                await asyncio.sleep(0.01)
        first.cancel()  # the last try finds room
        told = await asked
    assert (told.status_code, len(tries)) == (200, 3)
    waited = float(told.headers["x-weft-decision"].split("held_seconds=")[1].split(";")[0])
    assert waited > 3.0, "the age of its first try"
    await full.idle()


async def test_a_client_that_leaves_frees_its_place_at_once(full: Weft) -> None:
    first = busy(full)
    await asyncio.sleep(0.1)
    task = asyncio.create_task(full.http.post(full.url + "/v1/chat/completions", json={
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True,
    }, headers={"x-session-id": "gone"}))  # fmt: skip
    await held(full)
    task.cancel()
    async with asyncio.timeout(5):
        while full.core.scheduler.gate.held:
            await asyncio.sleep(0.01)
    assert await first == 200
    await full.idle()
    assert len(full.workers[0].received) == 2, "it never reached a worker"


async def test_a_hold_is_shown_with_its_deadline_in_the_workflow_the_workers_and_the_metrics(full: Weft) -> None:
    first = busy(full)
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(_answered(full))
    await held(full)
    async with full.http.get(full.url + "/v1/workflows/next") as answer:
        (step,) = (await answer.json())["steps"]
    assert (step["state"], step["worker"], step["held"]["worker"]) == ("held", None, "w0")
    assert step["held"]["deadline"] > step["held"]["since"]
    async with full.http.get(full.url + "/v1/workers") as answer:
        (worker,) = (await answer.json())["workers"]
    assert (worker["held_steps"], worker["capacity_tokens"]) == (1, 1600)
    assert worker["claimed_tokens"] > 900
    async with full.http.get(full.url + "/metrics") as answer:
        assert 'weft_held_steps{worker="w0"} 1.0' in await answer.text()
    assert (await waiting, await first) == (200, 200)
    async with full.http.get(full.url + "/metrics") as answer:
        assert 'weft_held_seconds_count{model="m"} 1.0' in await answer.text()


async def _answered(weft: Weft) -> int:
    async with weft.chat(LARGE, headers={"x-session-id": "next"}) as answer:
        return answer.status


async def test_anthropic_streams_are_kept_alive_with_pings(full: Weft) -> None:
    full.core.hold_commit_seconds = 0.1
    first = busy(full)
    await asyncio.sleep(0.2)
    async with full.chat(LARGE, headers={"x-session-id": "next"}, stream=True, path="/v1/messages") as answer:
        body = await answer.read()
    assert body.startswith(b"event: ping\n")
    assert b": x-weft-worker: w0\n" in body
    assert await first == 200
