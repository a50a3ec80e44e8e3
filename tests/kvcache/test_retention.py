from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcache.policy import DEAD, KNOWN, LEASED, UNKNOWN, Hint, Policy
from kvcache.retention import SOON, Retention
from scheduler.gaps import GAPS, Gap
from tests.kvcache.stacks import Run, order_of

TOOL = Gap(GAPS.log_normal(8, 1.3), 0.05)
HUMAN = Gap(GAPS.log_normal(90, 1.3), 0.4)


class Steady:
    """An index that time does not change."""

    def __init__(self, height: float) -> None:
        self.height = height

    def index(self, idle: float) -> float:
        return self.height


def rank_of(hint: Hint, now: float) -> tuple[int, float]:
    policy = Retention()
    policy.told({"a": hint}, hint.since)
    return policy.rank(Run("a"), now)


def worth(hint: Hint, now: float) -> float:
    return rank_of(hint, now)[1]


def test_dead_then_unknown_then_unleased_by_index_then_leased_by_index() -> None:
    policy = Retention()
    for owner, index, leased in (("u2", 2, False), ("u9", 9, False), ("l1", 1, True), ("l5", 5, True)):
        policy.told({owner: Hint(since=0, gap=Steady(index), leased=leased)}, 0)
    policy.told({"dead": Hint(since=0, gap=Steady(100), leased=True)}, 0)
    policy.released("dead", 0)
    ranked = order_of(policy, 0, "l5", "u9", "dead", "l1", "new", "u2")
    assert ranked == ["dead", "new", "u2", "u9", "l1", "l5"]
    classes = [policy.rank(Run([owner]), 0)[0] for owner in ranked]
    assert classes == [DEAD, UNKNOWN, KNOWN, KNOWN, LEASED, LEASED]


def test_a_session_that_has_just_stopped_is_not_taken_for_one_that_has_idled_since_its_stop_before() -> None:
    policy = Retention()
    for owner in ("long idle", "just stopped"):
        policy.told({owner: Hint(since=0, gap=TOOL, leased=True)}, 0)
    policy.started("just stopped", 5)
    policy.finished("just stopped", 100, 40)
    assert order_of(policy, 40, "just stopped", "long idle") == ["long idle", "just stopped"]


def test_a_session_of_which_nothing_was_told_yet_waits_as_others_do_once_its_step_has_ended() -> None:
    policy = Retention()
    policy.started("f", 0)
    policy.finished("f", 100, 1)
    assert policy.rank(Run("f", 1), 2)[0] == UNKNOWN, "nothing was ever told"
    policy.started("o", 0)
    policy.finished("o", 100, 1)
    policy.told({"o": Hint(since=1, gap=TOOL, leased=True)}, 1)
    policy.started("n", 2)
    policy.finished("n", 100, 30)
    assert policy.rank(Run("n", 30), 30.2) == (LEASED, pytest.approx(worth(Hint(since=30, gap=TOOL), 30.2)))
    policy.told({"n": Hint(since=30, gap=HUMAN)}, 30.3)
    assert policy.rank(Run("n", 30), 30.4)[0] == KNOWN


def test_the_index_is_weighed_by_what_a_token_costs() -> None:
    policy = Retention()
    policy.told({"dear": Hint(since=0, gap=Steady(1), seconds_per_token=3e-3)}, 0)
    policy.told({"cheap": Hint(since=0, gap=Steady(2), seconds_per_token=1e-3)}, 0)
    assert policy.rank(Run(["dear"]), 0) == (KNOWN, 3e-3)
    assert order_of(policy, 0, "dear", "cheap") == ["cheap", "dear"]


def test_a_step_that_waits_is_worth_all_the_others_leased_or_not() -> None:
    policy = Retention()
    for owner, leased in (("idle", False), ("waits", False), ("leased", True), ("both", True)):
        policy.told({owner: Hint(since=0, gap=Steady(9e9), leased=leased)}, 0)
    for owner in ("waits", "both"):
        policy.started(owner, 1)
    assert order_of(policy, 1, "both", "waits", "leased", "idle") == ["idle", "leased", "both", "waits"]


def test_one_that_waits_and_of_which_nothing_was_told_is_worth_as_much() -> None:
    policy = Retention()
    policy.told({"idle": Hint(since=0, gap=Steady(9e9))}, 0)
    policy.started("new", 1)
    assert order_of(policy, 1, "new", "idle") == ["idle", "new"]


def test_what_is_leased_is_kept_though_its_gap_is_unknown() -> None:
    policy = Retention()
    policy.told({"leased": Hint(since=0, leased=True)}, 0)
    policy.told({"idle": Hint(since=0, gap=Steady(9e9))}, 0)
    assert order_of(policy, 0, "leased", "idle") == ["idle", "leased"]


@given(idle=st.floats(0.02, 50_000), since=st.floats(0, 1e5))
def test_the_index_is_that_of_the_gap_about_as_long_ago_as_the_owner_is_idle(idle: float, since: float) -> None:
    got = worth(Hint(since=since, gap=TOOL, seconds_per_token=2.0), since + idle)
    near = [TOOL.index(idle * factor) for factor in (8 / 9, 15 / 16, 1.0, 17 / 16, 9 / 8)]
    assert 2 * min(near) * 0.99 <= got <= 2 * max(near) * 1.01


def test_a_tool_that_should_have_returned_goes_before_a_human_who_has_just_been_answered() -> None:
    policy = Retention()
    policy.told({"tool": Hint(since=0, gap=TOOL)}, 0)
    policy.told({"human": Hint(since=0, gap=HUMAN)}, 0)
    assert order_of(policy, 1, "tool", "human") == ["human", "tool"]
    policy.told({"human": Hint(since=4000, gap=HUMAN)}, 4000)
    assert order_of(policy, 4000, "tool", "human") == ["tool", "human"]


@given(ahead=st.floats(SOON * 1.2, 1e4), now=st.floats(0, 1e4))
def test_a_foretold_next_use_is_worth_one_over_the_seconds_to_it(ahead: float, now: float) -> None:
    assert worth(Hint(since=0, next_use=now + ahead), now) == pytest.approx(1 / ahead, rel=1 / 32)


def test_a_next_use_counts_before_the_gap_and_one_that_has_passed_as_just_ahead() -> None:
    assert worth(Hint(since=0, gap=Steady(5), next_use=10), 0) == pytest.approx(0.1, rel=1 / 32)
    assert worth(Hint(since=0, next_use=10), 10) == worth(Hint(since=0, next_use=10), 19) == 1 / SOON
    assert worth(Hint(since=0, next_use=float("inf")), 5) == 0


@given(times=st.lists(st.floats(0, 300), min_size=2, max_size=30))
@example(times=[0, 1 / 128, 1 / 32, 199.99, 200])
def test_a_rank_depends_on_the_time_and_not_on_when_it_was_asked_before(times: list[float]) -> None:
    policy = Retention()
    policy.told({"gap": Hint(since=0, gap=TOOL)}, 0)
    policy.told({"next": Hint(since=0, next_use=200)}, 0)
    for now in sorted(times):
        fresh = Retention()
        fresh.told({"gap": Hint(since=0, gap=TOOL)}, 0)
        fresh.told({"next": Hint(since=0, next_use=200)}, 0)
        for owner in ("gap", "next"):
            assert policy.rank(Run([owner]), now) == fresh.rank(Run([owner]), now)


def test_a_shared_stack_is_leased_if_one_of_its_owners_is_and_known_if_one_is() -> None:
    policy = Retention()
    policy.told({"leased": Hint(since=0, gap=Steady(1), leased=True)}, 0)
    policy.told({"dear": Hint(since=0, gap=Steady(100))}, 0)
    assert policy.rank(Run(["dear", "leased", "new"]), 0) == (LEASED, 1)
    assert policy.rank(Run(["new", "dear"]), 0) == (KNOWN, 100)


def test_a_hint_of_which_nothing_is_read_leaves_the_owner_to_lru() -> None:
    policy = Retention()
    policy.told({"a": Hint(since=0, steps=1, hold=5, reuse=1)}, 0)
    assert policy.rank(Run("a", 3), 4) == Policy().rank(Run("a", 3), 4)


def test_a_next_use_that_is_long_overdue_is_not_believed_any_more() -> None:
    assert worth(Hint(since=0, next_use=5), 14.9) == 1 / SOON
    assert rank_of(Hint(since=0, next_use=5), 15.1)[0] == UNKNOWN
    assert worth(Hint(since=0, next_use=50), 99.9) == 1 / SOON
    assert rank_of(Hint(since=0, next_use=50), 100.1)[0] == UNKNOWN
