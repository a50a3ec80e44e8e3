"""Restore or recompute, by what was measured."""

from __future__ import annotations

from kvcache.plugin.host_rates import Rates


def rates(blocks: float, tokens: float) -> Rates:
    """So many blocks of 32 tokens loaded a second, and so many tokens computed."""
    found = Rates(block=32, size=1000)
    found.loaded(1000, 1 / blocks)
    found.began(640, 10.0)
    found.ended(10.0 + 640 / tokens)
    return found


def test_what_is_computed_sooner_than_loaded_is_computed() -> None:
    assert rates(blocks=10, tokens=1000).recomputes
    assert not rates(blocks=100, tokens=1000).recomputes


def test_nothing_is_said_before_both_were_measured() -> None:
    found = Rates(block=32, size=1000)
    found.began(640, 0.0)
    found.ended(0.001)
    assert found.blocks is None
    assert not found.recomputes


def test_a_step_made_up_while_another_runs_counts_from_that_ones_end() -> None:
    found = Rates(block=32, size=1000)
    for began in (0.0, 0.1):
        found.began(100, began)
    found.ended(1.0)
    found.ended(2.0)
    assert found.tokens is not None
    assert abs(found.tokens - 100) < 1e-6


def test_steps_that_decode_say_nothing_of_prefill() -> None:
    found = Rates(block=32, size=1000)
    found.began(3, 0.0)
    found.ended(1.0)
    assert found.tokens is None


def test_the_latest_transfers_count_most() -> None:
    found = rates(blocks=10, tokens=1000)
    for _ in range(60):
        found.loaded(1000, 0.01)
    assert found.blocks is not None
    assert 95 < found.blocks <= 100
