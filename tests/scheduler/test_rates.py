"""How fast a worker prefills, by position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.rates import UNKNOWN, Rates

samples = st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 200_000), st.floats(1e-6, 1e-2)), max_size=30)


def learned(told: list[tuple[int, int, float]]) -> Rates:
    rates = Rates()
    for cached, new, each in told:
        rates.learn(cached, cached + new, new * each)
    return rates


def test_before_anything_is_learned_a_token_takes_what_is_assumed() -> None:
    assert Rates().recompute(100_000) == pytest.approx(100_000 * UNKNOWN)


@given(samples, st.integers(0, 2**21), st.integers(0, 2**21))
def test_more_tokens_take_longer_and_parts_add_up(told: list[tuple[int, int, float]], one: int, other: int) -> None:
    rates, (less, more) = learned(told), sorted((one, other))
    assert 0 <= rates.recompute(less) <= rates.recompute(more)
    assert rates.recompute(less) + rates.seconds(less, more) == pytest.approx(rates.recompute(more))


def test_late_tokens_may_be_dearer_than_early_ones() -> None:
    rates = learned([(0, 1_000, 1e-4), (60_000, 60_000, 4e-4)] * 40)
    assert rates.seconds(0, 500) == pytest.approx(500 * 1e-4, rel=0.05)
    assert rates.seconds(100_000, 101_000) == pytest.approx(1_000 * 4e-4, rel=0.05)


def test_the_quick_ones_count_since_slow_ones_waited_for_something_else() -> None:
    rates = learned([(0, 1_000, 1e-4), (0, 1_000, 1e-3)] * 100)
    assert rates.recompute(1_000) < 1_000 * 3e-4
