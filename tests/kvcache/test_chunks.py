from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.chunks import SHORT, longest


@pytest.mark.parametrize(("left", "most"), [
    ([], 1000), ([300], 1000), ([90_000], 1000), ([90_000, 80_000], 1000), ([300, 200], 1000), ([500, 500, 500], 1000),
    ([90_000, 300], 690), ([300, 90_000, 100], 590), ([90_000, 500], 500), ([90_000, 400, 400], 500), ([501, 10], 980),
])  # fmt: skip
def test_a_long_prefill_leaves_what_short_ones_need_up_to_half_a_step(left: list[int], most: int) -> None:
    """Ten requests decode."""
    assert longest(1000, 10, left) == most


@given(st.integers(1, 5000), st.integers(0, 300), st.lists(st.integers(1, 10_000), max_size=6))
def test_a_long_one_goes_on_and_short_ones_that_fit_are_over_at_once(
    budget: int, decoding: int, left: list[int]
) -> None:
    most, short = longest(budget, decoding, left), int(SHORT * budget)
    needed = sum(one for one in left if one <= short)
    assert budget - short <= most <= budget
    if max(left, default=0) > short and needed + decoding <= short:
        assert most + needed + decoding <= budget or not needed
        assert most + needed + decoding >= budget, "nothing of the step is given away"
