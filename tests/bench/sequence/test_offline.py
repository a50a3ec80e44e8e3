"""What a clairvoyant cache would have had."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sequence.offline import Asked, belady, unlimited


def cycle(agents: int, blocks: int, loops: int) -> list[Asked]:
    """Agents in turn, each with blocks of its own."""
    mine = [[agent * 100 + place for place in range(blocks)] for agent in range(agents)]
    return [(mine[agent], mine[agent]) for _ in range(loops) for agent in range(agents)]


@pytest.mark.parametrize("held", [2, 4, 6])
def test_of_agents_in_turn_belady_finds_all_that_fits_but_the_one_that_runs(held: int) -> None:
    agents, blocks, loops = 8, 4, 40
    found = belady(cycle(agents, blocks, loops), held * blocks)
    assert sum(found[agents:]) / (blocks * (len(found) - agents)) == pytest.approx((held - 1) / (agents - 1), abs=0.02)


def test_a_block_is_found_only_behind_those_before_it() -> None:
    found = belady([([1, 2, 3], [1, 2, 3]), ([9], [9, 8]), ([1, 2, 3], [1, 2, 3])], 4)
    assert found == [0, 0, 2], "the deepest went first"


def test_what_is_never_asked_for_again_goes_first() -> None:
    assert belady([([1], [1]), ([2], [2]), ([3], [3]), ([1], [1])], 2) == [0, 0, 0, 1]


ASKED = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=20).map(
    lambda calls: [([who * 10 + place for place in range(deep)],) * 2 for who, deep in calls]
)


@given(ASKED, st.integers(4, 30))
def test_no_room_finds_more_than_endless_room_and_more_room_never_less(asked: list[Asked], room: int) -> None:
    assert sum(belady(asked, room)) <= sum(belady(asked, room + 5)) <= sum(unlimited(asked))
