from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.chunks import longest, shortest


@pytest.mark.parametrize(("left", "coming", "most"), [
    ([], [], 1000), ([], [300], 1000), ([300], [200], 1000), ([90_000], [], 1000), ([90_000], [80_000], 1000),
    ([500, 500, 500], [200], 1000), ([90_000], [300], 700), ([90_000, 300], [], 1000), ([300, 90_000], [100], 600),
    ([90_000], [500], 500), ([90_000, 400], [400], 500), ([90_000, 500], [10], 1000), ([90_000], [600, 10, 10], 980),
    ([501], [10], 990), ([90_000, 80_000], [], 1000), ([90_000, 80_000], [300], 350),
])  # fmt: skip
def test_long_ones_leave_what_short_ones_need_to_join_up_to_half(left: list[int], coming: list[int], most: int) -> None:
    """Those that run already come before long ones by themselves. Several long ones leave it together."""
    assert longest(1000, left, coming) == most


LEFT = st.lists(st.integers(1, 10_000), max_size=6)


@given(st.integers(1, 5000), LEFT, LEFT)
def test_long_ones_keep_half_and_nothing_is_given_away(room: int, left: list[int], coming: list[int]) -> None:
    most, bound = longest(room, left, coming), shortest(room)
    long = sum(one > bound for one in left)
    running, wanted = (sum(one for one in ones if one <= bound) for ones in (left, coming))
    assert 1 <= most <= room
    if not long or not wanted or running >= bound:
        assert most == room
    elif most > 1:
        rest = room - running - long * most
        assert min(wanted, bound - running) <= rest < min(wanted, bound - running) + long


@given(st.integers(2, 500), st.lists(st.integers(1, 2000), min_size=1, max_size=3), st.lists(st.integers(1, 600)))
def test_a_flood_of_short_ones_takes_half_and_each_is_over_in_the_end(
    room: int, left: list[int], flood: list[int]
) -> None:
    """Steps as an engine makes them: short ones first, then long ones, then who waits, in order."""
    running, waiting, steps = list(left), [min(one, shortest(room)) for one in flood if shortest(room)], 0
    while running or waiting:
        bound = shortest(room)
        running.sort(key=lambda one: one > bound)
        most, rest, long = longest(room, running, waiting[:1]), room, any(one > bound for one in running)
        given_to = [0] * len(running)
        for place, one in enumerate(running):
            given_to[place] = min(one, most, rest)
            rest -= given_to[place]
        if long and sum(one for one in running if one <= bound) <= bound:
            taken = sum(got for one, got in zip(running, given_to, strict=True) if one > bound)
            owed = min(room - bound, sum(one for one in running if one > bound))
            assert taken > owed - sum(one > bound for one in running), "long ones keep their half"
        running = [one - got for one, got in zip(running, given_to, strict=True)]
        while waiting and rest:
            first = waiting.pop(0)
            got = min(first, most, rest)
            rest -= got
            running.append(first - got)
        running = [one for one in running if one]
        steps += 1
        assert steps <= sum(left) + sum(flood) + len(flood) + 1
