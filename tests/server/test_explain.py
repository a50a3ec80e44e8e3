"""`weft explain`, against a running front end."""

from __future__ import annotations

import asyncio

import pytest

from server.config import ConfigError
from server.explain import explained, fetched
from tests.server.conftest import Weft


async def test_each_step_is_a_line_that_says_where_it_went_and_why(weft: Weft) -> None:
    for _ in range(2):
        async with weft.chat(headers={"x-session-id": "s"}) as answer:
            assert answer.status == 200
    await weft.idle()
    head, first, second = explained(await asyncio.to_thread(fetched, weft.url, "s", None)).splitlines()
    assert head == "workflow s of default: waiting, 2 steps"
    assert "w0: fewest-live" in first
    assert "16 of 20 tokens found" in first
    assert "w0: continues" in second


async def test_what_is_wrong_is_said(weft: Weft) -> None:
    with pytest.raises(ConfigError, match="nobody"):
        await asyncio.to_thread(fetched, weft.url, "nobody", None)
    with pytest.raises(ConfigError, match="not an http"):
        fetched("ftp://x", "s", None)
    with pytest.raises(ConfigError, match="refused"):
        await asyncio.to_thread(fetched, "http://127.0.0.1:9", "s", None)


def test_a_held_step_says_until_when_at_most() -> None:
    step = {
        "arrived": 100.0, "session": "s", "held": {"worker": "w0", "since": 100.0, "deadline": 220.0, "tokens": 5000},
    }  # fmt: skip
    told = explained({"workflow": "w", "tenant": "t", "state": "running", "steps": [step], "asked": None})
    assert told.splitlines()[1] == "+     0.0 s  s  held at w0: no room for 5000 tokens; at most 120 s in all"


def test_what_was_asked_of_a_run_is_told_with_its_chances() -> None:
    asked = {
        "deadline": 160.0, "in_time_probability": 0.25, "token_budget": 5000.0, "spent_tokens": 1200,
        "in_budget_probability": 1.0,
    }  # fmt: skip
    step = {
        "arrived": 100.0, "session": "s", "held": None, "worker": "w0", "decision": "continues", "first_token": None,
        "prompt_tokens": 0,
    }  # fmt: skip
    told = explained({"workflow": "w", "tenant": "t", "state": "running", "steps": [step], "asked": asked})
    assert told.splitlines()[1] == (
        "asked: to be done at +60.0 s, 25% likely when its latest step came; "
        "1200 of 5000 tokens spent, 100% likely to be enough"
    )
