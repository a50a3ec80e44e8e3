"""The worker's key, and the internal route behind it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.plugin.guard import RequireKey
from kvcache.plugin.route import PATH

KEY = (b"Authorization", b"Bearer secret")


class Engine:
    """A client of an engine whose scheduler repeats what it is told."""

    async def call_utility_async(self, method: str, message: dict[str, Any]) -> dict[str, Any]:
        return {"method": method, "told": message}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """vLLM's own routes."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'"vllm"'})


def asked(path: str, *headers: tuple[bytes, bytes], method: str = "POST", kind: str = "http") -> tuple[int, Any]:
    """Status and body of the answer to `{"ask": "abilities"}`; of a refused websocket, its code."""
    sent: list[dict[str, Any]] = []
    state = SimpleNamespace(engine_client=SimpleNamespace(engine_core=Engine()))
    scope = {"type": kind, "path": path, "method": method, "headers": headers, "app": SimpleNamespace(state=state)}

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"ask": "abilities"}'}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(RequireKey(app)(scope, receive, send))
    if kind == "websocket":
        return sent[0].get("code", 0), None
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")


def test_a_message_with_the_key_reaches_the_scheduler() -> None:
    assert asked(PATH, KEY) == (200, {"method": "scheduler", "told": {"ask": "abilities"}})


@pytest.mark.parametrize("headers", [(), ((b"authorization", b"Bearer wrong"),), ((b"x-api-key", b"secret"),)])
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/invocations"])
def test_nothing_is_answered_without_the_key(path: str, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    assert asked(path, *headers) == (401, {"error": "Unauthorized"})


def test_everything_else_is_vllms() -> None:
    assert asked("/v1/models", KEY) == asked("/health") == asked(PATH + "/x", KEY) == (200, "vllm")
    assert asked(PATH, KEY, method="GET")[0] == 405


def test_a_websocket_is_refused_without_the_key() -> None:
    assert asked("/v1/realtime", kind="websocket")[0] == 1008
