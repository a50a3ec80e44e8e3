from __future__ import annotations

import pytest

from kvcache.order import Order
from kvcache.policy import DEAD, KNOWN, LEASED, UNKNOWN, Hint
from kvcache.saga import Saga
from tests.kvcache.stacks import Run, order_of


def idle(policy: Saga, owner: str, tokens: int, since: float, reuse: float | None = 0.95) -> None:
    policy.started(owner, since)
    policy.finished(owner, tokens, since)
    policy.told({owner: Hint(since=since, reuse=reuse)}, since)


def score(policy: Saga, owner: str, now: float) -> float:
    return -policy.rank(Run([owner]), now)[1]


def test_the_score_is_that_of_equations_1_to_5() -> None:
    policy = Saga()
    idle(policy, "a", 1000, since=0)
    idle(policy, "b", 3000, since=60)
    # idle 100 of 100 s, reuse .95 * 1000/1300, a third of the largest; idle 40 of 100 s, .95 * 3000/3300, the largest
    assert score(policy, "a", 100) == pytest.approx(0.3 + 0.5 * (1 - 0.730769) + 0.2 / 3, abs=1e-6)
    assert score(policy, "b", 100) == pytest.approx(0.12 + 0.5 * (1 - 0.863636) + 0.2, abs=1e-6)
    assert order_of(policy, 100, "b", "a") == ["a", "b"]


@pytest.mark.parametrize(("recency", "first"), [(0.44, "long"), (0.50, "short")])
def test_a_long_session_just_used_goes_before_a_short_one_that_was_idle_for_almost_half_the_longest_time(
    recency: float, first: str
) -> None:
    policy = Saga()
    idle(policy, "oldest", 1, since=0)
    idle(policy, "short", 3000, since=100 - 100 * recency)
    idle(policy, "long", 32_000, since=100)
    assert score(policy, "long", 100) == pytest.approx(0.2294, abs=2e-4)
    assert order_of(policy, 100, "short", "long")[0] == first


def test_without_a_successor_nothing_is_reused() -> None:
    policy = Saga()
    idle(policy, "a", 1000, since=0, reuse=None)
    assert score(policy, "a", 10) == pytest.approx(0.3 + 0.5 + 0.2)


def test_the_largest_and_the_longest_idle_are_those_of_live_sessions() -> None:
    policy = Saga()
    idle(policy, "gone", 9000, since=0, reuse=0)
    idle(policy, "left", 5000, since=10, reuse=0)
    idle(policy, "a", 1000, since=80, reuse=0)
    assert score(policy, "a", 100) == pytest.approx(0.3 * 20 / 100 + 0.5 + 0.2 / 9)
    policy.released("gone", 100)
    assert score(policy, "a", 100) == pytest.approx(0.3 * 20 / 90 + 0.5 + 0.2 / 5)
    policy.forgotten("left")
    assert score(policy, "a", 100) == pytest.approx(0.3 + 0.5 + 0.2)
    idle(policy, "a", 500, since=100, reuse=0)
    assert score(policy, "a", 110) == pytest.approx(1.0)


def test_a_session_that_starts_is_idle_no_longer() -> None:
    policy = Saga()
    for owner, since in (("starts", 0), ("longest", 50), ("a", 75)):
        idle(policy, owner, 1000, since, reuse=0)
    policy.started("starts", 90)
    assert score(policy, "a", 100) == pytest.approx(0.3 * 25 / 50 + 0.5 + 0.2)


@pytest.mark.parametrize(
    ("used", "hold", "lives"),
    [(0.5, 40, 40), (0.7, 40, 40), (0.8, 40, 30), (0.9, 40, 20), (1.0, 40, 20), (0, 9e9, 300)],
)
def test_a_tool_call_protects_for_its_time_to_live(used: float, hold: float, lives: float) -> None:
    policy = Saga()
    idle(policy, "a", 1000, since=0)
    policy.pressed(used)
    policy.told({"a": Hint(since=100, hold=hold)}, 101)
    assert policy.rank(Run("a"), 100 + lives - 0.01)[0] == LEASED
    assert policy.rank(Run("a"), 100 + lives + 0.01)[0] == KNOWN


def test_the_time_to_live_ends_when_the_tool_returns() -> None:
    policy = Saga()
    idle(policy, "a", 1000, since=0)
    policy.told({"a": Hint(since=0, hold=200)}, 0)
    policy.started("a", 5)
    policy.finished("a", 1200, 10)
    assert policy.rank(Run("a"), 11)[0] == KNOWN


def test_a_session_whose_step_waits_is_pinned_above_every_protected_one() -> None:
    policy = Saga()
    for owner in ("waits", "tool", "idle"):
        idle(policy, owner, 1000, since=0)
    policy.told({"tool": Hint(since=0, hold=200)}, 0)
    policy.started("waits", 1)
    assert order_of(policy, 2, "waits", "tool", "idle") == ["idle", "tool", "waits"]


def test_an_ended_session_goes_before_one_never_heard_of_and_that_before_the_scored() -> None:
    policy = Saga()
    idle(policy, "ended", 10, since=9, reuse=1)
    idle(policy, "scored", 9000, since=0, reuse=0)
    policy.released("ended", 9)
    assert order_of(policy, 10, "scored", "new", "ended") == ["ended", "new", "scored"]
    assert [policy.rank(Run([o]), 10)[0] for o in ("ended", "new", "scored")] == [DEAD, UNKNOWN, KNOWN]


def test_an_expired_protection_shows_in_the_order_at_the_next_refresh() -> None:
    policy = Saga()
    order: Order[Run] = Order(policy)
    idle(policy, "tool", 1000, since=0)
    idle(policy, "used", 1000, since=10)
    policy.told({"tool": Hint(since=0, hold=20, reuse=0.95)}, 10)
    tool, used = Run(["tool"], 0), Run(["used"], 10)
    order.add(tool, 10)
    order.add(used, 10)
    assert order.first(19.9) is used
    assert order.first(20.1) is tool
