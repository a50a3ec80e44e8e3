"""vLLM's real scheduler lets short prefills pass long ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from kvcache.ledger import HOST
from tests.kvcache.plugin.schedulers import BLOCK, Played

STEP = 4 * BLOCK


class Late(KVConnectorBase_V1):
    """Has what a prompt has before its last tokens, where its name says how many those are; it takes a while."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        new = request.request_id.partition("+")[2]
        more = request.num_tokens - int(new) - num_computed_tokens if new else 0
        return max(0, more), more > 0

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...


def playing(**arguments: Any) -> Played:
    """Steps of four blocks."""
    given = {"max_num_seqs": 8, "blocks": 40} | arguments
    return Played(max_num_batched_tokens=STEP, **given)


def text(first: int, tokens: int) -> list[int]:
    return [first + place % 7 for place in range(tokens)]


def step(played: Played, loaded: Iterable[str] = ()) -> dict[str, int]:
    """The tokens that one step computes of each request; what is `loaded` is there at its end."""
    played.begin()
    planned: dict[str, int] = dict(played._flying[-1].num_scheduled_tokens)
    played.finish(loaded)
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


def test_who_has_passed_gets_a_token_in_each_later_step() -> None:
    played = playing()
    played.ask("long", text(5, 500), "a.r")
    step(played)
    played.ask("short", text(50, 20), "b.r", tokens=6)
    assert step(played) == {"long": STEP - 20, "short": 20}
    for _ in range(2):
        assert step(played) == {"long": STEP - 1, "short": 1}


def late(**arguments: Any) -> Played:
    connector = KVTransferConfig(kv_connector="Late", kv_connector_module_path=__name__, kv_role="kv_both")
    return playing(kv_transfer_config=connector, **arguments)


def test_who_has_been_loaded_passes_too() -> None:
    played = late()
    played.ask("long", text(5, 500), "a.r")
    step(played)
    played.ask("back+20", text(50, 20 + BLOCK), "b.r")
    assert step(played) == {"long": STEP - 20 - BLOCK}
    assert step(played, ["back+20"]) == {"long": STEP}
    assert step(played) == {"long": STEP - 20, "back+20": 20}


def hosted(played: Played, request: Request, blocks: int) -> None:
    """The host tier has so many blocks of its prompt, as far as is known."""
    for key in request.block_hashes[:blocks]:
        played.scheduler._steps._keeper.ledger.gained(bytes(key), HOST)


def test_a_long_one_that_has_been_loaded_does_not_keep_a_short_one_back() -> None:
    """It takes the room that was kept, and the next step keeps it again."""
    played = late()
    played.ask("long", text(5, 500), "a.r")
    step(played)
    hosted(played, played.ask("back+200", text(50, 200 + BLOCK), "b.r"), 1)
    assert step(played, ["back+200"]) == {"long": STEP - 1}
    played.ask("short", text(80, 20), "c.r")
    assert step(played) == {"long": STEP - 20, "back+200": 20}
    assert step(played) == {"long": (STEP - 20) // 2, "back+200": (STEP - 20) // 2, "short": 20}


def test_what_the_host_has_is_loaded_at_once() -> None:
    """One token is kept free for it: with none left vLLM looks at nobody who waits."""
    played = playing()
    played.ask("long", text(5, 500), "a.r")
    step(played)
    hosted(played, played.ask("back", text(50, 200), "b.r"), 4)
    assert step(played) == {"long": STEP - 1, "back": 1}


def test_who_lacks_a_place_has_no_room_kept() -> None:
    played = playing(max_num_seqs=2)
    played.ask("long", text(5, 500), "a.r")
    step(played)
    played.ask("one", text(30, 40), "b.r", tokens=2)
    assert step(played) == {"long": STEP - 40, "one": 40}
    played.ask("two", text(50, 20), "c.r")
    assert step(played) == {"long": STEP - 1, "one": 1}
    assert step(played)["two"] == 20


def test_who_lacks_something_else_has_room_kept_once_until_somebody_ends() -> None:
    """As if its adapter had no place."""
    played = playing()
    played.ask("long", text(5, 500), "a.r")
    step(played)
    played.ask("short", text(50, 20), "b.r")
    queue, scheduler = played.scheduler.waiting, played.scheduler
    step(played)
    other = played.ask("other", text(70, 20), "c.r")
    schedule = AsyncScheduler.schedule
    threshold = []

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        threshold.append(self.scheduler_config.long_prefill_token_threshold)
        queue.remove_requests([other])
        try:
            return schedule(self, *args, **kwargs)
        finally:
            queue.add_request(other)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AsyncScheduler, "schedule", without)
        for _ in range(2):
            step(played)
    assert threshold == [STEP - 21, 0]
    assert scheduler.abilities["passing"]


def test_nobody_passes_who_takes_memory_that_is_needed() -> None:
    played = playing(blocks=15)
    played.ask("long", text(5, 430), "a.r")
    step(played)
    played.ask("short", text(50, STEP // 2), "b.r")
    assert [step(played) for _ in range(2)] == [{"long": STEP}] * 2


def test_what_another_computes_is_not_new_as_far_as_that_has_come() -> None:
    """Two steps later the one behind is short."""
    played = playing()
    played.ask("long", text(5, 480), "a.r")
    step(played)
    played.ask("same", [*text(5, 2 * STEP), *text(90, 40)], "b.r")
    assert step(played) == {"long": STEP}
    assert step(played) == {"long": STEP - 40, "same": 40}


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 8), st.one_of(st.integers(1, 60), st.integers(1, 440)), st.integers(1, 6), st.integers(0, 3)
        ),
        min_size=1,
        max_size=8,
    ),
    blocks=st.sampled_from([15, 20, 40]),
)
def test_all_are_answered_in_any_mix(depth: int, asked: list[tuple[int, int, int, int]], blocks: int) -> None:
    """With as little memory as one takes some are preempted; texts are shared."""
    played = playing(blocks=blocks, max_num_seqs=4)
    expected = {f"r{number}": output for number, (_, _, output, _) in enumerate(asked)}
    for now in range(9):
        for number, (at, prompt, output, kind) in enumerate(asked):
            if at == now:
                played.ask(f"r{number}", text(5 + 10 * kind, prompt), f"s{number}.r", tokens=output)
        if played.scheduler.has_requests():
            step(played)
    played.run(depth)
    assert {name: len(tokens) for name, tokens in played.outputs.items()} == expected
    assert played.scheduler.abilities["passing"], "nothing has failed"
    assert played.pool.get_num_free_blocks() == blocks


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
