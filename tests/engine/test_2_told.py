"""Real engines with the plug-in, as `weft serve` starts them, are told what to keep and say what they hold."""

from __future__ import annotations

import urllib.error
import urllib.request

import openai
import pytest

from tests.engine.conftest import Served, wait_for

LONG = "Keep this in mind for all that follows. " * 40


def ask(served: Served, session: str, turns: int) -> None:
    """A session whose context grows by a turn at a time."""
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none")
    messages: list = [{"role": "system", "content": LONG}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{session}, turn {turn}"})
        answer = client.chat.completions.create(
            model="weft-embedded", messages=messages, max_tokens=8, extra_headers={"x-session-id": session}
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})


def resident(served: Served, session: str) -> int:
    (row,) = served.get(f"/v1/workflows/{session}")["sessions"]
    return row["resident"]["device"]


def test_engines_say_what_they_can_do(served: Served) -> None:
    for worker in served.get("/v1/workers")["workers"]:
        able = worker["engine"]
        assert (able["eviction"], able["order"], able["residency"], able["guard"]) == (True, True, True, True)
        assert able["why"] == []
        assert worker["host_tokens"] == 0, "no host tier on the CPU backend unless it is asked for"


def test_what_a_session_holds_is_known_and_dead_when_its_run_is_finished(served: Served) -> None:
    accepted = served.metric("weft_advice_total")
    ask(served, "kept", 3)
    wait_for(lambda: resident(served, "kept") > 300, 10)
    wait_for(lambda: served.metric("weft_advice_total") > accepted, 10)
    finish = urllib.request.Request(served.url + "/v1/workflows/kept/finish", method="POST")
    urllib.request.urlopen(finish, timeout=10).close()
    wait_for(lambda: resident(served, "kept") == 0, 10)


def test_the_control_route_asks_for_the_worker_s_key(served: Served) -> None:
    port = served.engines()[0].port
    told = urllib.request.Request(
        f"http://127.0.0.1:{port}/weft/control", data=b'{"ask": "abilities"}', headers={"authorization": "Bearer x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(told, timeout=10)
    assert refused.value.code == 401
