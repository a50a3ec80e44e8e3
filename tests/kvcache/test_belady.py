from __future__ import annotations

from kvcache.belady import Belady
from kvcache.policy import DEAD, Hint
from tests.kvcache.stacks import Run, order_of


def tell(policy: Belady, **at: float) -> None:
    for owner, time in at.items():
        policy.told({owner: Hint(since=0, next_use=time)}, 0)


def test_the_farthest_next_use_goes_first_and_what_is_never_used_again_before_it() -> None:
    policy = Belady()
    tell(policy, near=10, far=90, never=float("inf"), mid=50)
    assert order_of(policy, 0, "near", "never", "far", "mid") == ["never", "far", "mid", "near"]
    assert policy.rank(Run(["never"]), 0)[0] == DEAD


def test_an_owner_whose_step_waits_needs_it_now_even_if_nothing_else_is_known_of_it() -> None:
    policy = Belady()
    tell(policy, next=5)
    policy.started("new", 0)
    assert order_of(policy, 1, "new", "next") == ["next", "new"]


def test_a_next_use_that_has_passed_is_nearer_than_one_to_come() -> None:
    policy = Belady()
    tell(policy, late=5, next=11)
    assert order_of(policy, 10, "late", "next") == ["next", "late"]


def test_what_only_some_of_its_owners_never_use_again_waits_for_the_others() -> None:
    policy = Belady()
    tell(policy, never=float("inf"), near=10, far=50)
    assert policy.rank(Run(["far"]), 0) < policy.rank(Run(["never", "near"]), 0)
