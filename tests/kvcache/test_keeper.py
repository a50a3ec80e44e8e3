"""What an engine keeps of hints for owners that come, stay and go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import keeper as keeper_module
from kvcache.keeper import BURST, PACE, Keeper
from kvcache.kvflow import KVFlow
from kvcache.ledger import ANONYMOUS, DEVICE, HOST, MOST_OWNERS
from kvcache.policy import DEAD, KNOWN, Hint, Policy
from kvcache.retention import Retention
from kvcache.saga import Saga

SOON = Hint(0.0, next_use=10.0)


@pytest.fixture
def keeper() -> Keeper:
    return Keeper(Retention(), 16)


def step(keeper: Keeper, owner: str, role: str | None, *keys: str) -> None:
    number = keeper.began(owner, keys, 1.0)
    keeper.wrote(owner, role, keys, 1.0, number)
    for key in keys:
        if not keeper.ledger.copies(key, DEVICE):
            keeper.ledger.gained(key, DEVICE)
    keeper.left(owner, 16 * len(keys), 1.0)


def rank(keeper: Keeper, *owners: str) -> int:
    class Stack:
        freed, tokens = 0.0, 16

    Stack.owners = owners  # type: ignore[attr-defined]
    return keeper.policy.rank(Stack(), 1.0)[0]  # type: ignore[arg-type]


def test_a_role_told_of_before_it_has_blocks_keeps_its_hint_however_many_strangers_come(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_STRANGERS", 4)
    keeper.told({"role": SOON}, 0.0)
    step(keeper, "a", "role", "system", "a")
    step(keeper, "b", "role", "system", "b")
    for number in range(9):
        keeper.told({f"stranger {number}": SOON}, 0.0)
    assert rank(keeper, "role") == KNOWN


def test_an_owner_that_came_by_the_host_alone_keeps_its_hint_however_many_strangers_come(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "MOST_STRANGERS", 4)
    keeper.told({"a": SOON}, 0.0)
    keeper.ledger.gained("key", HOST, "a")
    for number in range(9):
        keeper.told({f"stranger {number}": SOON}, 0.0)
    assert rank(keeper, "a") == KNOWN


def test_hints_go_with_the_last_block_of_an_owner(keeper: Keeper) -> None:
    step(keeper, "a", None, "key")
    keeper.told({"a": SOON}, 0.0)
    assert rank(keeper, "a") == KNOWN
    keeper.ledger.lost("key", DEVICE)
    keeper.sweep()
    assert rank(keeper, "a") != KNOWN


def test_a_released_owner_leaves_dead_blocks_and_no_trace_of_itself(keeper: Keeper) -> None:
    step(keeper, "a", None, "key")
    keeper.device.put([(1, "key")], 1.0)
    assert keeper.released("a", 2.0)
    assert [keeper.policy.rank(stack, 2.0)[0] for stack in keeper.device.order] == [DEAD]
    assert not keeper.released("a", 3.0)


def test_residency_is_told_in_tokens_and_only_where_it_changed(keeper: Keeper) -> None:
    step(keeper, "a", None, "x", "y")
    step(keeper, "b", None, "z")
    step(keeper, ANONYMOUS, None, "nobody's")
    assert keeper.residency() == {"a": (32, 0), "b": (16, 0)}
    assert keeper.residency() == {}
    keeper.ledger.gained("x", HOST)
    keeper.ledger.lost("z", DEVICE)
    assert keeper.residency() == {"a": (32, 16), "b": (0, 0)}
    assert keeper.residency(full=True) == {"a": (32, 16)}


def test_an_owner_that_came_and_went_between_two_reports_is_in_none(keeper: Keeper) -> None:
    step(keeper, "a", None, "x")
    keeper.ledger.lost("x", DEVICE)
    assert keeper.residency() == {}


def test_what_is_emptied_is_reported_empty(keeper: Keeper) -> None:
    step(keeper, "a", None, "x")
    keeper.residency()
    keeper.cleared(DEVICE)
    assert keeper.residency() == {"a": (0, 0)}


def test_what_is_released_while_a_step_waits_is_dead_when_that_has_left_unless_another_has_come() -> None:
    for another in (False, True):
        keeper = Keeper(Retention(), 16)
        keeper.began("a", None, 0.0)
        keeper.wrote("a", None, ("x",), 0.0)
        keeper.ledger.gained("x", DEVICE)
        keeper.left("a", 16, 0.0)
        number = keeper.began("a", ("x",), 1.0)
        assert keeper.released("a", 1.0)
        assert keeper.held("a") == (16, 0), "its step will find it"
        if another:
            keeper.began("a", ("x",), 2.0)
        keeper.wrote("a", None, ("x",), 3.0, number)
        keeper.left("a", 16, 3.0)
        if another:
            keeper.left("a", 16, 4.0)
        assert keeper.held("a") == ((16, 0) if another else (0, 0))


class Telling:
    """A keeper of owners with one free block each, and one that takes in at once whatever it is told."""

    def __init__(self, owners: int, policy: type[Policy] = Retention) -> None:
        self.both = Keeper(policy(), 16), Keeper(policy(), 16)
        self.owners = [f"o{number}" for number in range(owners)]
        for keeper in self.both:
            for number, owner in enumerate(self.owners):
                step(keeper, owner, None, owner)
                keeper.device.put([(number, owner)], 1.0)
        self.taken: list[tuple[float, int]] = []  # when the first one took in what it was told, of how many owners
        does = self.both[0].policy.told

        def takes(hints: Mapping[str, Hint], now: float) -> None:
            self.taken.append((now, len(hints)))
            does(hints, now)

        self.both[0].policy.told = takes  # type: ignore[method-assign]

    def tell(self, owners: Iterable[str], ahead: float, now: float) -> None:
        for keeper in self.both:
            hint = Hint(now, steps=ahead, next_use=now + ahead, hold=ahead, reuse=0.5)
            keeper.told(dict.fromkeys(owners, hint), now)
        self.both[1].settle(now, at_once=True)

    @property
    def hints(self) -> tuple[dict[str, Hint], dict[str, Hint]]:
        one, other = (keeper.policy._hints for keeper in self.both)  # type: ignore[attr-defined]
        return one, other

    @property
    def orders(self) -> tuple[list[int], list[int]]:
        one, other = (list(keeper.device) for keeper in self.both)
        return one, other


def test_what_the_core_tells_no_faster_than_the_pace_is_ranked_by_at_once() -> None:
    told = Telling(1000)
    for turn in range(20):
        told.tell(told.owners[turn % 10 :: 10], 100.0 - turn, 2.0 + turn / 10)
        one, other = told.orders
        assert one == other


def test_of_a_flood_the_last_word_on_each_owner_is_taken_in_at_the_pace() -> None:
    told = Telling(400)
    paced, taken = told.both[0], told.taken
    for turn in range(1000):
        now = 2.0 + turn / 1000
        told.tell(told.owners, 1.0 + turn % 7, now)
        told.tell(told.owners[:9], 50.0, now)
        paced.settle(now)
    assert PACE - BURST <= sum(owners for _, owners in taken) <= PACE + BURST
    assert max(owners for _, owners in taken) == BURST
    assert told.hints[0] != told.hints[1]
    paced.settle(3.0 + BURST / PACE)
    paced.settle(3.0 + 2 * BURST / PACE)
    assert told.hints[0] == told.hints[1]
    one, other = told.orders
    assert one == other
    number = len(taken)
    paced.settle(9.0)
    assert len(taken) == number, "there is nothing to take in"


def test_of_a_flood_whoever_has_waited_longest_is_taken_in_first() -> None:
    told = Telling(1000)
    for turn in range(1000):
        told.tell(told.owners, 9.0, 2.0 + turn / 1000)
    told.both[0].settle(3.0 + BURST / PACE)
    assert [*told.hints[0]] == told.owners, "each has had its turn"


def test_a_few_owners_at_a_time_are_taken_in_at_the_pace_and_no_faster() -> None:
    told = Telling(100)
    for turn in range(1000):
        told.tell(told.owners[turn % 10 :: 10], 1.0 + turn % 7, 2.0 + turn / 1000)
    assert PACE - 100 <= sum(owners for _, owners in told.taken) <= PACE + BURST


def test_what_was_told_of_an_owner_whose_last_block_is_gone_is_not_taken_in(keeper: Keeper) -> None:
    step(keeper, "a", None, "key")
    keeper.told({f"stranger {number}": SOON for number in range(300)}, 1.0)
    keeper.told({"a": SOON}, 1.0)
    keeper.ledger.lost("key", DEVICE)
    keeper.sweep()
    keeper.settle(1.0, at_once=True)
    assert "a" not in keeper.policy._hints  # type: ignore[attr-defined]
    assert rank(keeper, "a") != KNOWN


def test_when_all_is_ranked_anew_it_is_by_all_that_was_told(keeper: Keeper) -> None:
    for owner in "ab":
        step(keeper, owner, None, owner)
    keeper.device.put([(1, "a"), (2, "b")], 1.0)
    keeper.told({f"stranger {number}": SOON for number in range(300)}, 1.0)
    keeper.told({"a": Hint(1.0, next_use=9.0), "b": Hint(1.0, next_use=90.0)}, 1.0)
    keeper.rerank(1.0)
    assert list(keeper.device) == [2, 1]


EVENTS = st.tuples(st.sampled_from(("tell", "begin", "end", "release", "wait")), st.integers(0, 3), st.integers(1, 90))


@pytest.mark.parametrize("policy", [Retention, Saga, KVFlow])
@given(events=st.lists(EVENTS))
def test_what_was_told_before_an_event_of_its_owner_counts_before_it(
    policy: type[Policy], events: list[tuple[str, int, int]]
) -> None:
    told = Telling(4, policy)
    now, running = 2.0, [0] * 4
    for event, number, figure in events:
        owner = told.owners[number]
        if event == "tell":
            told.tell([owner, *(f"{owner}{other}" for other in range(300))], figure, now)
        elif event == "wait":
            now += figure / 1000
        elif event == "begin":
            running[number] += 1
            for keeper in told.both:
                keeper.began(owner, (owner,), now)
        elif event == "end" and running[number]:
            running[number] -= 1
            for keeper in told.both:
                keeper.left(owner, 16, now)
        elif event == "release":
            for keeper in told.both:
                keeper.released(owner, now)
    told.both[0].settle(now, at_once=True)
    assert told.hints[0] == told.hints[1]
    one, other = told.orders
    assert one == other


def test_a_role_that_many_share_is_ranked_by_as_many_branches_as_without_it(keeper: Keeper) -> None:
    for number in range(MOST_OWNERS + 4):
        role = "role" if number > MOST_OWNERS + 1 else None
        keys = ("system", f"b{number}")
        step(keeper, f"b{number}", role, *keys)
        if number == 0:
            keeper.ledger.gained("system", HOST)
            keeper.host.put([("system", "system")], 1.0)
        (stack,) = keeper.host.order
        assert keeper.host.order._entries[stack][4] == tuple(stack.owners)
    assert "role" in stack.owners
    assert len(stack.owners) == MOST_OWNERS + 1
