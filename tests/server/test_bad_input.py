from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import anthropic
import openai
import pytest

from server.auth import hashed
from server.call import LARGEST_BODY
from tests.fake_worker import FakeWorker
from tests.server.conftest import Start, Weft

OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"


def error_of(path: str, body: bytes) -> dict:
    """The error, if it has the shape of the path's API."""
    told = json.loads(body)
    if path.startswith("/v1/messages"):
        assert told["type"] == "error"
        assert set(told["error"]) == {"type", "message"}
    else:
        assert set(told["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body.decode()
    return told["error"]


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{not json", 400),
        (b"", 400),
        (b"[1]", 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"model": 5}', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "nobody"}', 404),
    ],
)
async def test_bad_bodies_get_the_apis_own_error(weft: Weft, path: str, body: bytes, status: int) -> None:
    async with weft.http.post(weft.url + path, data=body, headers={"content-type": "application/json"}) as answer:
        assert answer.status == status
        error_of(path, await answer.read())
    await weft.idle()


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
async def test_a_body_above_the_limit_is_413_however_it_is_sent(weft: Weft, path: str) -> None:
    async def pieces():
        for _ in range(50):
            yield b" " * (1 << 20)

    for data in (b" " * (50 << 20), pieces()):
        async with weft.http.post(weft.url + path, data=data) as answer:
            assert answer.status == 413
            assert str(LARGEST_BODY) in error_of(path, await answer.read())["message"]
    assert not any(worker.received for worker in weft.workers)


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", OPENAI, 405), ("DELETE", ANTHROPIC, 405), ("POST", "/v1/nope", 404), ("GET", "/", 404),
    ("POST", "/v1/messages/nope", 404), ("GET", "/v1/models/nope", 404), ("GET", "/v1/workflows/nope", 404),
    ("GET", "/v1/workflows?limit=zero", 422), ("POST", "/v1/workflows/nope/finish", 404),
])  # fmt: skip
async def test_unknown_routes_methods_and_names(weft: Weft, method: str, path: str, status: int) -> None:
    async with weft.http.request(method, weft.url + path) as answer:
        assert answer.status == status
        error_of(path, await answer.read())


async def test_without_workers_there_is_a_503_that_says_when_to_come_back(start: Start) -> None:
    weft = await start()
    for worker in weft.workers:
        await worker.stop()
    async with asyncio.timeout(5):
        while weft.core.endpoints:
            await asyncio.sleep(0.01)
    for path in (OPENAI, ANTHROPIC, "/tokenize"):
        async with weft.chat(path=path) as answer:
            assert answer.status == 503
            assert 0 < int(answer.headers["retry-after"]) <= 60
            error_of(path, await answer.read())
    async with weft.http.get(weft.url + "/ready") as ready, weft.http.get(weft.url + "/health") as health:
        assert (ready.status, health.status) == (503, 200)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    file.write_text(
        f'tenants:\n- {{name: a, keys: ["{hashed("key-a")}"]}}\n- {{name: b, isolated: true, keys: ["{hashed("key-b")}"]}}\n'
    )
    return file


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": "é"}]
)
@pytest.mark.parametrize(
    "path", [OPENAI, ANTHROPIC, "/v1/models", "/v1/workflows", "/v1/workers", "/tokenize", "/v1/responses/x"]
)
async def test_no_key_or_a_wrong_one_is_401(start: Start, keys: Path, path: str, headers: dict) -> None:
    weft = await start(FakeWorker(), keys=keys)
    method = "POST" if path in (OPENAI, ANTHROPIC, "/tokenize") else "GET"
    async with weft.http.request(method, weft.url + path, headers=headers, json={}) as answer:
        assert answer.status == 401
        error_of(path, await answer.read())


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version"])
async def test_probes_need_no_key(start: Start, keys: Path, path: str) -> None:
    weft = await start(FakeWorker(), keys=keys)
    async with weft.http.get(weft.url + path) as answer:
        assert answer.status == 200


async def test_tenants_see_only_their_own_workflows_and_responses(start: Start, keys: Path) -> None:
    weft = await start(FakeWorker(), FakeWorker(), keys=keys)
    a, b = {"authorization": "Bearer key-a"}, {"x-api-key": "key-b"}
    async with weft.chat(headers=a | {"x-session-id": "s"}):
        pass
    async with weft.http.get(weft.url + "/v1/workflows/s", headers=b) as answer:
        assert answer.status == 404
    async with weft.http.get(weft.url + "/v1/workflows", headers=a) as answer:
        assert [w["workflow"] for w in (await answer.json())["workflows"]] == ["s"]
    async with weft.chat(headers=b | {"x-session-id": "s"}):
        pass
    salted, plain = weft.workers[1].received[0].fields, weft.workers[0].received[0].fields
    assert "cache_salt" in salted
    assert "cache_salt" not in plain
    async with weft.http.post(weft.url + "/v1/responses", json={"model": "m"}, headers=a) as answer:
        made = (await answer.json())["id"]
    async with weft.http.get(f"{weft.url}/v1/responses/{made}", headers=b) as answer:
        assert answer.status == 404


async def test_the_sdks_raise_their_own_exceptions(weft: Weft) -> None:
    said = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await weft.openai(retries=2).chat.completions.create(model="no", messages=said)
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        await weft.anthropic(retries=2).messages.create(model="no", max_tokens=1, messages=said)
    with pytest.raises(openai.APIError, match="failed while it answered"):
        stream = await weft.openai().chat.completions.create(
            model="m", messages=said, stream=True, extra_body={"fake": {"die_after": 2}}
        )
        async for _ in stream:
            pass


async def test_a_malformed_http_request_does_no_harm(weft: Weft) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(weft.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: banana\r\n\r\n")
    assert b"400" in await reader.read(100)
    writer.close()
    async with weft.chat() as answer:
        assert answer.status == 200


async def test_an_aborted_upload_leaves_nothing_behind(weft: Weft) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(weft.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()
    await asyncio.sleep(0.1)
    await weft.idle()
    assert not any(worker.received for worker in weft.workers)


async def test_a_worker_whose_answer_is_cut_short_is_a_502(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def short(self: FakeWorker, request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        response = aiohttp.web.StreamResponse(headers={"content-type": "application/json", "content-length": "500"})
        await response.prepare(request)
        await response.write(b'{"choices":')
        request.transport.abort()  # type: ignore[union-attr]
        return response

    monkeypatch.setattr(FakeWorker, "_post", short)
    weft = await start(FakeWorker(), FakeWorker())
    async with weft.chat() as answer:
        assert answer.status == 502
        error_of(OPENAI, await answer.read())
    await weft.idle()
