"""The internal route: what it passes to the engine, and what it says where it cannot."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.envelope import packed
from kvcache.plugin import route
from kvcache.plugin.control import NOTHING


class Engine:
    """A client of an engine whose scheduler repeats what it is told, or is vLLM's own."""

    def __init__(self, stock: bool = False) -> None:
        self.stock = stock

    async def call_utility_async(self, method: str, message: dict[str, Any]) -> dict[str, Any]:
        if self.stock:
            raise Exception("Call to scheduler method failed: 'Scheduler' object is not callable")
        return {"method": method, "told": message}


def asked(body: bytes, method: str = "POST", stock: bool = False) -> tuple[int, Any]:
    sent: list[dict[str, Any]] = []
    parts = [body[at : at + 1000] for at in range(0, len(body), 1000)] or [b""]
    coming = iter([{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts])
    state = SimpleNamespace(engine_client=SimpleNamespace(engine_core=Engine(stock)))

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(route.control({"method": method, "app": SimpleNamespace(state=state)}, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_message_reaches_the_scheduler_and_its_answer_comes_back() -> None:
    actions = [{"text": "x" * 3000}]
    status, answer = asked(json.dumps({"actions": actions, "residency": {"seen": 3}}).encode())
    assert (status, answer["method"], answer["told"]["residency"]) == (200, "scheduler", {"seen": 3})
    assert json.loads(b64decode(answer["told"]["actions"])) == actions, "the engine's process reads them"


def test_actions_reach_the_scheduler_as_it_reads_them_fastest() -> None:
    release = {"action_type": "kv.release", "action_version": 1, "action_id": "0", "payload": {"owner": "a"}}
    plain = json.dumps([release]).encode()
    _, answer = asked(b'{"actions": ' + plain + b"}")
    assert b64decode(answer["told"]["actions"]) == packed(plain) != plain


def test_a_message_without_actions_reaches_the_scheduler_as_one() -> None:
    _, answer = asked(b'{"actions": [], "residency": {"seen": 3}}')
    assert b64decode(answer["told"]["actions"]) in NOTHING


@pytest.mark.parametrize(("body", "method", "status"), [
    (b"{}", "GET", 405), (b"{", "POST", 400), (b"", "POST", 400), (b"[]", "POST", 400), (b"[" * 100_000, "POST", 400),
    (b'{"actions": ' + b"[" * 100_000 + b"}", "POST", 400), (b'{"a": NaN}', "POST", 400), (b'{"a": "\xff"}', "POST", 400),
])  # fmt: skip
def test_what_is_no_message_is_refused(body: bytes, method: str, status: int) -> None:
    assert asked(body, method)[0] == status


def test_what_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "LONGEST", 1500)
    assert asked(b'"' + b"x" * 4000 + b'"')[0] == 413


def test_a_stock_scheduler_is_told_apart_from_one_that_failed() -> None:
    status, answer = asked(b"{}", stock=True)
    assert status == 501
    assert "not callable" in answer["error"]
