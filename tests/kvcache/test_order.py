from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from kvcache.belady import Belady
from kvcache.order import SPARE, Order
from kvcache.policy import Hint, Policy
from kvcache.retention import Retention
from tests.kvcache.stacks import Run


class Fading:
    """An index that falls from `height` by one each second."""

    def __init__(self, height: float) -> None:
        self.height = height

    def index(self, idle: float) -> float:
        return max(self.height - idle, 0.0)


def next_use(at: float) -> Hint:
    return Hint(since=0, next_use=at)


def test_an_empty_order_has_no_first() -> None:
    assert Order(Policy()).first(0) is None


def test_the_least_recently_freed_goes_first_whatever_was_added_first() -> None:
    order: Order[Run] = Order(Policy())
    late, early = Run("a", 2), Run("b", 1)
    order.add(late, 2)
    order.add(early, 2)
    assert order.first(2) is early
    order.discard(early)
    assert order.first(2) is late


def test_what_was_freed_at_once_goes_in_the_order_of_adding_so_the_tail_of_a_prompt_before_its_head() -> None:
    order: Order[Run] = Order(Policy())
    tail, head = Run("a", 5), Run("ab", 5)
    order.add(tail, 5)
    order.add(head, 5)
    assert list(order) == [tail, head]


def test_a_stack_stays_first_while_blocks_are_taken_from_it() -> None:
    order: Order[Run] = Order(Policy())
    runs = [Run("a", 1), Run("b", 2)]
    for run in runs:
        order.add(run, 2)
    for left in (48, 32, 16):
        runs[0].tokens = left
        assert order.first(3) is runs[0]


def test_a_discarded_stack_never_comes_up_again_and_discarding_it_twice_is_no_error() -> None:
    order: Order[Run] = Order(Policy())
    run = Run("a")
    order.add(run, 0)
    order.discard(run)
    order.discard(run)
    assert order.first(0) is None
    assert len(order) == 0


def test_an_owner_s_event_moves_its_stacks_only() -> None:
    policy = Belady()
    order: Order[Run] = Order(policy)
    a, b = Run("a", 1), Run("b", 2)
    for owner, at in (("a", 10.0), ("b", 20.0)):
        policy.told({owner: next_use(at)}, 0)
    order.add(a, 2)
    order.add(b, 2)
    assert order.first(2) is b
    policy.told({"a": next_use(30)}, 2)
    policy.told({"b": next_use(40)}, 2)
    order.changed("a", 2)
    assert order.first(2) is a  # what came for b is not called yet
    order.changed("b", 2)
    assert order.first(2) is b


def test_an_owner_that_leaves_a_stack_no_longer_keeps_it() -> None:
    policy = Belady()
    order: Order[Run] = Order(policy)
    shared, other = Run(["a", "b"], 1), Run(["c"], 2)
    for owner, at in (("a", 5.0), ("b", 90.0), ("c", 50.0)):
        policy.told({owner: next_use(at)}, 0)
    order.add(shared, 2)
    order.add(other, 2)
    assert order.first(2) is other
    shared.owners = ["b"]
    order.add(shared, 2)
    assert order.first(2) is shared
    policy.told({"b": next_use(10)}, 2)
    order.changed("b", 2)
    assert order.first(2) is other
    order.discard(shared)
    order.discard(other)
    assert len(order) == 0


def test_an_owner_that_takes_another_s_place_counts_from_then_on() -> None:
    policy = Belady()
    order: Order[Run] = Order(policy)
    handed, other = Run(["a"], 1), Run(["c"], 2)
    for owner, at in (("a", 90.0), ("b", 5.0), ("c", 50.0)):
        policy.told({owner: next_use(at)}, 0)
    order.add(handed, 2)
    order.add(other, 2)
    handed.owners = ["b"]
    order.add(handed, 2)
    assert order.first(2) is other
    policy.told({"b": next_use(90)}, 2)
    order.changed("b", 2)
    assert order.first(2) is handed


def test_a_stack_added_again_keeps_its_place_among_equals_unless_it_was_freed_anew() -> None:
    order: Order[Run] = Order(Policy())
    tail, head = Run(["a"], 5), Run(["a", "b"], 5)
    order.add(tail, 5)
    order.add(head, 5)
    tail.owners = ["c"]
    order.add(tail, 6)
    assert list(order) == [tail, head]
    tail.freed = 7
    order.add(tail, 7)
    assert list(order) == [head, tail]
    assert len(order) == 2


def test_ranks_that_change_with_time_are_as_old_as_the_policy_allows_and_no_older() -> None:
    policy = Retention()
    order: Order[Run] = Order(policy)
    fading, steady = Run("f", 1), Run("s", 2)
    policy.told({"f": Hint(since=0, gap=Fading(10))}, 0)
    policy.told({"s": next_use(1e6)}, 0)
    order.add(fading, 0)
    order.add(steady, 0)
    assert order.first(0) is steady
    policy.told({"s": Hint(since=0, gap=Fading(10_000), seconds_per_token=5e-4)}, 0)
    order.changed("s", 0)
    assert order.first(0.5) is steady  # an index of 5 against 10
    assert order.first(20) is fading  # about 5 against 0


def test_between_two_refreshes_nothing_is_ranked_again() -> None:
    class Counting(Policy):
        refresh = 10.0
        asked = 0

        def ranked(self, owners: Collection[str], freed: float, now: float) -> tuple[int, float]:
            self.asked += 1
            return (1, 0.0)

    policy = Counting()
    order: Order[Run] = Order(policy)
    for i in range(5):
        order.add(Run("a", i), 0)
    order.first(0)
    before = policy.asked
    for now in range(10):
        order.first(now)
    assert policy.asked == before
    order.first(10)
    assert policy.asked == before + 5


@pytest.mark.parametrize("kind", [Belady, Retention])
def test_replaced_entries_do_not_pile_up(kind: type[Belady | Retention]) -> None:
    draw, policy = random.Random(1), kind()
    order: Order[Run] = Order(policy)
    runs = [Run(f"{i % 10}", i) for i in range(100)]
    for run in runs:
        order.add(run, 0)
    for _ in range(3000):
        owner = str(draw.randrange(10))
        policy.told({owner: next_use(draw.random() * 100)}, 0)
        order.changed(owner, 0)
        assert len(order._heap) <= 2 * len(order) + SPARE
    for run in runs:
        order.discard(run)
    assert len(order._heap) <= SPARE
    assert not order._of
