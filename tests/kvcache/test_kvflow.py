from __future__ import annotations

from kvcache.kvflow import KVFlow
from kvcache.policy import Hint
from tests.kvcache.stacks import Run, order_of


def tell(policy: KVFlow, **steps: float) -> None:
    for owner, number in steps.items():
        policy.told({owner: Hint(since=0, steps=number)}, 0)


def test_the_unreachable_goes_first_then_the_most_steps_and_the_running_last() -> None:
    policy = KVFlow()
    tell(policy, running=0, next=1, second=2, never=float("inf"))
    assert order_of(policy, 0, "running", "second", "never", "next") == ["never", "second", "next", "running"]


def test_a_varying_suffix_goes_before_every_fixed_prompt_also_when_it_was_used_last_or_waits() -> None:
    policy = KVFlow()
    tell(policy, never=float("inf"), next=1)
    policy.started("suffix", 5)
    assert order_of(policy, 6, "next", "never", "suffix") == ["suffix", "never", "next"]


def test_an_agent_whose_step_waits_has_no_step_to_go() -> None:
    policy = KVFlow()
    tell(policy, near=1, waits=7)
    policy.started("waits", 1)
    assert order_of(policy, 1, "waits", "near") == ["near", "waits"]
    policy.finished("waits", 100, 2)
    assert order_of(policy, 2, "near", "waits") == ["waits", "near"]


def test_a_block_shared_by_agents_has_the_fewest_steps_of_theirs() -> None:
    policy = KVFlow()
    tell(policy, far=9, near=2, mid=4)
    shared, mid = Run(["far", "near"], 1), Run(["mid"], 2)
    assert policy.rank(mid, 3) < policy.rank(shared, 3)
    tell(policy, near=5)
    assert policy.rank(shared, 3) < policy.rank(mid, 3)


def test_time_alone_changes_nothing() -> None:
    policy = KVFlow()
    tell(policy, a=3)
    assert policy.rank(Run("a"), 0) == policy.rank(Run("a"), 1e6)


def test_where_no_steps_are_told_the_time_of_the_next_use_stands_for_them() -> None:
    policy = KVFlow()
    policy.told({"soon": Hint(0.0, next_use=5.0)}, 0)
    policy.told({"late": Hint(0.0, next_use=50.0)}, 0)
    assert policy.rank(Run(["late"], 1), 2) < policy.rank(Run(["soon"], 1), 2)
