"""Quotas, deadlines and budgets, as a client with the real SDKs sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
from anthropic import RateLimitError as AnthropicRateLimitError
from openai import AsyncOpenAI, RateLimitError, UnprocessableEntityError

from server.auth import hashed
from tests.fake_worker import FakeWorker
from tests.server.conftest import Start, Weft

TENANTS = f"""
tenants:
- {{name: small, workflows: 1, keys: ["{hashed("key-small")}"]}}
- {{name: thrifty, tokens_per_minute: 10, keys: ["{hashed("key-thrifty")}"]}}
"""
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def limited(start: Start, tmp_path: Path) -> Weft:
    (tmp_path / "keys.yaml").write_text(TENANTS)
    return await start(FakeWorker(), keys=tmp_path / "keys.yaml")


async def ask(client: AsyncOpenAI, **fields: object) -> object:
    return await client.chat.completions.create(model="m", messages=MESSAGES, **fields)  # type: ignore[call-overload]


async def test_one_more_workflow_than_allowed_is_a_429_that_says_when_to_come_again(limited: Weft) -> None:
    client = limited.openai("key-small")
    await ask(client, metadata={"workflow_id": "one"})
    with pytest.raises(RateLimitError) as refused:
        await ask(client, metadata={"workflow_id": "two"})
    assert refused.value.response.headers["retry-after"] == "5"
    assert "1 workflows run" in refused.value.message
    await ask(client, metadata={"workflow_id": "one"})
    headers = {"Authorization": "Bearer key-small"}
    async with limited.http.post(limited.url + "/v1/workflows/one/finish", headers=headers) as answer:
        assert answer.status == 200
    await ask(client, metadata={"workflow_id": "two"})
    await limited.idle()


async def test_used_up_tokens_are_a_429_in_the_shape_of_either_api(limited: Weft) -> None:
    client = limited.openai("key-thrifty")
    await ask(client, extra_headers={"x-session-id": "s"}, extra_body={"fake": {"prompt_tokens": 100}})
    with pytest.raises(RateLimitError, match="10 tokens a minute are used up"):
        await ask(client)
    anthropic = limited.anthropic("key-thrifty")
    with pytest.raises(AnthropicRateLimitError) as refused:
        await anthropic.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.response.json()["error"]["type"] == "rate_limit_error"
    assert refused.value.response.headers["x-should-retry"] == "true"
    await limited.idle()


async def test_a_deadline_is_told_in_the_decision_and_refused_only_where_that_was_asked_for(weft: Weft) -> None:
    client = weft.openai(retries=2)
    told = {"workflow_id": "late", "deadline_seconds": "0.001"}
    raw = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES, metadata=told)  # type: ignore[arg-type]
    assert "deadline at risk" in raw.headers["x-weft-decision"]
    assert "in_time_probability=0" in raw.headers["x-weft-decision"]
    before = len(weft.core.scheduler.graph.workflows["default", "late"].steps)
    with pytest.raises(UnprocessableEntityError, match="its deadline passed") as refused:
        await ask(client, metadata=told, extra_headers={"Prefer": "respond-async, handling=strict"})
    assert "retry-after" not in refused.value.response.headers
    after = len(weft.core.scheduler.graph.workflows["default", "late"].steps)
    assert after == before + 1, "the SDK does not try again what cannot be done"
    async with weft.http.get(weft.url + "/v1/workflows/late") as answer:
        asked = (await answer.json())["asked"]
    assert asked["strict"] is True
    assert asked["in_time_probability"] == 0.0
    await weft.idle()


@pytest.mark.parametrize("asked", [{"deadline_seconds": "soon"}, {"token_budget": "-3"}, {"deadline_seconds": ""}])
async def test_what_cannot_be_read_is_as_if_it_were_not_there(weft: Weft, asked: dict[str, str]) -> None:
    await ask(weft.openai(), metadata={"workflow_id": "w", **asked})
    async with weft.http.get(weft.url + "/v1/workflows/w") as answer:
        assert (await answer.json())["asked"] is None
