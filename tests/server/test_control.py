"""Weft and its engines' plug-ins talk: real messages over HTTP, to the plug-in's own keeper in a fake worker."""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from struct import unpack
from typing import Any

import pytest

from kvcache.hints import Hints
from kvcache.keeper import Keeper
from kvcache.ledger import DEVICE
from kvcache.plugin.control import Control, stock
from kvcache.policy import Hint
from kvcache.retention import Retention
from scheduler.actions import Prefetch, Reprioritise, Retain
from scheduler.residency import Residency
from server import control
from server.core import Core, Endpoint
from server.fleet import Attached, Location
from tests.fake_worker import FakeWorker
from tests.server.conftest import Start, Weft


class Plugin:
    """What answers in an engine, over the real keeper; `messages` are those that came."""

    def __init__(self, **abilities: Any) -> None:
        self.abilities = {"plugin": True, "control": True, "order": False, "host_tier": 0, "prefetch": False, "why": []}
        self.abilities["residency"] = True
        self.abilities |= abilities
        self.keeper = Keeper(Retention(), 16)
        self.fetched: list[str] = []
        hints = Hints(self.keeper, prefetch=lambda owner, within: not self.fetched.append(owner))
        self.control = Control(self.keeper, hints, lambda: {"guard_weight": 1.0, "evicted_dead_total": 3.0})
        self.messages: list[dict[str, Any]] = []
        self.down = self.off = False

    def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("ask") == "abilities":
            return self.abilities
        if self.down:
            raise RuntimeError("the engine is busy")
        self.messages.append(message)
        if self.off:
            return stock(message)
        return self.control.answer(message, time.monotonic())

    @property
    def actions(self) -> list[dict[str, Any]]:
        return [action for message in self.messages for action in message["actions"]]

    @property
    def retained(self) -> list[str]:
        """The owners of whom something was foretold, in the order in which it was."""
        many = (action["payload"] for action in self.actions if action["action_type"] == "weft.retain")
        return [owner for columns in many for owner in columns["owners"]]

    def holds(self, owner: str, blocks: int) -> None:
        keys = [f"{owner}/{number}".encode() for number in range(blocks)]
        now = time.monotonic()
        number = self.keeper.began(owner, None, now)
        self.keeper.wrote(owner, None, keys, now, number)
        for key in keys:
            self.keeper.ledger.gained(key, DEVICE)
        self.keeper.left(owner, 16 * blocks, now)


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def reporting(start: Start) -> tuple[Plugin, Weft, Residency]:
    """An engine that holds 64 tokens of "b1", of which the core has heard."""
    plugin = Plugin()
    plugin.holds("b1", 4)
    weft = await start(FakeWorker(plugin=plugin))
    residency = weft.core.scheduler.workers["w0"].residency
    await until(lambda: residency.tokens("b1") == (64, 0))
    return plugin, weft, residency


async def owner_of(weft: Weft) -> str:
    """The branch of the last request, as the worker saw it."""
    return weft.workers[0].received[-1].headers["x-session-id"].partition(".")[0]


async def test_a_branch_that_waits_is_retained_and_the_end_of_its_run_releases_it(start: Start) -> None:
    plugin = Plugin()
    weft = await start(FakeWorker(plugin=plugin))
    await weft.chat(headers={"x-session-id": "run"})
    owner = await owner_of(weft)
    await until(lambda: plugin.actions)
    (action,) = plugin.actions
    assert (action["action_type"], action["payload"]["owners"]) == ("weft.retain", [owner])
    assert len(b64decode(action["payload"]["index"]["values"])) == 4 * 48
    assert 0 <= unpack("<f", b64decode(action["payload"]["idle"]))[0] < 5
    assert b64decode(action["payload"]["leased"]) == b"\1"
    await weft.http.post(weft.url + "/v1/workflows/run/finish")
    await until(lambda: len(plugin.actions) > 1)
    assert plugin.actions[1]["action_type"] == "kv.release"
    assert plugin.actions[1]["payload"] == {"owner": owner}


async def test_residency_comes_from_the_engine_in_deltas_and_as_a_whole_after_a_gap(start: Start) -> None:
    plugin, _, residency = await reporting(start)
    plugin.holds("b2", 2)
    await until(lambda: residency.tokens("b2") == (32, 0))
    assert [message["residency"]["seen"] for message in plugin.messages[:2]] == [-1, 0]
    plugin.control.answer({"residency": {"seen": -1}}, time.monotonic())  # somebody else has asked: a gap
    plugin.holds("b3", 1)
    await until(lambda: residency.tokens("b3") == (16, 0))
    assert residency.tokens("b1") == (64, 0)


async def test_advice_that_is_lost_is_counted_and_the_residency_asked_for_as_a_whole(start: Start) -> None:
    plugin = Plugin()
    weft = await start(FakeWorker(plugin=plugin))
    await until(lambda: plugin.messages)
    plugin.down = True
    await weft.chat(headers={"x-session-id": "run"})
    async with asyncio.timeout(5):
        while 'weft_advice_total{status="unsent",worker="w0"} 1.0' not in await metrics(weft):
            await asyncio.sleep(0.02)
    plugin.down = False
    before = len(plugin.messages)
    await until(lambda: len(plugin.messages) > before)
    assert plugin.messages[before]["residency"] == {"seen": -1}


async def metrics(weft: Weft) -> str:
    async with weft.http.get(weft.url + "/metrics") as answer:
        return await answer.text()


async def test_what_engines_tell_of_themselves_is_in_the_metrics(start: Start) -> None:
    weft = await start(FakeWorker(plugin=Plugin()))
    await until(lambda: weft.core.scheduler.workers["w0"].advised)
    async with asyncio.timeout(5):
        while "weft_engine_guard_weight" not in (text := await metrics(weft)):
            await asyncio.sleep(0.02)
    assert 'weft_engine_guard_weight{worker="w0"} 1.0' in text
    assert 'weft_engine_evicted_dead_total{worker="w0"} 3.0' in text


async def test_workers_say_what_their_engines_can_do(start: Start) -> None:
    weft = await start(FakeWorker(plugin=Plugin(host_tier=4096, why=["guard: off"])), FakeWorker())
    async with weft.http.get(weft.url + "/v1/workers") as answer:
        with_plugin, without = (await answer.json())["workers"]
    assert with_plugin["host_tokens"] == 4096
    assert with_plugin["engine"]["why"] == ["guard: off"]
    assert (without["host_tokens"], without["engine"]) == (0, {})


async def test_workers_say_what_is_to_be_known_of_how_they_were_started(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = Attached.locate

    async def noted(self: Attached, worker: str) -> Location:
        return replace(await located(self, worker), note="host_tier: 0.05 GiB")

    monkeypatch.setattr(Attached, "locate", noted)
    weft = await start(FakeWorker(plugin=Plugin(why=["guard: off"])))
    assert weft.core.endpoints["w0"].abilities["why"] == ["guard: off", "host_tier: 0.05 GiB"]


def test_a_large_fleet_is_asked_less_often_so_that_the_front_end_has_time_for_the_steps() -> None:
    core = Core()
    talking = control.Control(core, None)  # type: ignore[arg-type]
    core.endpoints = {f"w{number}": Endpoint(f"w{number}", "") for number in range(50)}
    assert talking.period == 0.1
    core.endpoints |= {f"w{number}": Endpoint(f"w{number}", "") for number in range(512)}
    assert talking.period == pytest.approx(512 / 500)


async def test_an_engine_that_cannot_say_what_it_holds_is_not_asked(start: Start) -> None:
    plugin = Plugin(residency=False)
    weft = await start(FakeWorker(plugin=plugin))
    await until(lambda: plugin.messages)
    await weft.chat(headers={"x-session-id": "run"})
    owner = await owner_of(weft)
    assert all("residency" not in message for message in plugin.messages)
    assert weft.core.scheduler.workers["w0"].residency.tokens(owner) == (23, 0), "guessed"


async def test_what_is_urgent_does_not_wait_and_the_newest_word_counts(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = Plugin(prefetch=True, host_tier=4096)
    weft = await start(FakeWorker(plugin=plugin))
    await until(lambda: plugin.messages)
    monkeypatch.setattr(control, "PERIOD_SECONDS", 60.0)
    await asyncio.sleep(0.3)  # the pause that began before has ended
    advise = weft.core.advisors[0]
    for priority in (3, 2, 1):
        advise(Reprioritise("w0", "b1", priority))
    advise(Prefetch("w0", "b1", 5.0))
    await until(lambda: plugin.fetched)
    types = [(action["action_type"], action["payload"].get("priority")) for action in plugin.actions]
    assert types == [("weft.priority", 1), ("kv.prefetch", None)]


async def test_a_fetch_is_told_before_all_that_can_wait(start: Start) -> None:
    plugin = Plugin(prefetch=True, host_tier=4096)
    weft = await start(FakeWorker(plugin=plugin))
    await until(lambda: plugin.messages)
    for number in range(300):
        weft.core.advisors[0](Retain("w0", f"b{number}", Hint(0.0)))
    weft.core.advisors[0](Prefetch("w0", "b299", 5.0))
    await until(lambda: len(plugin.retained) >= 300)
    first = next(message["actions"] for message in plugin.messages if message["actions"])
    assert [action["action_type"] for action in first] == ["weft.retain", "kv.prefetch"]
    assert len(first[0]["payload"]["owners"]) == 255


async def test_where_our_part_of_an_engine_fails_what_it_held_is_guessed_from_then_on(start: Start) -> None:
    plugin, weft, residency = await reporting(start)
    plugin.off = True
    await until(lambda: not residency.reports)
    assert residency.tokens("b1") == (64, 0)
    await weft.chat(headers={"x-session-id": "run"})
    assert residency.tokens(await owner_of(weft)) == (23, 0)


async def test_a_flood_of_advice_goes_in_small_messages_and_is_bounded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MOST_PENDING", 1000)
    plugin = Plugin()
    weft = await start(FakeWorker(plugin=plugin))
    await until(lambda: plugin.messages)
    for number in range(3000):
        weft.core.advisors[0](Retain("w0", f"b{number}", Hint(0.0)))
    await until(lambda: len(plugin.retained) >= 1000)
    assert max(len(action["payload"]["owners"]) for action in plugin.actions) <= 256
    assert plugin.retained == [f"b{n}" for n in range(2000, 3000)]
    assert 'weft_advice_total{status="dropped",worker="w0"} 2000.0' in await metrics(weft)


async def test_the_engines_key_is_sent_and_a_worker_without_plug_in_is_never_told_anything(start: Start) -> None:
    plugin = Plugin()
    weft = await start(FakeWorker(plugin=plugin, api_key="inner"), FakeWorker(), api_key="inner")
    await until(lambda: plugin.messages)
    for number in range(4):
        await weft.chat(headers={"x-session-id": f"run-{number}"})
    assert all(received.path != "/weft/control" for received in weft.workers[1].received)
    assert not weft.core.scheduler.workers["w1"].advised


async def test_an_engine_that_orders_gets_the_priority_in_a_header_and_no_other_does(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scheduler.actions import Dispatch
    from scheduler.scheduler import Scheduler

    handle = Scheduler.handle

    def first(self: Scheduler, event: object, now: float) -> list[Any]:
        from dataclasses import replace

        return [replace(a, priority=7) if isinstance(a, Dispatch) else a for a in handle(self, event, now)]  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "handle", first)
    weft = await start(FakeWorker(plugin=Plugin(order=True)), FakeWorker())
    for number in range(4):
        await weft.chat(headers={"x-session-id": f"run-{number}", "x-vllm-priority": "-5"})
    seen = [{one.headers.get("x-vllm-priority") for one in worker.received} for worker in weft.workers]
    assert seen == [{"7"}, {None}]


async def test_a_core_that_fails_on_advice_still_serves(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler.keeping import Keeping

    def broken(self: Keeping, *args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Keeping, "told", broken)
    monkeypatch.setattr(Keeping, "ended", broken)
    weft = await start(FakeWorker(plugin=Plugin()))
    async with weft.chat() as answer:
        assert answer.status == 200
    await weft.idle()
    assert weft.core.failures
