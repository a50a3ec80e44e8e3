"""When owners run next, by the soonest of all runs that foretell it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.forecast import Forecast, Key

WAITS = {"plan": 0.0, "work": 6.0, "check": 27.0}


def at(told: dict[Key, float | None], worker: str = "w") -> dict[str, float | None]:
    return {owner: when for (on, owner), when in told.items() if on == worker}


def test_an_owner_counts_for_the_run_that_needs_it_soonest() -> None:
    forecast = Forecast()
    forecast.moved("early", "w", WAITS, 0.0)
    assert at(forecast.moved("late", "w", WAITS, 3.0)) == {"plan": 0.0, "work": 6.0, "check": 27.0}
    assert at(forecast.over("early")) == {"plan": 3.0, "work": 9.0, "check": 30.0}
    assert at(forecast.over("late")) == {"plan": None, "work": None, "check": None}


def test_what_a_run_has_passed_is_no_longer_foretold() -> None:
    forecast = Forecast()
    forecast.moved("run", "w", WAITS, 0.0)
    assert at(forecast.moved("run", "w", {"work": 1.0}, 5.0)) == {"plan": None, "work": 6.0, "check": None}


def test_workers_do_not_share_what_is_foretold() -> None:
    forecast = Forecast()
    forecast.moved("one", "w0", WAITS, 0.0)
    told = forecast.moved("two", "w1", WAITS, 2.0)
    assert {worker for worker, _ in told} == {"w1"}
    assert at(told, "w1")["work"] == 8.0


def test_a_run_that_sits_on_two_workers_is_foretold_on_both() -> None:
    forecast = Forecast()
    forecast.moved("run", "w0", WAITS, 0.0)
    assert at(forecast.moved("run", "w1", WAITS, 1.0), "w1")["work"] == 7.0
    assert {worker for worker, _ in forecast.over("run")} == {"w0", "w1"}
    assert not forecast._uses


def test_a_use_that_is_long_overdue_lapses() -> None:
    forecast = Forecast()
    forecast.moved("run", "w", WAITS, 0.0)
    assert at(forecast.lapsed(9.0)) == {}
    assert at(forecast.lapsed(16.1)) == {"plan": None, "work": None}
    assert at(forecast.lapsed(60.0)) == {"check": None}


def test_of_a_run_that_stands_still_all_lapses_once_its_next_step_is_overdue() -> None:
    forecast = Forecast()
    forecast.moved("run", "w", {"work": 6.0, "check": 27.0}, 0.0, still=True)
    assert at(forecast.lapsed(11.9)) == {}
    assert at(forecast.lapsed(12.0)) == {"work": None, "check": None}
    forecast.moved("run", "w", WAITS, 20.0, still=True)
    assert at(forecast.lapsed(20.9)) == {}, "a second at least"
    assert at(forecast.lapsed(21.0)) == {"plan": None, "work": None, "check": None}
    assert not forecast._uses


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 30.0), st.sampled_from("ers")), max_size=40))
def test_what_is_told_is_the_soonest_of_what_was_foretold_and_nothing_outlives_its_run(
    moves: list[tuple[int, float, str]],
) -> None:
    """A run ends, runs on, or stands still."""
    waits = {"plan": 2.0, "work": 6.0, "check": 27.0}
    forecast, now = Forecast(), 0.0
    told: dict[Key, float | None] = {}
    live: dict[str, tuple[float, bool]] = {}
    for number, seconds, what in moves:
        now += seconds
        run = f"run-{number}"
        told.update(forecast.lapsed(now))
        if what == "e":
            told.update(forecast.over(run))
            live.pop(run, None)
        else:
            told.update(forecast.moved(run, "w", waits, now, still=what == "s"))
            live[run] = now, what == "s"
        assert forecast.workers(run) == ({"w": None} if what != "e" else {})
        for owner, wait in waits.items():
            lasts = wait + max(10.0, wait)
            due = [since + wait for since, still in live.values() if since + (4.0 if still else lasts) > now]
            known = told.get(("w", owner))
            assert (known is None and not due) or abs((known or 0.0) - min(due)) < 1e-6
    for number in range(4):
        forecast.over(f"run-{number}")
    assert not forecast._uses
    assert not forecast._keys
