from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.chunks import SHORT, longest


@pytest.mark.parametrize(("left", "coming", "most"), [
    ([], [], 1000), ([], [300], 1000), ([300], [], 1000), ([90_000], [], 1000), ([90_000], [80_000], 1000),
    ([300, 200], [], 1000), ([500, 500, 500], [200], 1000), ([90_000], [300], 690), ([90_000, 300], [], 690),
    ([300, 90_000], [100], 590), ([90_000], [500], 500), ([90_000, 400], [400], 500), ([90_000], [600, 10, 10], 970),
    ([501], [10], 980), ([90_000, 80_000], [], 1000), ([90_000, 80_000], [300], 345),
])  # fmt: skip
def test_a_long_prefill_leaves_what_short_ones_need_up_to_half_a_step(
    left: list[int], coming: list[int], most: int
) -> None:
    """Ten requests decode. Several long ones leave it together."""
    assert longest(1000, 10, left, coming) == most


@given(
    st.integers(1, 5000),
    st.integers(0, 300),
    st.lists(st.integers(1, 10_000), max_size=6),
    st.lists(st.integers(1, 10_000), max_size=3),
)
def test_long_ones_go_on_and_short_ones_that_fit_are_over_at_once(
    budget: int, decoding: int, left: list[int], coming: list[int]
) -> None:
    most, short = longest(budget, decoding, left, coming), int(SHORT * budget)
    needed = sum(one for one in (*left, *coming) if one <= short)
    long = sum(one > short for one in left)
    assert 1 <= most <= budget
    assert long * (most + 1) > budget - short or not long, "long ones keep their half"
    if long and needed and needed + decoding <= short:
        rest = budget - needed - decoding - long * most
        assert 0 <= rest < long or most == 1, "what is short fits, and nothing else is given away"
