"""Our scheduler over vLLM's real one: whose blocks are whose, who waits and who is preempted, and what a fault does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus

from kvcache.plugin.engine import WeftScheduler
from kvcache.plugin.free_queue import OwnerQueue, key_of
from kvcache.shadow import Guarded
from tests.kvcache.plugin.schedulers import BLOCK, Played, full


def text(letter: int, blocks: int, rest: int = 1) -> list[int]:
    return [letter] * (blocks * BLOCK) + [1] * rest


def window(block: int = BLOCK, tokens: int = 2 * BLOCK) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=tokens
    )  # fmt: skip


def residency(played: Played) -> dict[str, list[int]]:
    owners: dict[str, list[int]] = played.scheduler({"residency": {"seen": -1}})["residency"]["owners"]
    return owners


def test_what_it_can_do_it_says() -> None:
    played = Played()
    able = played.scheduler({"ask": "abilities"})
    assert able == {
        "plugin": True, "vllm": able["vllm"], "supported": True, "eviction": True, "guard": True, "order": True,
        "passing": True, "control": True, "session": True, "residency": True, "host_tier": 0, "prefetch": False,
        "block": BLOCK, "why": [],
    }  # fmt: skip
    assert isinstance(played.pool.free_block_queue, OwnerQueue)
    assert isinstance(played.scheduler._guard, Guarded)


def test_without_the_priority_policy_the_order_of_waiting_is_vllms() -> None:
    played = Played(scheduling_policy="fcfs")
    assert not played.scheduler.abilities["order"]
    assert type(played.scheduler.waiting) is FCFSRequestQueue
    answer = played.tell(1, ("weft.priority", {"owner": "a", "priority": 1}))
    assert answer["counts"]["unsupported"] == 1
    assert played.scheduler.abilities["eviction"]


def test_the_guard_can_be_left_out() -> None:
    played = Played(additional_config={"weft_guard": False, "weft_policy": "lru"})
    assert not played.scheduler.abilities["guard"]
    assert played.scheduler.abilities["eviction"]
    played.ask("1", text(5, 2), "a.r")
    played.run()
    assert "guard_weight" not in played.scheduler({})["gauges"]


def test_a_policy_that_does_not_exist_leaves_vllm_as_it_is() -> None:
    played = Played(additional_config={"weft_policy": "mru"})
    assert not played.scheduler.abilities["eviction"]
    assert "mru" in played.scheduler.abilities["why"][-1]
    assert type(played.pool.free_block_queue) is FreeKVCacheBlockQueue


@pytest.mark.parametrize("place", [0, 1])
def test_of_several_groups_the_one_with_full_attention_tells_the_line_and_tokens_count_once(place: int) -> None:
    specs = [window(), full()] if place else [full(), window()]
    played = Played(40, specs)
    played.ask("1", text(5, 6), "a.r", tokens=BLOCK)
    played.run()
    assert residency(played) == {"a": [7 * BLOCK, 0]}
    named = [key_of(block) for block in played.pool.blocks if block.block_hash is not None]
    assert len(named) > len(set(named)) == 7  # the window's blocks share the keys
    played.ask("2", text(5, 6, 5), "a.r")
    played.run(2)
    assert played.found["2"] == 6 * BLOCK
    assert residency(played)["a"] == [6 * BLOCK, 0]
    played.tell(1, ("kv.release", {"owner": "a"}))
    assert "a" not in residency(played)
    assert played.scheduler.abilities["why"] == []


def test_groups_of_other_block_sizes_have_lines_but_no_foretold_ones() -> None:
    played = Played(60, [full(2 * BLOCK), window()], hash_block=BLOCK)
    assert played.scheduler.abilities["block"] == 2 * BLOCK
    for name in "12":
        played.ask(name, text(5, 6), "a.r")
        played.run(2)
    assert residency(played) == {"a": [6 * BLOCK, 0]}
    assert played.scheduler.abilities["why"] == []


def test_a_model_with_a_state_beside_its_attention_is_kept_by_its_attention() -> None:
    state = MambaSpec(block_size=BLOCK, shapes=((2, 2),), dtypes=(torch.float32,), mamba_cache_mode="align")
    played = Played(40, [state, full()], mamba_cache_mode="align")
    for name in "123":
        played.ask(name, text(5, 4), "a.r", tokens=2 * BLOCK)
        played.run(2)
    assert residency(played)["a"][0] >= 4 * BLOCK
    assert played.scheduler.abilities["why"] == []


def test_without_full_attention_blocks_go_as_in_vllm_and_the_rest_works() -> None:
    played = Played(40, [window()])
    able = played.scheduler.abilities
    assert (able["eviction"], able["residency"], able["guard"], able["order"]) == (False, False, False, True)
    assert able["why"] == ["eviction: no KV group with full attention"]
    assert type(played.pool.free_block_queue) is FreeKVCacheBlockQueue
    requests = [played.ask(name, text(5, 2), f"{name}.r") for name in "ab"]
    played.tell(1, ("weft.priority", {"owner": "a", "priority": 9}))
    assert played.scheduler.waiting.peek_request() is requests[1]
    played.run(2)
    assert len(played.scheduler._steps) == 0


def test_without_prefix_caching_there_is_nothing_to_keep() -> None:
    played = Played(enable_prefix_caching=False)
    assert played.scheduler.abilities["why"] == ["eviction: prefix caching is off"]
    played.ask("1", text(5, 2), "a.r")
    played.run()


def test_waiting_requests_go_by_the_header_until_the_core_says_otherwise() -> None:
    played = Played()
    names = {"a": 3, "b": 2, "c": 1, "d": 1}
    for place, (name, priority) in enumerate(names.items()):
        played.ask(name, text(5, 1), f"{name}.r", priority=priority, arrival_time=float(place))

    def order() -> str:
        return "".join(request.request_id for request in played.scheduler.waiting)

    assert order() == "cdba"
    played.tell(1, ("weft.priority", {"owner": "a", "priority": 0.5}), ("weft.priority", {"owner": "c", "priority": 7}))
    assert order() == "adbc"
    played.ask("e", text(5, 1), "a.other", arrival_time=9.0)
    assert order() == "aedbc"
    played.abort("d")
    played.tell(2, ("weft.priority", {"owner": "nobody", "priority": 0.5}))
    assert order() == "aebc"
    assert type(played.scheduler.waiting) is PriorityRequestQueue


def test_whom_the_core_puts_last_is_preempted_and_waits_before_those_behind_it() -> None:
    played = Played(8)
    for place, name in enumerate("abc"):
        played.ask(name, text(ord(name), 2), f"{name}.r", tokens=3 * BLOCK, priority=5, arrival_time=float(place))
    played.ask("d", text(9, 2), "d.r", priority=9, arrival_time=9.0)
    played.begin()
    assert [request.request_id for request in played.scheduler.running] == ["a", "b"]
    played.tell(1, ("weft.priority", {"owner": "a", "priority": 8}))
    requests = dict(played.scheduler.requests)
    while not any(request.num_preemptions for request in requests.values()):
        played.begin()
        played.finish()
    assert requests["a"].num_preemptions == 1
    assert requests["a"].status == RequestStatus.PREEMPTED
    assert [request.request_id for request in played.scheduler.waiting] == ["c", "a", "d"]
    played.run()
    assert {name: len(said) for name, said in played.outputs.items()} == {"a": 96, "b": 96, "c": 96, "d": 4}
    assert len(played.scheduler._steps) == 0


def test_a_step_that_ends_after_a_later_one_does_not_take_the_line_back() -> None:
    played = Played(20)
    played.ask("1", text(5, 3), "a.r", tokens=3 * BLOCK)
    played.ask("2", [*text(5, 1, 0), *text(6, 3)], "a.r", tokens=1)
    played.run(2)
    keeper = played.scheduler._steps._keeper
    assert len(keeper.ledger.line("a")) == 4
    assert residency(played)["a"] == [4 * BLOCK, 0]


def test_what_the_pool_forgets_is_forgotten_whatever_the_connector_says() -> None:
    played = Played()
    played.ask("1", text(5, 3), "a.r")
    played.run()
    assert residency(played) == {"a": [3 * BLOCK, 0]}
    played.scheduler.connector = SimpleNamespace(reset_cache=lambda: False)
    assert played.scheduler.reset_prefix_cache(reset_connector=True) is False
    played.scheduler.connector = None
    assert residency(played) == {}
    played.ask("2", text(5, 3), "a.r")
    played.run()
    assert played.found["2"] == 0
    assert residency(played) == {"a": [3 * BLOCK, 0]}


def test_what_a_request_would_have_computed_in_the_step_in_which_it_is_preempted_is_not_there() -> None:
    played = Played(9, asynchronous=False, max_num_batched_tokens=4 * BLOCK, long_prefill_token_threshold=2 * BLOCK)
    long = played.ask("a", range(8 * BLOCK), "a.r", priority=9)
    played.begin()
    played.finish()
    played.ask("b", [5] * BLOCK, "b.r", priority=0)
    played.begin()
    played.finish()
    assert long.num_computed_tokens == 6 * BLOCK
    played.begin()
    assert long.num_preemptions == 1
    there = [played.pool.get_cached_block(one, [0]) is not None for one in long.block_hashes]
    assert there == [True] * 6 + [False] * 2
    played.finish()
    played.run()
    assert {name: len(said) for name, said in played.outputs.items()} == {"a": 4, "b": 4}


def test_a_reset_while_requests_run_forgets_nothing_or_preempts_them() -> None:
    played = Played()
    played.ask("1", text(5, 3), "a.r")
    played.run()
    played.ask("2", text(5, 3), "a.r", tokens=BLOCK)
    played.begin()
    assert played.scheduler.reset_prefix_cache() is False
    assert residency(played) == {"a": [3 * BLOCK, 0]}
    assert played.scheduler.reset_prefix_cache(reset_running_requests=True) is True
    assert residency(played) == {}
    played.finish()
    played.run(2)
    assert len(played.outputs["2"]) == BLOCK
    assert residency(played) == {"a": [4 * BLOCK, 0]}
    assert played.pool.get_num_free_blocks() == 16


FAULTS = ["began", "wrote", "left", "sweep", "told", "settle"]


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize(
    "where", [*FAULTS, "policy.rank", "guard.looked", "guard.freed", "ledger.gained", "device.take"]
)
def test_when_ours_fails_vllm_goes_on_as_if_it_had_never_been(where: str, after: int) -> None:
    ours, stock = Played(10), Played(10, kind=AsyncScheduler)
    keeper = ours.scheduler._steps._keeper
    of, name = {
        "policy.rank": (keeper.policy, "rank"), "guard.looked": (ours.scheduler._guard, "looked"),
        "guard.freed": (ours.scheduler._guard, "freed"), "ledger.gained": (keeper.ledger, "gained"),
        "device.take": (keeper.device, "take"),
    }.get(where, (keeper, where))  # fmt: skip
    count, does = 0, getattr(of, name)

    def fails(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise ArithmeticError("not today")
        return does(*args, **more)

    setattr(of, name, fails)
    for number in range(24):
        for played in (ours, stock):
            played.ask(f"{number}", text(number % 7, 2), None, tokens=BLOCK + number % 3)
            if number % 4 == 3:
                played.run(2)
        ours.tell(number, ("kv.retain", {"owner": "a", "next_use": 1.0}), residency={"seen": -1})
    assert (ours.outputs, ours.found) == (stock.outputs, stock.found)
    assert ours.pool.get_num_free_blocks() == stock.pool.get_num_free_blocks() == 10
    if count > after:
        assert "ArithmeticError: not today" in ours.scheduler.abilities["why"]
        assert not ours.scheduler.abilities["eviction"]
        assert ours.tell(99, ("kv.release", {"owner": "a"}))["counts"]["unsupported"] == 1
        assert count == after + 1


def test_hints_that_lose_to_lru_lose_their_weight_and_blocks_are_ranked_anew() -> None:
    played = Played(24)
    for number in range(40):
        owner = f"{'ab'[number % 2]}.r"
        for stale in range(3):
            played.ask(f"{number}s{stale}", text(100 + 3 * number + stale, 2), f"s{number}{stale}.r")
            played.run()
            played.tell(
                1000 * number + stale, ("kv.retain", {"owner": f"s{number}{stale}", "next_use": 0.0, "leased": True})
            )
        played.ask(f"{number}", text(ord(owner[0]), 3), owner)
        played.run()
    gauges = played.scheduler({})["gauges"]
    assert gauges["guard_weight"] < 1
    assert gauges["guard_lru_hits_total"] > gauges["guard_hits_total"]
    assert sum(played.found[str(number)] for number in range(20, 40)) > 0


def test_steps_that_are_admitted_together_find_in_the_shadow_what_they_find_in_the_cache() -> None:
    """Also what they share, and where the pool is full to the last block."""
    played = Played(11)
    for again in ("", " again"):
        for name, letter in (("a", 5), ("b", 6), ("c", 6)):
            played.ask(name + again, text(letter, 4))
        played.run()
    gauges = played.scheduler({})["gauges"]
    assert [played.found[name] for name in ("a again", "b again", "c again")] == [4 * BLOCK] * 3
    assert gauges["guard_lru_hits_total"] == gauges["guard_hits_total"] >= 12


@pytest.mark.parametrize("late", [False, True])
def test_blocks_that_come_back_late_take_no_room_twice_in_the_shadow(late: bool) -> None:
    played = Played(11)
    played.scheduler.defer_block_free = late
    for again in ("", " again"):
        for name, letter in (("a", 5), ("b", 6)):
            played.ask(name + again, text(letter, 4))
        played.run(2)
    gauges = played.scheduler({})["gauges"]
    assert gauges["guard_lru_hits_total"] == gauges["guard_hits_total"] == 8


def test_blocks_that_come_back_late_count_as_in_use_as_long_as_others_share_them() -> None:
    played = Played(24)
    played.scheduler.defer_block_free = True
    for name in ("a", "b", "c"):
        played.ask(name, text(5, 4), tokens=40)
    for _ in range(3):
        played.begin()
        played.finish()
    played.begin()
    assert played.scheduler._used == 4 + 3
    played.abort("a")
    played.abort("b")
    assert played.scheduler._used == 4 + 1
    played.ask("d", text(5, 4), tokens=40)
    played.begin()
    assert played.scheduler._used == 4 + 2
    played.run()
    assert played.scheduler._used == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_with_steps_in_flight_it_schedules_what_vllm_would(asynchronous: bool) -> None:
    """Synchronously nothing of a request whose token is still on its way, as pipeline parallelism relies on."""
    told = []
    for kind in (AsyncScheduler if asynchronous else Scheduler, WeftScheduler):
        played = Played(asynchronous=asynchronous, kind=kind)
        played.ask("a", text(7, 1))
        told.append([dict(played.scheduler.schedule().num_scheduled_tokens) for _ in range(2)])
    assert told[0] == told[1] == [{"a": BLOCK + 1}, {"a": 1} if asynchronous else {}]
