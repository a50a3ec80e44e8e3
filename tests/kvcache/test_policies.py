"""What holds for every policy that goes by hints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.belady import Belady
from kvcache.kvflow import KVFlow
from kvcache.policies import POLICIES
from kvcache.policy import DEAD, UNKNOWN, Foretold, Hint, Policy
from kvcache.retention import Retention
from kvcache.saga import Saga
from scheduler.gaps import GAPS, Gap
from tests.kvcache.stacks import Run, order_of

GAP = Gap(GAPS.log_normal(5.0, 1.0), 0.1)
GUIDED = [Retention, KVFlow, Belady]
ALL = [*GUIDED, Saga]
HINT = Hint(since=0, steps=1, next_use=50, hold=500, reuse=0.9, leased=True)


def informed(kind: type[Foretold], *owners: str) -> Foretold:
    policy = kind()
    for owner in owners:
        policy.started(owner, 0)
        policy.finished(owner, 1000, 0)
        policy.told({owner: HINT}, 0)
    return policy


def test_every_policy_has_its_name() -> None:
    assert {name: kind.name for name, kind in POLICIES.items()} == {name: name for name in POLICIES}
    assert set(POLICIES) == {"lru", "saga", "kvflow", "belady", "retention"}


def test_who_is_told_nothing_waits_as_others_who_have_had_a_step_and_not_as_a_role() -> None:
    def rank(*told: str) -> tuple[int, float]:
        policy = Retention()
        policy.started("other", 0)
        policy.finished("other", 1000, 0)
        policy.told({owner: Hint(0, gap=GAP, leased=True) for owner in told}, 0)
        policy.started("new", 1)
        policy.finished("new", 1000, 1)
        return policy.rank(Run(("new",), 1), 2)

    assert rank("role") == rank() == (UNKNOWN, 1)
    assert rank("other") == rank("other", "role") > (UNKNOWN, 1)


@pytest.mark.parametrize("kind", GUIDED)
@given(freed=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100)), max_size=20), now=st.floats(100, 200))
def test_who_is_told_nothing_ranks_as_lru(kind: type[Foretold], freed: list[tuple[str, float]], now: float) -> None:
    policy, lru = kind(), Policy()
    for owner, at in freed:
        policy.started(owner, at)
        policy.finished(owner, 100, at)
    for owner, at in freed:
        run = Run((owner,), at)
        assert policy.rank(run, now) == lru.rank(run, now)


@pytest.mark.parametrize("kind", ALL)
def test_a_stack_without_owners_goes_first_and_then_what_was_released_the_oldest_before(kind: type[Foretold]) -> None:
    policy = informed(kind, "told", "gone")
    policy.released("gone", 1)
    nobody, gone, unknown, told = Run((), 9), Run(("gone",), 10), Run(("new",), 1), Run(("told",), 2)
    ranked = sorted([told, unknown, gone, nobody], key=lambda run: policy.rank(run, 11))
    assert ranked == [nobody, gone, unknown, told]


@pytest.mark.parametrize("kind", ALL)
def test_a_block_is_dead_only_when_all_its_owners_are(kind: type[Foretold]) -> None:
    policy = informed(kind, "a", "b")
    shared = Run(("a", "b"))
    policy.released("a", 1)
    assert policy.rank(shared, 1) == policy.rank(Run(("b",)), 1)
    policy.released("b", 1)
    assert policy.rank(shared, 1)[0] == DEAD


@pytest.mark.parametrize("kind", ALL)
def test_the_dead_are_alive_again_when_they_start_but_not_when_a_step_of_theirs_ends(kind: type[Foretold]) -> None:
    policy = kind()
    policy.started("a", 0)
    policy.released("a", 1)
    policy.finished("a", 100, 2)
    assert policy.rank(Run("a"), 2)[0] == DEAD
    policy.started("a", 3)
    assert policy.rank(Run("a"), 3)[0] != DEAD


@pytest.mark.parametrize("kind", ALL)
def test_an_owner_of_two_steps_is_needed_until_both_have_ended(kind: type[Foretold]) -> None:
    policy, run = informed(kind, "role"), Run(["role"])
    idle = policy.rank(run, 10)
    policy.started("role", 10)
    policy.started("role", 10)
    waiting = policy.rank(run, 10)
    assert waiting > idle
    policy.finished("role", 1000, 10)
    assert policy.rank(run, 10) == waiting
    policy.finished("role", 1000, 10)
    assert policy.rank(run, 10) < waiting


@pytest.mark.parametrize("kind", ALL)
def test_an_end_without_a_start_does_no_harm(kind: type[Foretold]) -> None:
    policy, usual = informed(kind, "a"), informed(kind, "a")
    policy.finished("a", 1000, 0)
    for one in (policy, usual):
        one.started("a", 1)
    assert policy.rank(Run("a"), 1) == usual.rank(Run("a"), 1)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_left_of_a_forgotten_owner(kind: type[Foretold]) -> None:
    policy, fresh = informed(kind, "a", "b"), kind()
    policy.started("a", 1)
    policy.released("b", 1)
    for owner in "ab":
        policy.rank(Run(owner), 2)
        policy.forgotten(owner)
    assert vars(policy) == vars(fresh)


@pytest.mark.parametrize("kind", GUIDED)
@given(times=st.lists(st.floats(1, 1000), min_size=1, max_size=4))
def test_a_stack_stands_where_the_owner_stands_that_needs_it_soonest(kind: type[Foretold], times: list[float]) -> None:
    policy = kind()
    owners = [str(i) for i in range(len(times))]
    for owner, at in zip(owners, times, strict=True):
        policy.told({owner: Hint(since=0, steps=at, next_use=at)}, 0)
    soonest = owners[times.index(min(times))]
    assert policy.rank(Run(owners), 0) == policy.rank(Run([soonest]), 0)
    assert policy.rank(Run([*owners, "unknown"]), 0) == policy.rank(Run([soonest]), 0)


@pytest.mark.parametrize("kind", GUIDED)
def test_what_is_needed_later_goes_before_what_is_needed_sooner_and_the_unknown_before_both(
    kind: type[Foretold],
) -> None:
    policy = kind()
    policy.told({"late": Hint(since=0, steps=5, next_use=50)}, 0)
    policy.told({"soon": Hint(since=0, steps=1, next_use=10)}, 0)
    policy.told({"mid": Hint(since=0, steps=3, next_use=30)}, 0)
    assert order_of(policy, 0, "soon", "late", "unknown", "mid") == ["unknown", "late", "mid", "soon"]


@pytest.mark.parametrize("kind", GUIDED)
def test_a_new_hint_replaces_the_old_one(kind: type[Foretold]) -> None:
    policy = kind()
    policy.told({"a": Hint(since=0, steps=5, next_use=50)}, 0)
    policy.told({"b": Hint(since=0, steps=3, next_use=30)}, 0)
    assert order_of(policy, 0, "a", "b") == ["a", "b"]
    policy.told({"a": Hint(since=0, steps=1, next_use=10)}, 0)
    assert order_of(policy, 0, "a", "b") == ["b", "a"]
    policy.told({"a": Hint(since=0)}, 0)
    assert policy.rank(Run("a", 7), 0) == Policy().rank(Run("a", 7), 0)


@pytest.mark.parametrize("kind", [Belady, Retention])
def test_of_steps_that_wait_the_last_to_come_loses_its_blocks_first(kind: type[Foretold]) -> None:
    policy = kind()
    policy.told({"idle": Hint(0.0, next_use=100.0)}, 0.0)
    policy.started("first", 1.0)
    policy.started("second", 2.0)
    policy.started("first", 3.0)
    assert order_of(policy, 4.0, "first", "second", "idle") == ["idle", "second", "first"]
    policy.finished("first", 10, 4.0)
    assert order_of(policy, 4.0, "first", "second", "idle") == ["idle", "second", "first"], "one of its steps is left"
    policy.finished("first", 10, 4.0)
    assert order_of(policy, 4.0, "idle", "first", "second")[-1] == "second"
