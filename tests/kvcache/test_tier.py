"""Free blocks of a tier, where the ledger parts what they belong to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from kvcache.keeper import Keeper
from kvcache.ledger import DEVICE
from kvcache.policy import Hint, Policy
from kvcache.retention import Retention

hashed = 0


@dataclass(frozen=True)
class Counted:
    """A key that counts how often it is looked for."""

    number: int

    def __hash__(self) -> int:
        global hashed
        hashed += 1
        return hash(self.number)


def test_to_part_one_block_from_a_long_prompt_costs_no_look_at_the_others() -> None:
    keeper, keys = Keeper(Retention(), 1), [Counted(number) for number in range(2000)]
    keeper.wrote("a", None, keys, 0.0)
    for key in keys:
        keeper.ledger.gained(key, DEVICE)
    for number in range(0, 2000, 2):
        keeper.device.put([(number, keys[number]), (number + 1, keys[number + 1])], float(number))
    before = hashed
    keeper.wrote("b", None, keys[:1], 3000.0)
    assert hashed - before < 20
    keeper.released("a", 3001.0)
    assert [number for number, _ in keeper.device.take(1999, 3001.0)] == list(range(1, 2000))
    assert keeper.device.take(1, 3001.0) == [(0, keys[0])]


def freed(keeper: Keeper, order: str) -> list[int]:
    """A step of `a` has left three blocks, freed in this order."""
    keeper.wrote("a", None, ("x", "y", "z"), 0.0)
    for key in "xyz":
        keeper.ledger.gained(key, DEVICE)
    blocks = [("xyz".index(key), key) for key in order]
    keeper.device.put(blocks, 0.0)
    return [number for number, _ in blocks]


@pytest.mark.parametrize("order", ["zyx", "xyz", "yxz"])
def test_blocks_that_are_parted_stay_in_the_order_in_which_they_were_freed(order: str) -> None:
    keeper = Keeper(Policy(), 1)
    numbers = freed(keeper, order)
    keeper.wrote("b", None, ("x", "y"), 1.0)
    assert [number for number in keeper.device if number < 2] == [number for number in numbers if number < 2]


def test_the_tail_that_is_superseded_goes_first_under_lru_as_well() -> None:
    keeper = Keeper(Policy(), 1)
    numbers = freed(keeper, "zyx")
    keeper.began("a", ("x", "y"), 1.0)
    assert list(keeper.device) == numbers


def test_two_copies_of_a_block_are_parted_together() -> None:
    keeper = Keeper(Retention(), 1)
    keeper.wrote("a", None, ("x", "y"), 0.0)
    for key in ("x", "y", "x"):
        keeper.ledger.gained(key, DEVICE)
    keeper.device.put([(1, "y"), (2, "x")], 0.0)
    keeper.device.put([(3, "x")], 0.0)
    keeper.wrote("b", None, ("x",), 1.0)
    keeper.told({"b": Hint(1.0, next_use=2.0)}, 1.0)
    assert list(keeper.device) == [1, 2, 3]
    keeper.device.remove(2)
    keeper.ledger.lost("x", DEVICE)
    keeper.released("b", 2.0)
    keeper.released("a", 2.0)
    assert sorted(number for number, _ in keeper.device.take(2, 2.0)) == [1, 3]


def test_of_three_copies_of_a_block_each_can_go_first() -> None:
    for order in itertools.permutations((1, 2, 3)):
        keeper = Keeper(Policy(), 1)
        keeper.wrote("a", None, ("x",), 0.0)
        for name in (1, 2, 3):
            keeper.ledger.gained("x", DEVICE)
            keeper.device.put([(name, "x")], float(name))
        for name in order:
            keeper.device.remove(name)
            keeper.began("b", ("x",), 4.0)  # parts what is left
        assert not keeper.device._names
        assert not keeper.device._doubles


def test_a_thousand_hints_are_ranked_once_when_a_block_is_wanted() -> None:
    """The newest of them counts."""
    keeper = Keeper(Retention(), 1)
    for number, owner in enumerate("ab"):
        keeper.wrote(owner, None, (owner,), 0.0)
        keeper.ledger.gained(owner, DEVICE)
        keeper.device.put([(number, owner)], 0.0)
    for ahead in range(1000):
        keeper.told({"a": Hint(0.0, next_use=10.0 + ahead)}, 0.0)
        keeper.told({"b": Hint(0.0, next_use=1009.0 - ahead)}, 0.0)
    keeper.settle(0.0, at_once=True)
    assert len(keeper.device.order._heap) <= 4
    assert list(keeper.device) == [0, 1]
    assert keeper.device.take(1, 0.0) == [(0, "a")]
