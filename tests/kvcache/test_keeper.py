"""What an engine keeps of hints for owners that come, stay and go."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import keeper as keeper_module
from kvcache.keeper import PACE, TOGETHER, Keeper
from kvcache.ledger import ANONYMOUS, DEVICE, HOST
from kvcache.policy import DEAD, KNOWN, Hint
from kvcache.retention import Retention

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

    def __init__(self, owners: int) -> None:
        self.both = Keeper(Retention(), 16), Keeper(Retention(), 16)
        self.owners = [f"o{number}" for number in range(owners)]
        for keeper in self.both:
            for number, owner in enumerate(self.owners):
                step(keeper, owner, None, owner)
                keeper.device.put([(number, owner)], 1.0)

    def tell(self, owners: Iterable[str], ahead: float, now: float) -> None:
        for keeper in self.both:
            keeper.told({owner: Hint(now, next_use=now + ahead) for owner in owners}, now)
        self.both[1].settle(now, due=False)

    def order(self, now: float) -> tuple[list[int], list[int]]:
        for keeper in self.both:
            keeper.device.order.rerank(now)
        paced, prompt = map(list, (self.both[0].device, self.both[1].device))
        return paced, prompt


def test_what_the_core_tells_at_its_own_pace_is_ranked_by_at_once() -> None:
    told = Telling(100)
    for turn in range(20):
        now = 2.0 + turn / 10
        told.tell(told.owners[turn::20], 100.0 - turn, now)
        paced, prompt = told.order(now)
        assert paced == prompt


def test_of_a_flood_the_last_word_on_each_owner_counts_a_tenth_of_a_second_later() -> None:
    told = Telling(200)
    taken = []
    paced, policy_told = told.both[0], told.both[0].policy.told
    paced.policy.told = lambda hints, now: (taken.append(len(hints)), policy_told(hints, now))[1]  # type: ignore[method-assign]
    for turn in range(1000):
        told.tell(told.owners, 1.0 + turn % 7, 2.0 + turn / 1000)
        told.tell(told.owners[:9], 50.0, 2.0 + turn / 1000)
    assert sum(taken) <= 1.2 * (PACE + PACE * TOGETHER)
    paced.settle(3.0 + TOGETHER)
    assert paced.settle(3.0 + TOGETHER) is None
    one, other = told.order(3.0 + TOGETHER)
    assert one == other


@given(
    st.lists(
        st.tuples(st.sampled_from(("tell", "begin", "end", "release", "wait")), st.integers(0, 3), st.integers(1, 90))
    )
)
def test_what_was_told_before_an_event_of_its_owner_counts_before_it(events: list[tuple[str, int, int]]) -> None:
    told = Telling(4)
    now, running = 2.0, [0] * 4
    for event, number, figure in events:
        owner = told.owners[number]
        if event == "tell":
            told.tell([owner, *(f"{owner}{other}" for other in range(300))], figure, now)
        elif event == "wait":
            now += figure / 1000
        elif event == "end" and not running[number]:
            continue
        else:
            running[number] += {"begin": 1, "end": -1}.get(event, 0)
            for keeper in told.both:
                if event == "begin":
                    keeper.began(owner, (owner,), now)
                elif event == "end":
                    keeper.left(owner, 16, now)
                else:
                    keeper.released(owner, now)
    told.both[0].settle(now, due=False)
    assert told.both[0].policy._hints == told.both[1].policy._hints  # type: ignore[attr-defined]
    one, other = told.order(now)
    assert one == other
