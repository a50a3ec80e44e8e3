"""vLLM's real scheduler lets short prefills pass long ones."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.kvcache.plugin.schedulers import BLOCK, Played

STEP = 4 * BLOCK


def playing(**arguments: Any) -> Played:
    """Steps of four blocks."""
    return Played(40, max_num_batched_tokens=STEP, max_num_seqs=8, **arguments)


def text(first: int, tokens: int) -> list[int]:
    return [first + place % 7 for place in range(tokens)]


def step(played: Played) -> dict[str, int]:
    """The tokens that one step computes of each request."""
    played.begin()
    planned: dict[str, int] = dict(played._flying[-1].num_scheduled_tokens)
    played.finish()
    return planned


def test_a_turn_with_little_that_is_new_does_not_wait_behind_a_long_context() -> None:
    """In stock vLLM it does."""
    for kind, planned in ((None, {"long": STEP - 20, "short": 20}), (AsyncScheduler, {"long": STEP})):
        played = playing() if kind is None else playing(kind=kind)
        played.ask("long", text(5, 400), "a.r")
        assert step(played) == {"long": STEP}
        played.ask("short", text(50, 20), "b.r")
        assert step(played) == planned
        played.run()
        assert {name: len(tokens) for name, tokens in played.outputs.items()} == {"long": 4, "short": 4}


def test_what_lies_in_the_cache_is_not_new() -> None:
    played = playing()
    played.ask("before", text(50, 300), "b.r")
    played.run()
    played.ask("long", text(5, 400), "a.r")
    step(played)
    played.ask("after", text(50, 310), "b.r")
    assert step(played) == {"long": STEP - 310 + 9 * BLOCK, "after": 310 - 9 * BLOCK}


def test_of_two_long_ones_the_first_goes_first() -> None:
    played = playing()
    played.ask("one", text(5, 400), "a.r")
    played.ask("two", text(50, 400), "b.r")
    assert [step(played) for _ in range(3)] == [{"one": STEP}] * 3
    assert step(played) == {"one": 400 - 3 * STEP, "two": 4 * STEP - 400}


def test_a_flood_of_short_ones_leaves_the_long_one_half() -> None:
    played = playing()
    played.ask("long", text(5, 400), "a.r")
    step(played)
    chunks = []
    for number in range(9):
        played.ask(f"s{number}", text(50 + 9 * number, STEP // 2), "b.r", tokens=1)
        chunks.append(step(played).get("long", 0))
    computed = [chunk for chunk in chunks if chunk > 1]
    assert sum(computed) == 400 - STEP
    assert min(computed[:-1]) == STEP // 2


def test_a_threshold_of_the_users_own_stays() -> None:
    played = playing(long_prefill_token_threshold=BLOCK)
    assert played.scheduler.abilities["passing"] is False
    assert played.scheduler.abilities["why"] == ["passing: --long-prefill-token-threshold is set"]
    played.ask("long", text(5, 400), "a.r")
    played.ask("short", text(50, 20), "b.r")
    assert step(played) == {"long": BLOCK, "short": 20}
    assert played.scheduler.scheduler_config.long_prefill_token_threshold == BLOCK


def test_once_ours_is_off_a_step_is_vllms_own() -> None:
    played = playing()
    played.ask("long", text(5, 400), "a.r")
    step(played)
    played.ask("short", text(50, 20), "b.r")
    step(played)
    played.scheduler._turn_off(RuntimeError("broken on purpose"))
    assert played.scheduler.scheduler_config.long_prefill_token_threshold == 0
    played.ask("next", text(70, 20), "c.r")
    assert step(played) == {"long": STEP}
