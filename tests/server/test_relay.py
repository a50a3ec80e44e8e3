from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import pytest
from aiohttp import web

from scheduler.events import Event
from server import probe, relay
from server.dialects import Chat
from tests.fake_worker import COMMENT, FakeWorker, chat_events
from tests.server.conftest import Start, Weft


async def test_a_stream_comes_back_byte_for_byte(weft: Weft) -> None:
    async with weft.chat(stream=True, stream_options={"include_usage": True}) as answer:
        assert answer.status == 200
        assert answer.headers["x-from"] == "fake"
        assert await answer.read() == b"".join(chat_events(3, True))


async def test_usage_is_learned_but_not_shown_to_a_client_that_did_not_ask(weft: Weft) -> None:
    async with weft.chat(stream=True, headers={"x-session-id": "s"}) as answer:
        assert await answer.read() == b"".join(chat_events(3, False))
    sent = weft.workers[0].received[0].fields
    assert sent["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}
    await weft.idle()
    step = weft.core.scheduler.graph.get("default", "s").steps[0]  # type: ignore[union-attr]
    assert (step.usage.prompt, step.usage.cached, step.usage.output, step.stop) == (20, 16, 3, "stop")
    assert step.first_token is not None


async def test_the_body_reaches_the_worker_unchanged_unless_something_must_be(weft: Weft) -> None:
    raw = b'{ "model":"m",  "messages":[{"role":"user","content":"\\u00e9"}], "unknown": 1.50 }'
    headers = {"content-type": "application/json"}
    async with weft.http.post(weft.url + "/v1/chat/completions", data=raw, headers=headers) as answer:
        assert (await answer.json())["choices"]
    assert weft.workers[0].received[0].body == raw


async def test_responses_say_where_the_step_went_and_why(weft: Weft) -> None:
    async with weft.chat(headers={"x-session-id": "s", "x-request-id": "mine"}) as answer:
        said = {name: answer.headers[name] for name in ("x-weft-workflow", "x-weft-session", "x-weft-worker")}
        assert said == {"x-weft-workflow": "s", "x-weft-session": "s", "x-weft-worker": "w0"}
        assert answer.headers["x-weft-decision"].startswith("fewest-live")
        assert answer.headers["x-request-id"] == "mine"


async def test_fields_that_steer_the_engine_are_dropped_and_the_owner_is_ours(weft: Weft) -> None:
    steering = {"session_id": "evil", "priority": -9, "request_id": "r", "kv_transfer_params": {}}
    headers = {"x-session-id": "s", "x-vllm-priority": "-9", "x-data-parallel-rank": "1", "x-request-id": "theirs"}
    xargs = {"session_id": "evil", "kv_transfer_params": "x", "mine": 1, "agentic_context": {"program_id": "p"}}
    async with weft.chat(headers=headers, vllm_xargs=xargs, kept={"a": 1}, **steering) as answer:
        assert answer.headers["x-weft-workflow"] == "p"
    seen = weft.workers[0].received[0]
    assert not steering.keys() & seen.fields.keys()
    assert seen.fields["vllm_xargs"] == {"mine": 1}
    assert seen.fields["kept"] == {"a": 1}
    assert seen.headers["x-session-id"] not in ("s", "evil", "p")
    assert not {"x-vllm-priority", "x-data-parallel-rank", "authorization"} & seen.headers.keys()
    assert seen.headers["x-request-id"] != "theirs"


async def test_the_workers_own_errors_come_back_unmodified(weft: Weft) -> None:
    for stream in (False, True):
        async with weft.chat({"status": 400}, stream=stream) as answer:
            assert answer.status == 400
            assert answer.headers["x-should-retry"] == "false"
            assert (await answer.json())["error"]["message"] == "as told"
    await weft.idle()


async def test_a_step_whose_worker_dies_before_its_first_event_finishes_elsewhere(weft: Weft) -> None:
    weft.workers[0].healthy = True
    async with weft.chat({"die_after": 0}, stream=True, headers={"x-session-id": "s"}) as answer:
        # Both fakes die on this body: the step was tried once on each, then refused.
        assert answer.status == 502
    assert [len(worker.received) for worker in weft.workers] == [1, 1]
    await weft.idle()


async def test_a_worker_that_is_gone_is_skipped_at_once(weft: Weft) -> None:
    await weft.workers[0].stop()
    async with weft.chat(stream=True) as answer:
        assert answer.status == 200
        assert answer.headers["x-weft-worker"] == "w1"
        assert b"[DONE]" in await answer.read()
    await weft.idle()


async def test_a_stream_that_had_begun_ends_with_the_apis_error(weft: Weft) -> None:
    async with weft.chat({"die_after": 2}, stream=True) as answer:
        events = (await answer.read()).decode().strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 502
    assert events[-1] == "data: [DONE]"
    assert sum(len(worker.received) for worker in weft.workers) == 1
    await weft.idle()


async def test_a_message_stream_that_had_begun_ends_with_anthropics_error(weft: Weft) -> None:
    async with weft.chat({"die_after": 2}, stream=True, path="/v1/messages") as answer:
        last = (await answer.read()).decode().strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["type"] == "error"


async def test_a_server_error_of_a_dying_worker_is_retried_and_of_a_living_one_is_not(weft: Weft) -> None:
    async with weft.chat({"status": 500}) as answer:
        assert answer.status == 500
    assert sum(len(worker.received) for worker in weft.workers) == 1
    weft.workers[0].healthy = weft.workers[1].healthy = False
    async with weft.chat({"status": 500}) as answer:
        assert answer.status in (502, 503)


async def test_a_lost_worker_is_marked_down_and_comes_back_without_its_sessions(weft: Weft) -> None:
    worker = weft.workers[0]
    async with weft.chat(headers={"x-session-id": "s"}) as answer:
        assert answer.headers["x-weft-worker"] == "w0"
    await worker.stop()
    async with asyncio.timeout(5):
        while "w0" in weft.core.endpoints:
            await asyncio.sleep(0.01)
    async with weft.chat(headers={"x-session-id": "s"}) as answer:
        assert answer.headers["x-weft-decision"].startswith("moved")
    await worker.start(worker.port)
    async with asyncio.timeout(5):
        while "w0" not in weft.core.endpoints:
            await asyncio.sleep(0.01)
    async with weft.chat(headers={"x-session-id": "new"}) as answer:
        assert answer.headers["x-weft-worker"] == "w0"


async def test_a_worker_that_hangs_is_given_up_and_its_steps_go_on(weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TIMEOUT", aiohttp.ClientTimeout(total=0.05))
    hanging = asyncio.create_task(_read(weft.chat({"silence": 30}, headers={"x-session-id": "s"})))
    while not weft.workers[0].received:
        await asyncio.sleep(0.01)
    weft.workers[0].hung = True
    async with asyncio.timeout(5):
        while not weft.workers[1].received:
            await asyncio.sleep(0.01)
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    await weft.idle()


async def _read(call) -> bytes:
    async with call as answer:
        return await answer.read()


async def test_clients_that_leave_at_random_leave_nothing_behind(weft: Weft) -> None:
    chance = random.Random(7)

    async def leave(index: int) -> None:
        told = {"chunks": 20, "delay": 0.02, "silence": chance.random() * 0.1}
        try:
            async with asyncio.timeout(chance.random() * 0.5):
                await _read(weft.chat(told, stream=chance.random() < 0.7, headers={"x-session-id": f"s{index % 9}"}))
        except TimeoutError:
            pass

    for first in range(0, 200, 40):  # all at once, a slow machine would reach no worker in time
        await asyncio.gather(*(leave(index) for index in range(first, first + 40)))
    await weft.idle(5)
    assert any(worker.cancelled for worker in weft.workers)


async def test_a_silent_stream_is_kept_alive_and_a_late_error_comes_in_the_stream(
    weft: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "WATCH_SECONDS", 0.02)
    weft.core.hold_commit_seconds = 0.05
    monkeypatch.setattr(relay, "KEEP_ALIVE_SECONDS", 0.05)
    async with weft.chat({"silence": 0.4}, stream=True) as answer:
        body = await answer.read()
    assert body.count(b": keep-alive\n\n") >= 2
    assert body.endswith(b"".join(chat_events(3, False)))
    async with weft.chat({"silence": 0.2, "status": 400}, stream=True, path="/v1/messages") as answer:
        assert answer.status == 200
        body = await answer.read()
    assert b"event: ping" in body
    assert b'"message":"as told"' in body.split(b"event: error")[1]
    await weft.idle()


async def test_before_it_commits_a_silent_stream_keeps_its_status_exact(weft: Weft) -> None:
    async with weft.chat({"silence": 0.3, "status": 400}, stream=True) as answer:
        assert answer.status == 400


async def test_a_workers_comments_pass_and_do_not_count_as_its_answer(weft: Weft) -> None:
    async with weft.chat({"comment": 0}, stream=True) as answer:
        assert await answer.read() == COMMENT + b"".join(chat_events(3, False))


async def test_an_event_behind_a_comment_counts_as_begun(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_write(self: FakeWorker, request: web.Request, fields: dict, told: dict) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(COMMENT + chat_events(3, False)[0])
        await asyncio.sleep(0.1)
        request.transport.abort()  # type: ignore[union-attr]
        return response

    monkeypatch.setattr(FakeWorker, "_stream", one_write)
    weft = await start()
    async with weft.chat(stream=True) as answer:
        body = await answer.read()
    assert sum(len(worker.received) for worker in weft.workers) == 1
    assert b'"code":502' in body


async def test_the_last_word_of_a_dying_engine_is_no_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FakeWorker._stream

    async def dies(self: FakeWorker, request: web.Request, fields: dict, told: dict) -> web.StreamResponse:
        if self is not weft.workers[0]:
            return await plain(self, request, fields, told)
        self.healthy = False
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\ndata: [DONE]\n\n')
        return response

    monkeypatch.setattr(FakeWorker, "_stream", dies)
    weft = await start()
    async with weft.chat(stream=True, headers={"x-session-id": "s"}) as answer:
        assert await answer.read() == b"".join(chat_events(3, False))
        assert answer.headers["x-weft-worker"] == "w1"
    assert [len(worker.received) for worker in weft.workers] == [1, 1]
    await weft.idle()
    workflow = weft.core.scheduler.graph.get("default", "s")
    assert workflow
    assert workflow.steps[0].state == "finished"


async def test_steering_fields_of_an_upload_are_refused(weft: Weft) -> None:
    form = aiohttp.FormData()
    form.add_field("vllm_xargs", "{}")
    form.add_field("file", b"x", filename="a.wav")
    async with weft.http.post(weft.url + "/v1/audio/transcriptions", data=form) as answer:
        assert answer.status == 400


async def test_what_fails_to_watch_or_to_learn_costs_the_client_nothing(
    weft: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Chat, "read_event", broken)
    seen: list[object] = []
    weft.core.watchers[:] = [broken, seen.append]
    async with weft.chat(stream=True, stream_options={"include_usage": True}) as answer:
        assert await answer.read() == b"".join(chat_events(3, True))
    await weft.idle()
    assert seen
    assert weft.core.failures > 1


async def test_a_step_that_kills_workers_is_given_to_two_at_most_even_if_the_core_fails(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    weft = await start(*(FakeWorker() for _ in range(4)))
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(weft.core.scheduler, "handle", lambda *_: 1 / 0)
        async with weft.chat({"die_after": 0}, stream=True) as answer:
            assert answer.status in (502, 503)
        assert sum(len(worker.received) for worker in weft.workers) == 2
        for worker in weft.workers:
            worker.received.clear()


async def test_a_client_that_leaves_a_passed_on_request_ends_it_at_the_worker(weft: Weft) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await _read(weft.chat({"silence": 30}, path="/v1/embeddings"))
    await weft.idle()
    assert sum(worker.cancelled for worker in weft.workers) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/embeddings", "/v1/responses/render"])
async def test_steering_fields_are_dropped_on_every_json_route(weft: Weft, path: str) -> None:
    async with weft.chat(path=path, priority=-5, request_id="r", ec_transfer_params={}):
        pass
    (seen,) = [r.fields for worker in weft.workers for r in worker.received]
    assert not {"priority", "request_id", "ec_transfer_params"} & seen.keys()


async def test_a_client_that_reads_nothing_is_cut_off(weft: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(relay, "SLOW_READER_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(weft.url.rsplit(":", 1)[1]), limit=1024)
    body = json.dumps({"model": "m", "messages": [], "stream": True, "fake": {"chunks": 200_000}}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body)
    await reader.read(100)  # and not a byte more
    await weft.idle(20)
    writer.close()
    assert sum(worker.cancelled for worker in weft.workers) == 1


async def test_if_the_core_fails_steps_are_still_served_and_counted(
    weft: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(event: Event, now: float) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(weft.core.scheduler, "handle", broken)
    workers = set()
    for _ in range(3):
        async with weft.chat({"delay": 0.05}, stream=True) as one, weft.chat({"delay": 0.05}, stream=True) as two:
            assert (one.status, two.status) == (200, 200)
            assert one.headers["x-weft-decision"].startswith("core-failed")
            workers |= {one.headers["x-weft-worker"], two.headers["x-weft-worker"]}
            await one.read()
            await two.read()
    assert workers == {"w0", "w1"}
    assert weft.core.failures > 6
    assert not weft.core.attempts
    assert not any(weft.core.in_flight.values())


async def test_two_models_behind_one_endpoint_share_a_workflow(start: Start) -> None:
    weft = await start(FakeWorker("big"), FakeWorker("small", adapters=("small-lora",)))
    for model, worker in (("big", "w0"), ("small", "w1"), ("small-lora", "w1")):
        async with weft.chat(model=model, headers={"x-session-id": "s"}) as answer:
            assert answer.headers["x-weft-worker"] == worker
    async with weft.http.get(weft.url + "/v1/models") as answer:
        assert [card["id"] for card in (await answer.json())["data"]] == ["big", "small", "small-lora"]
    async with weft.http.get(weft.url + "/v1/models/small-lora") as answer:
        assert (await answer.json())["parent"] == "small"
    async with weft.http.get(weft.url + "/v1/workflows/s") as answer:
        assert {step["worker"] for step in (await answer.json())["steps"]} == {"w0", "w1"}


async def test_a_request_without_a_model_means_the_first(start: Start) -> None:
    weft = await start(FakeWorker("big"), FakeWorker("small"))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with weft.http.post(weft.url + "/v1/chat/completions", json=body) as answer:
        assert answer.headers["x-weft-worker"] == "w0"


async def test_stored_responses_and_what_follows_them_go_to_their_worker(weft: Weft) -> None:
    url = weft.url + "/v1/responses"
    made = []
    for run in range(4):
        async with weft.http.post(url, json={"model": "m", "input": f"hi {run}"}) as answer:
            made.append(
                ((await answer.json())["id"], answer.headers["x-weft-worker"], answer.headers["x-weft-workflow"])
            )
    assert {worker for _, worker, _ in made} == {"w0", "w1"}
    async with weft.http.post(url, json={"model": "m", "input": "x"}, headers={"x-session-id": "other"}):
        pass
    for response, worker, workflow in made:
        async with weft.http.get(f"{url}/{response}") as answer:
            assert (await answer.json())["id"] == response
        follow = {"model": "m", "input": "go on", "previous_response_id": response}
        async with weft.http.post(url, json=follow) as answer:
            assert answer.headers["x-weft-worker"] == worker
            assert answer.headers["x-weft-workflow"] == workflow
    async with weft.http.get(f"{url}/resp_unknown") as answer:
        assert answer.status == 404


async def test_a_stored_response_is_found_after_the_front_end_forgot_it(weft: Weft) -> None:
    weft.workers[1].stored["resp_x"] = {"id": "resp_x"}
    async with weft.http.get(weft.url + "/v1/responses/resp_x") as answer:
        assert (await answer.json())["id"] == "resp_x"


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings", "/v1/messages/count_tokens", "/v1/score"])
async def test_other_routes_pass_through(weft: Weft, path: str) -> None:
    async with weft.http.post(weft.url + path, json={"model": "m", "fake": {}}) as answer:
        assert answer.status == 200
    assert [r.path for worker in weft.workers for r in worker.received] == [path]
    assert not weft.core.scheduler.graph.workflows


async def test_a_multipart_upload_passes_through_by_the_model_it_names(start: Start) -> None:
    weft = await start(FakeWorker("chat"), FakeWorker("whisper"))
    form = aiohttp.FormData()
    form.add_field("model", "whisper")
    form.add_field("file", b"\x00\xff" * 100, filename="a.wav")
    async with weft.http.post(weft.url + "/v1/audio/transcriptions", data=form) as answer:
        assert answer.headers["x-weft-worker"] == "w1"


@pytest.mark.parametrize(
    "path", ["/sleep", "/reset_prefix_cache", "/collective_rpc", "/v1/load_lora_adapter", "/abort"]
)
async def test_the_workers_own_controls_cannot_be_reached(weft: Weft, path: str) -> None:
    async with weft.http.post(weft.url + path, json={}) as answer:
        assert answer.status == 404
    assert not any(worker.received for worker in weft.workers)


async def test_the_workers_key_is_sent_and_the_clients_is_not(start: Start) -> None:
    weft = await start(FakeWorker(api_key="inner"), api_key="inner")
    async with weft.chat(headers={"authorization": "Bearer outer", "x-api-key": "outer"}):
        pass
    seen = weft.workers[0].received[0].headers
    assert seen["authorization"] == "Bearer inner"
    assert "x-api-key" not in seen


@pytest.mark.parametrize(("version", "in_body"), [("0.24.1", True), ("0.32.0+cpu", False), ("0.1.dev17+g1a2b", False)])
async def test_the_owner_reaches_engines_that_do_not_read_its_header(start: Start, version: str, in_body: bool) -> None:
    worker = FakeWorker(version=version)
    weft = await start(worker)
    xargs = {"mine": 1, "session_id": "steering", "agentic_context": {"program_id": "p", "agent_role": "planner"}}
    async with weft.chat(vllm_xargs=xargs) as answer:
        assert answer.status == 200
    (seen,) = worker.received
    owner = seen.headers["x-session-id"]
    branch, role = owner.split(".")
    assert branch[0] == "b" and role[0] == "r" and "planner" not in role  # noqa: PT018
    assert seen.fields["vllm_xargs"] == {"mine": 1} | ({"session_id": owner} if in_body else {})


@pytest.mark.parametrize(("until", "state"), [(b'"finish_reason":"stop"', "finished"), (b"tok0", "cancelled")])
async def test_a_client_that_leaves_once_it_has_the_answer_was_answered(weft: Weft, until: bytes, state: str) -> None:
    """Some close the connection at the last chunk, before the end of the stream."""
    async with weft.chat({"delay": 0.1}, stream=True, headers={"x-session-id": "s"}) as answer:
        async for line in answer.content:
            if until in line:
                break
    await weft.idle()
    (step,) = weft.core.scheduler.graph.get("default", "s").steps  # type: ignore[union-attr]
    assert step.state == state
