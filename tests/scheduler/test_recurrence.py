"""How soon a step of a role comes to a worker again."""

from __future__ import annotations

import pytest

from scheduler import recurrence
from scheduler.recurrence import Recurrence

ROLE = ("w", "r")


def test_the_first_step_tells_of_no_gap() -> None:
    seen = Recurrence()
    seen.came(ROLE, 1.0)
    assert seen.gap(ROLE) is None
    assert seen.gap(("w", "unknown")) is None
    seen.came(ROLE, 3.0)
    assert seen.gap(ROLE) is not None


def test_the_gap_follows_what_came_last() -> None:
    seen, now = Recurrence(), 0.0
    for _ in range(20):
        seen.came(ROLE, now := now + 2.0)
    told = seen.gap(ROLE)
    assert told is not None
    assert told[0] == now
    assert told[1].quantile(0.5) == pytest.approx(2.0, rel=0.3)
    for _ in range(20):
        seen.came(ROLE, now := now + 200.0)
    told = seen.gap(ROLE)
    assert told is not None
    assert told[1].quantile(0.5) == pytest.approx(200.0, rel=0.3)


def test_workers_and_roles_are_told_apart() -> None:
    seen = Recurrence()
    for key in (ROLE, ("w1", "r"), ("w", "s")):
        seen.came(key, 0.0)
    assert seen.gap(ROLE) is None


def test_the_steps_of_a_fan_out_are_one_use() -> None:
    seen, now = Recurrence(), 0.0
    for _ in range(4):
        now += 60.0
        for number in range(30):
            seen.came(ROLE, now + 0.01 * number)
    told = seen.gap(ROLE)
    assert told is not None
    assert told[0] == now + 0.29
    assert told[1].quantile(0.5) == pytest.approx(60.0, rel=0.3)


def test_one_gap_moves_what_is_believed_of_a_role_and_does_not_settle_it() -> None:
    seen = Recurrence()
    seen.came(ROLE, 0.0)
    seen.came(ROLE, 3600.0)
    told = seen.gap(ROLE)
    assert told is not None
    assert 30.0 < told[1].quantile(0.4) < 3600.0, "mostly as usual, half a minute"
    assert 0.01 < told[1].never < 0.1


def test_a_role_that_is_overdue_is_forgotten_once() -> None:
    seen, now = Recurrence(), 0.0
    for _ in range(20):
        seen.came(ROLE, now := now + 2.0)
        assert seen.gap(ROLE) is not None or now == 2.0
        assert seen.lapsed(now + 5.0) == []
    assert seen.lapsed(now + 9.9) == []
    assert seen.lapsed(now + 600.0) == [ROLE]
    assert seen.lapsed(now + 600.0) == []
    assert len(seen) == 0
    assert seen.gap(ROLE) is None


def test_what_is_kept_of_the_past_is_bounded() -> None:
    seen = Recurrence()
    for number in range(5000):
        seen.came(ROLE, 2.0 * number)
        seen.gap(ROLE)
    assert len(seen._due) <= 1027
    assert seen.lapsed(1e6) == [ROLE]


def test_what_has_not_come_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "MOST", 2)
    seen = Recurrence()
    for at, role in enumerate(("a", "b", "a", "c")):
        seen.came(("w", role), float(at))
    assert len(seen) == 2
    assert seen.gap(("w", "a")) is not None
    seen.came(("w", "b"), 4.0)
    assert seen.gap(("w", "b")) is None, "it was forgotten"
