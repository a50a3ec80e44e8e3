from __future__ import annotations

import asyncio
import re
import sys
from contextlib import suppress

import pytest

from tests.server.conftest import Weft


async def test_a_workflow_tells_its_sessions_its_steps_and_why(weft: Weft) -> None:
    for headers in ({"x-session-id": "root"}, {"x-session-id": "child", "x-parent-session-id": "root"}):
        async with weft.chat(headers=headers) as answer:
            await answer.read()
    async with weft.http.get(weft.url + "/v1/workflows/root") as answer:
        told = await answer.json()
    assert [(s["id"], s["parent"]) for s in told["sessions"]] == [("root", None), ("child", "root")]
    first, second = told["steps"]
    assert second["after"] == [first["id"]]
    assert first["decision"].startswith("fewest-live")
    assert first["arrived"] <= first["first_token"] <= first["finished"]
    assert (first["prompt_tokens"], first["cached_tokens"], first["output_tokens"]) == (20, 16, 3)
    async with weft.http.post(weft.url + "/v1/workflows/root/finish") as answer:
        assert (await answer.json())["state"] == "finished"
    async with weft.http.get(weft.url + "/v1/workflows?limit=1") as answer:
        assert (await answer.json())["workflows"][0]["state"] == "finished"


PLAN = {
    "nodes": {"plan": {"output_tokens": 100, "seconds": 2}, "work": {"seconds": 4}, "sum": {"join": "all"}},
    "edges": [{"from": "plan", "to": "work", "count": 3, "gap_seconds": 1}, {"from": "work", "to": "sum"}],
}


async def test_a_declared_template_says_what_is_ahead_of_a_run_at_once(weft: Weft) -> None:
    async with weft.http.put(weft.url + "/v1/workflows/templates/report", json=PLAN) as answer:
        assert answer.status == 200
        assert (await answer.json())["nodes"]["work"]["join"] == "any"
    meta = {"workflow_id": "run", "workflow": "report", "node": "plan"}
    async with weft.chat(metadata=meta) as answer:
        await answer.read()
    async with weft.http.get(weft.url + "/v1/workflows/run") as answer:
        ahead = (await answer.json())["ahead"]
    assert (ahead["template"], ahead["declared"], ahead["confidence"]) == ("report", True, 1.0)
    assert ahead["steps"] == 4
    assert ahead["roles"]["work"]["steps_to_execution"] == 1
    assert ahead["roles"]["sum"]["steps_to_execution"] == 2
    async with weft.http.get(weft.url + "/v1/workflows/templates/report") as answer:
        row = await answer.json()
    assert (row["nodes"]["plan"]["seconds"], row["starts"]) == (2, ["plan"])
    assert row["believed"]["nodes"].keys() == row["nodes"].keys()
    async with weft.http.put(weft.url + "/v1/workflows/templates/report", json={"nodes": {"plan": {}}}) as answer:
        assert answer.status == 200
    async with weft.http.get(weft.url + "/v1/workflows/run") as answer:
        assert (await answer.json())["ahead"]["steps"] == 0


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"nodes": {}}, "nodes"),
        ({"nodes": {"a": {"seconds": -1}}}, "nodes.a.seconds"),
        ({"nodes": {"a": {}}, "edges": [{"from": "a", "to": "b"}]}, "edges[0].to"),
        ({"nodes": {"a": {}}, "what": 1}, "template"),
    ],
)
async def test_a_wrong_template_is_refused_by_the_name_of_the_field(weft: Weft, wrong: dict, field: str) -> None:
    async with weft.http.put(weft.url + "/v1/workflows/templates/t", json=wrong) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert error["param"] == field
    async with weft.http.get(weft.url + "/v1/workflows/templates/t") as answer:
        assert answer.status == 404


async def test_a_template_is_learned_from_the_first_run_on(weft: Weft) -> None:
    for turn in range(3):
        async with weft.chat(metadata={"workflow_id": "run", "workflow": "chain", "node": f"n{turn}",
                                       "after": f"n{turn - 1}"}) as answer:  # fmt: skip
            await answer.read()
    async with weft.http.get(weft.url + "/v1/workflows/templates/chain") as answer:
        told = await answer.json()
    assert told["declared"] is False
    assert [(e["from"], e["to"]) for e in told["edges"]] == [("n0", "n1"), ("n1", "n2")]


async def test_workers_and_versions_are_listed(weft: Weft) -> None:
    async with weft.http.get(weft.url + "/v1/workers") as answer:
        rows = (await answer.json())["workers"]
    assert [(r["worker"], r["state"], r["kv_tokens"], r["models"]) for r in rows] == [
        ("w0", "up", 1600, ["m"]), ("w1", "up", 1600, ["m"]),
    ]  # fmt: skip
    async with weft.http.get(weft.url + "/version") as answer:
        assert (await answer.json())["workers"] == {"w0": "0.32.0", "w1": "0.32.0"}


async def test_metrics_follow_the_house_rules(weft: Weft) -> None:
    async with weft.chat(stream=True, headers={"x-session-id": "never-in-a-label"}) as answer:
        await answer.read()
    async with weft.chat(model="made-up-by-a-client"):
        pass
    await weft.idle()
    async with weft.http.get(weft.url + "/metrics") as answer:
        text = await answer.text()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.match(r"weft_[a-z0-9_]+[ {]", line) for line in samples)
    assert "never-in-a-label" not in text
    assert "made-up-by-a-client" not in text
    assert 'weft_steps_total{model="m",state="finished",tenant="default",worker="w0"} 1.0' in samples
    assert 'weft_cached_tokens_total{model="m",worker="w0"} 16.0' in samples
    assert 'weft_running_steps{worker="w0"} 0.0' in samples
    assert "weft_open_steps 0.0" in samples


async def test_a_worker_that_cannot_start_shows_in_the_metrics(weft: Weft) -> None:
    weft.core.worker_down("w9", failed=True)
    async with weft.http.get(weft.url + "/metrics") as answer:
        assert 'weft_workers{state="failed"} 1.0' in await answer.text()


async def test_the_native_routes_are_what_their_openapi_says(weft: Weft) -> None:
    async with weft.chat(headers={"x-session-id": "s"}):
        pass
    # Not in a thread: two that parse Python at a time trip CPython before 3.11.8 (gh-106905), and Hypothesis parses.
    checking = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.server.schema", weft.url)
    try:
        assert await checking.wait() == 0, "see what it printed"
    finally:
        with suppress(ProcessLookupError):
            checking.kill()
