"""How soon a step of a role comes to a worker again."""

from __future__ import annotations

import pytest

from scheduler import recurrence
from scheduler.recurrence import Recurrence

ROLE = ("w", "r")


def test_the_first_step_tells_of_no_gap() -> None:
    seen = Recurrence()
    assert not seen.came(ROLE, 1.0)
    assert seen.gap(ROLE) is None
    assert seen.gap(("w", "unknown")) is None
    assert seen.came(ROLE, 3.0)


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
    seen.came(ROLE, 0.0)
    assert not seen.came(("w1", "r"), 1.0)
    assert not seen.came(("w", "s"), 1.0)


def test_what_has_not_come_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "MOST", 2)
    seen = Recurrence()
    for at, role in enumerate(("a", "b", "a", "c")):
        seen.came(("w", role), float(at))
    assert len(seen) == 2
    assert seen.gap(("w", "a")) is not None
    assert not seen.came(("w", "b"), 4.0), "it was forgotten"
