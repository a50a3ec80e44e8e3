"""Ten tenants: who is in time, and how evenly all are slowed down."""

from __future__ import annotations

import pytest

from bench.fairness import jain, row
from bench.metrics import in_time
from bench.records import CallRecord, Played, RunRecord


def played(**seconds: float) -> Played:
    """One run of 10 s unloaded for each tenant, which took so long."""
    runs = [RunRecord(name, name, 0.0, 10.0, warm=False, finished=took, until=took) for name, took in seconds.items()]
    calls = [CallRecord(run.run, 0, "s", run.tenant, "0", 0.0, 10, 1, finished=run.finished) for run in runs]
    return Played(calls, runs, (0.0, 100.0), {})


def test_tenants_slowed_down_alike_have_the_index_one_and_one_alone_of_n_has_one_nth() -> None:
    assert jain(played(a=20.0, b=20.0, c=20.0)) == pytest.approx(1.0)
    assert jain(played(a=10.0, b=1e9, c=1e9)) == pytest.approx(1 / 3, rel=1e-3)


def test_in_time_is_within_one_and_a_half_times_the_unloaded_time() -> None:
    found = played(light1=14.0, light2=16.0, greedy=20.0)
    assert in_time(found, "light") == 0.5
    assert in_time(found, "greedy") == 0.0


def test_at_a_low_rate_everybody_is_in_time() -> None:
    found = row("stock", 0.05, 1)
    assert found["all"] > 0.98
    assert found["jain"] > 0.99
