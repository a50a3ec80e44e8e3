"""Restore or recompute, by what was measured."""

from __future__ import annotations

from kvcache.plugin.host_rates import EVERY, LEAST, Rates


def rates(blocks: float, tokens: float) -> Rates:
    """So many blocks of 32 tokens loaded a second, and so many tokens computed."""
    found = Rates(block=32, size=LEAST)
    found.loaded(LEAST, 1 / blocks)
    found.began("step", 640, 10.0)
    found.ended("step", 10.0 + 640 / tokens)
    return found


def test_what_is_computed_sooner_than_loaded_is_computed() -> None:
    assert rates(blocks=10, tokens=1000).recomputes
    assert not rates(blocks=100, tokens=1000).recomputes


def test_nothing_is_said_before_both_were_measured() -> None:
    found = Rates(block=32, size=LEAST)
    found.began("step", 640, 0.0)
    found.ended("step", 0.001)
    assert found.blocks is None
    assert not found.recomputes


def test_a_step_made_up_while_another_runs_counts_from_that_ones_end() -> None:
    found = Rates(block=32, size=LEAST)
    for step, began in (("one", 0.0), ("two", 0.1)):
        found.began(step, 100, began)
    found.ended("one", 1.0)
    found.ended("two", 2.0)
    assert found.tokens is not None
    assert abs(found.tokens - 100) < 1e-6


def test_steps_that_decode_say_nothing_of_prefill() -> None:
    found = Rates(block=32, size=LEAST)
    found.began("step", 3, 0.0)
    found.ended("step", 1.0)
    assert found.tokens is None


def test_steps_of_which_no_end_is_told_shift_no_others() -> None:
    found = Rates(block=32, size=LEAST)
    for number in range(40):  # an idle engine that waits for a restore
        found.began(number, 0, number / 1000)
    found.began("prefill", 400, 1.0)
    found.began("decode", 1, 1.01)
    found.ended("prefill", 1.1)
    found.ended("decode", 1.101)
    assert found.tokens is not None
    assert abs(found.tokens - 4000) < 1e-6


def test_the_latest_transfers_count_most() -> None:
    found = rates(blocks=10, tokens=1000)
    for _ in range(60):
        found.loaded(LEAST, 0.01)
    assert found.blocks is not None
    assert 95 < found.blocks <= 100


def test_a_small_load_says_nothing_of_the_link() -> None:
    found = rates(blocks=100, tokens=1000)
    found.loaded(LEAST // 2, 10.0)
    assert not found.recomputes


def test_now_and_then_a_restore_is_let_through_and_stays_so() -> None:
    found = rates(blocks=10, tokens=1000)
    answers = [found.leaves_out(str(number)) for number in range(2 * EVERY)]
    assert answers == ([True] * (EVERY - 1) + [False]) * 2
    assert not found.leaves_out(str(2 * EVERY - 1))
    assert found.leaves_out("another")


def test_a_link_that_has_become_fast_is_used_again() -> None:
    found = rates(blocks=10, tokens=1000)
    for _ in range(50):
        found.loaded(LEAST, 0.1)
    asked = 0
    while found.recomputes:
        asked += 1
        if not found.leaves_out(str(asked)):
            found.loaded(16 * LEAST, 16 / 1000)
        assert asked < 4 * EVERY
    assert asked >= EVERY
    assert not found.leaves_out("another")
