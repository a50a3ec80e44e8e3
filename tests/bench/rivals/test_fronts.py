"""Each system sends calls where it should. What is a process of its own is that process, before fake engines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.play import Player
from bench.records import Played
from bench.rivals.costs import fit
from bench.rivals.engines import Build
from bench.rivals.front import Front, Turn, distinct_tokens
from bench.rivals.measure import LATER, SYSTEMS, make, measure
from bench.rivals.texts import calibrate
from bench.schedule import OPEN_RUNS
from bench.schedule import slots as slots_of
from bench.workloads.runs import Workload
from server.engine import installed
from tests.bench.rivals.fake_engine import COSTS, FakeEngines
from tests.bench.rivals.runs import TOOLS, chain, quick, workload

ROUTERS = [name for name in SYSTEMS if name.startswith("vllm-router")]


@pytest.fixture(autouse=True)
def starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.rivals.measure.starts", lambda seed, slots, workload, profile: quick(slots))


async def play(engines: FakeEngines, system: str, played: Workload) -> Played:
    """Every run once, all at once."""
    front = make(system)
    await engines.fit(front.build(played.runs, engines.kv_tokens, 0.0))
    await front.start(engines, played)
    try:
        texts = await calibrate(engines.http, engines.urls[0], engines.model, 1)
        player = Player(engines.http, front, texts, engines.model, engines.block, timeout=20.0)
        return await player.open(played.runs, [0.0] * len(played.runs))
    finally:
        await front.stop()


def homes(played: Played) -> dict[str, set[str]]:
    """The engines on which each session was."""
    return {
        name: {call.worker for call in played.calls if call.session == name}
        for name in {c.session for c in played.calls}
    }


async def test_stock_keeps_a_session_where_fewest_lived(engines: FakeEngines) -> None:
    played = await play(engines, "stock", workload(runs=6))
    assert all(len(where) == 1 for where in homes(played).values())
    assert Counter(where for found in homes(played).values() for where in found) == {"w0": 3, "w1": 3}


async def test_a_run_that_is_over_leaves_its_seat(engines: FakeEngines) -> None:
    front = make("stock")
    await front.start(engines, workload())
    runs = [chain(name, calls=1) for name in "abc"]
    assert [(await front.place(Turn(run, 0))).worker for run in runs] == ["w0", "w1", "w0"]
    front.over(runs[0])
    front.over(runs[2])
    assert (await front.place(Turn(chain("d"), 0))).worker == "w0"


async def test_a_run_that_is_cut_off_leaves_its_seats(engines: FakeEngines) -> None:
    front = make("stock")
    await front.start(engines, workload())
    run = chain("a")
    await front.place(Turn(run, 0))
    front.over(run)
    assert (await front.place(Turn(chain("b"), 0))).worker == "w0"


async def test_round_robin_takes_engines_in_turn(engines: FakeEngines) -> None:
    front = make("stock-round-robin")
    await front.start(engines, workload())
    run = chain("a")
    assert [(await front.place(Turn(run, i))).worker for i in (0, 1, 2)] == ["w0", "w1", "w0"]


async def test_least_loaded_takes_the_engine_with_fewest_calls_in_flight(engines: FakeEngines) -> None:
    front = make("stock-least-loaded")
    await front.start(engines, workload())
    turns = [Turn(chain(name), 0) for name in "abcd"]
    assert [(await front.place(turn)).worker for turn in turns[:3]] == ["w0", "w1", "w0"]
    front.ended(turns[0])
    front.ended(turns[2])
    assert (await front.place(turns[3])).worker == "w0"


async def test_hash_keeps_a_session_on_its_engine_and_spreads_many(engines: FakeEngines) -> None:
    front = make("stock-hash")
    await front.start(engines, workload())
    turns = [Turn(chain(f"run{number}"), 0) for number in range(200)]
    first = [(await front.place(turn)).worker for turn in turns]
    assert [(await front.place(Turn(turn.run, 2))).worker for turn in turns] == first
    assert 40 < first.count("w0") < 160


async def test_the_semaphore_lets_as_many_runs_in_as_have_room_in_order_for_their_whole_life(
    engines: FakeEngines,
) -> None:
    for engine in engines.engines:
        engine.seconds = 0.02
    played = workload(runs=6, calls=3)
    engines.kv_tokens = int(played.mean_context)  # room for two on the two engines
    done = await play(engines, "semaphore", played)
    spans = {
        run.id: (min(c.sent + c.held for c in mine), max(c.finished or 0.0 for c in mine))
        for run in played.runs
        if (mine := [c for c in done.calls if c.run == run.id])
    }
    order = sorted(spans.values())
    assert [span for _, span in sorted(spans.items())] == order  # the first to come is the first let in
    for number, (begin, _) in enumerate(order):
        assert sum(start <= begin < end for start, end in order[:number]) < 2
    held = sorted(call.held for call in done.calls if call.index == 0)
    assert held[1] < 0.02 < held[2]
    assert all(call.first_token - call.sent >= call.held for call in done.calls)
    assert all(call.held < 0.02 for call in done.calls if call.index)


async def test_a_run_that_is_cut_off_while_it_waits_takes_no_place(engines: FakeEngines) -> None:
    front = make("semaphore")
    engines.kv_tokens = 1
    await front.start(engines, workload())
    runs = [chain(name) for name in "abc"]
    await front.place(Turn(runs[0], 0))
    waits = [asyncio.create_task(front.place(Turn(run, 0))) for run in runs[1:]]
    await asyncio.sleep(0)
    waits[0].cancel()
    front.over(runs[1])
    front.over(runs[0])
    assert (await asyncio.wait_for(waits[1], 1)).url in engines.urls


async def test_a_call_that_waits_in_vain_or_is_cut_off_meanwhile_was_held_all_the_time(engines: FakeEngines) -> None:
    engines.kv_tokens = 1  # room for one run
    runs = [chain("first", gap=5.0), chain("second"), chain("third")]
    runs[2].calls[0].gap = 0.2
    front = make("semaphore")
    await front.start(engines, Workload("chains", runs))
    texts = await calibrate(engines.http, engines.urls[0], engines.model, 1)
    player = Player(engines.http, front, texts, engines.model, engines.block, timeout=0.4)
    done = await player.open(runs, [0.0, 0.0, 0.2])  # all is cut off at 0.6
    waited = {call.run: call for call in reversed(done.calls) if call.index == 0}
    assert waited["second"].error == "no answer within 0.4 s"
    assert waited["second"].held == pytest.approx(0.4, abs=0.1)
    assert waited["third"].error is None
    assert waited["third"].held == pytest.approx(0.2, abs=0.1)
    assert (waited["second"].worker, waited["third"].worker) == ("", "")


@pytest.mark.parametrize("system", ["stock", "weft"])
async def test_a_call_says_its_session_and_the_one_that_made_that(engines: FakeEngines, system: str) -> None:
    front = make(system)
    front.urls, front.url = engines.urls, engines.urls[0]
    if system == "stock":
        await front.start(engines, workload())
    run = chain("r", calls=2)
    run.calls[1].session, run.calls[1].parent = "helper", "main"
    first, second = [(await front.place(Turn(run, index))).headers for index in (0, 1)]
    assert first == {"x-session-id": "r.main"}
    assert second == {"x-session-id": "r.helper", "x-parent-session-id": "r.main"}


async def test_unlimited_has_room_for_everything_that_is_played(engines: FakeEngines) -> None:
    runs = workload(runs=30).runs
    assert make("unlimited").build(runs, 64, 2.0).kv_tokens >= sum(map(distinct_tokens, runs))
    assert make("stock").build(runs, 64, 2.0) == Build(64, 2.0)
    assert make("weft").build(runs, 64, 2.0) == Build(64, 2.0, "retention")


async def test_weft_serves_every_session_on_one_engine(engines: FakeEngines) -> None:
    played = await play(engines, "weft", workload(runs=4))
    assert {call.error for call in played.calls} == {None}
    assert all(len(where) == 1 for where in homes(played).values())
    assert {call.worker for call in played.calls} == {"w0", "w1"}
    assert {call.held for call in played.calls} == {None}  # what it holds is not seen from outside
    assert sorted(set(engines.engines[0].sessions) & set(engines.engines[1].sessions)) == []


async def test_weft_is_played_on_engines_with_its_plug_in_but_attached_weft_on_stock_ones(engines: FakeEngines) -> None:
    await play(engines, "weft", workload(runs=2))
    assert {action["action_type"] for engine in engines.engines for action in engine.advice} == {"weft.retain"}
    told = sum(len(engine.advice) for engine in engines.engines)
    await play(engines, "weft-attached", workload(runs=2))
    assert sum(len(engine.advice) for engine in engines.engines) == told


async def test_hinted_weft_hears_of_templates_roles_and_ends(engines: FakeEngines) -> None:
    asked = workload(runs=2)
    for run in asked.runs:
        run.hints["template"] = {"nodes": {"agent": {}, "other": {}}, "edges": [{"from": "agent", "to": "other"}]}
    await play(engines, "weft-hinted", asked)
    said = [fields["metadata"] for engine in engines.engines for _, fields in engine.received if "metadata" in fields]
    assert {one["workflow_id"] for one in said} == {run.id for run in asked.runs}
    assert {one["node"] for one in said} <= {call.role for run in asked.runs for call in run.calls}
    assert "kv.release" in {action["action_type"] for engine in engines.engines for action in engine.advice}


@pytest.mark.parametrize("system", ROUTERS)
async def test_vllm_router_serves_every_call(engines: FakeEngines, system: str) -> None:
    if not router_installed():
        pytest.skip("vllm-router is not installed (extra `bench`)")
    engines.costs = COSTS
    played = await play(engines, system, workload(runs=6))
    assert {call.error for call in played.calls} == {None}
    contexts = [fields.get("vllm_xargs") for engine in engines.engines for _, fields in engine.received]
    assert len(contexts) == 18
    if system == "vllm-router-program-hinted":
        told = sorted(
            (json.loads(one["agentic_context"]) for one in contexts), key=lambda one: (one["task_id"], one["step_id"])
        )
        assert [one["expected_resume"] for one in told[:3]] == [True, True, False]
        assert [one["step_id"] for one in told[:3]] == [0, 1, 2]
        assert {one["expected_output_length"] for one in told} == {2}
    else:
        assert contexts == [None] * 18
    if system != "vllm-router-cache-aware":
        seen = [Counter(map(session, engine.received)) for engine in engines.engines]
        assert seen[0] + seen[1] == Counter({f"run{number}.main": 3 for number in range(6)})
        assert not seen[0].keys() & seen[1].keys()


def session(received: tuple[dict[str, str], dict[str, Any]]) -> str:
    """What a call that came says of its session, in its header or in the hints."""
    headers, fields = received
    if "vllm_xargs" in fields:
        return str(json.loads(fields["vllm_xargs"]["agentic_context"])["session_id"])
    return headers["x-session-id"]


def router_installed() -> bool:
    return Path(sys.executable).with_name("vllm-router").exists()


@pytest.mark.parametrize("system", LATER)
def test_parts_of_weft_that_do_not_exist_yet_cannot_be_left_out(system: str) -> None:
    with pytest.raises(BenchError, match="does not exist yet"):
        make(system)


def test_an_unknown_system_is_told_the_known_ones() -> None:
    with pytest.raises(BenchError, match="stock-hash"):
        make("stok")


async def test_a_measured_cell_is_a_fresh_front_on_emptied_engines_at_the_load_asked_for(
    engines: FakeEngines,
) -> None:
    for engine in engines.engines:
        engine.seconds = 0.02
    said: list[str] = []
    asked = workload(runs=5, calls=4, root=TOOLS)
    slots = slots_of(0.2, engines.asked * engines.count, asked)
    assert slots == round(0.2 * 800 / asked.mean_context) > 1
    played = await measure("stock", engines, asked, seed=2, load=0.2, say=said.append)
    assert len(played.runs) == 5 * slots
    assert [engine.resets for engine in engines.engines] == [1, 1]
    assert played.extra["slots"] == slots
    assert played.extra["load"] == pytest.approx(slots * asked.mean_context / 800)
    assert played.extra["load_played"] == pytest.approx(played.extra["load"], rel=0.2)
    assert played.extra["prompt_tokens"] == len(played.calls)
    assert played.extra["front_cpus"] == 0
    assert 0 < played.extra["servers_cpus"] == pytest.approx(played.extra["client_cpus"], rel=0.2), "both are we"
    assert said
    assert said[0].startswith("stock: load 0.")


async def test_unlimited_changes_the_engines_but_not_the_load(engines: FakeEngines) -> None:
    asked = workload(runs=5)
    played = await measure("unlimited", engines, asked, seed=2, load=0.2, say=lambda line: None)
    assert engines.kv_tokens > engines.asked
    assert played.extra["slots"] == slots_of(0.2, engines.asked * engines.count, asked)


async def test_poisson_and_recorded_arrivals(engines: FakeEngines) -> None:
    asked = workload(runs=5)
    poisson = await measure("stock", engines, asked, seed=2, arrivals="poisson:144000", supply=1, say=lambda line: None)
    assert len(poisson.runs) == OPEN_RUNS
    assert [run.warm for run in poisson.runs] == [True] * 8 + [False] * 32
    assert poisson.extra["slots"] == 0
    for number, run in enumerate(asked.runs):
        run.arrival = 0.02 * number
    recorded = await measure("stock", engines, asked, seed=2, arrivals="trace", say=lambda line: None)
    assert [run.run for run in recorded.runs] == [run.id for run in asked.runs]
    assert [run.warm for run in recorded.runs] == [True, False, False, False, False]


@pytest.mark.parametrize(
    "arrivals", ["poisson:0", "poisson:x", "poisson:-1", "poisson:nan", "often", "trace", "closed"]
)
async def test_arrivals_that_cannot_be_are_refused(engines: FakeEngines, arrivals: str) -> None:
    with pytest.raises(BenchError):
        await measure("stock", engines, workload(), seed=1, arrivals=arrivals)


async def test_calls_that_no_engine_can_take_are_refused(engines: FakeEngines) -> None:
    engines.max_len = 20
    with pytest.raises(BenchError, match="tokens"):
        await measure("stock", engines, workload(), seed=1, load=0.2)


class Broken(Front):
    """Cannot start."""

    stopped = False

    async def start(self, engines: object, workload: object) -> None:
        raise RuntimeError("no")

    async def stop(self) -> None:
        Broken.stopped = True


async def test_a_front_that_cannot_start_is_stopped(engines: FakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "broken", Broken)
    with pytest.raises(RuntimeError, match="no"):
        await measure("broken", engines, workload(), seed=1, load=0.2)
    assert Broken.stopped


@pytest.mark.skipif(installed() is None, reason="numpy comes with vLLM")
def test_a_fit_finds_what_made_the_figures_and_nothing_negative() -> None:
    rows = [[1.0, x, x * x] for x in (0.1, 0.5, 1.0, 2.0, 3.0)]
    assert fit(rows, [0.01 + 0.2 * x + 0.03 * x * x for _, x, _ in rows]) == pytest.approx([0.01, 0.2, 0.03])
    bent = fit(rows, [0.01 + 0.3 * x - 0.02 * x * x for _, x, _ in rows])
    assert min(bent) >= 0
    assert bent[2] == 0
