"""Quotas: a tenant uses what it may, what has begun goes on, and who must wait learns for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.actions import Action, Dispatch, Reject
from scheduler.events import (
    FirstToken,
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.identity import Identity
from scheduler.quotas import Quota
from scheduler.scheduler import Scheduler

SIZE, SMALL = 300, Usage(10, 0, 1)


class Play:
    """One worker of unknown size, and tenants with quotas."""

    def __init__(self, **quotas: Quota) -> None:
        self.now, self.count = 0.0, 0
        self.scheduler = Scheduler()
        self.scheduler.quotas.of = quotas
        self.send(WorkerUp("w", "pool", ("m",), "0"))

    def send(self, event: object) -> list[Action]:
        actions = self.scheduler.handle(event, self.now)  # type: ignore[arg-type]
        self.scheduler.check()
        return actions

    def call(self, workflow: str, tenant: str = "t") -> Dispatch | Reject:
        self.count += 1
        who = Identity(tenant=tenant, workflow=workflow, session=workflow, rule="metadata")
        (action,) = self.send(StepArrived(f"s{self.count}", "m", who, size=SIZE))
        assert isinstance(action, Dispatch | Reject)
        return action

    def turn(self, workflow: str, usage: Usage = SMALL, tenant: str = "t") -> Dispatch:
        action = self.call(workflow, tenant)
        assert isinstance(action, Dispatch)
        self.send(FirstToken(action.step))
        self.send(StepFinished(action.step, usage, "tool_calls"))
        return action


def refused(action: Dispatch | Reject) -> Reject:
    assert isinstance(action, Reject)
    return action


def test_a_tenant_without_a_quota_is_never_refused() -> None:
    play = Play(other=Quota(1, 1))
    for number in range(50):
        play.turn(f"w{number}", Usage(10**6, 0, 10**6))


def test_one_more_workflow_than_a_tenant_may_have_is_refused_until_one_has_finished() -> None:
    play = Play(t=Quota(workflows=2))
    play.turn("a")
    play.turn("b")
    reject = refused(play.call("c"))
    assert (reject.status, reject.retry_after) == (429, 5)
    assert "2 workflows run" in reject.reason
    assert isinstance(play.call("c", "another"), Dispatch)
    play.send(WorkflowFinished("t", "a"))
    play.turn("c")


def test_a_workflow_that_has_begun_always_goes_on() -> None:
    play = Play(t=Quota(workflows=1))
    play.turn("a")
    play.now += 3000.0
    play.send(Tick())
    play.turn("b")
    play.turn("a")


def test_a_workflow_counts_while_a_step_of_it_runs_and_no_longer_than_its_return_is_likely() -> None:
    play = Play(t=Quota(workflows=1))
    play.call("a")
    play.now += 500.0
    refused(play.call("b"))
    play.send(StepFinished("s1", Usage(10, 0, 1), "tool_calls"))
    refused(play.call("b"))
    play.now += 599.0
    play.turn("b")


def test_a_workflow_whose_first_step_failed_counts_no_more() -> None:
    play = Play(t=Quota(workflows=1))
    play.call("a")
    play.send(StepFailed("s1", "gone", retryable=False))
    play.turn("b")


def test_who_has_used_a_minutes_tokens_waits_until_they_are_paid_back() -> None:
    play = Play(t=Quota(tokens_per_minute=600))
    play.turn("a", Usage(1000, 0, 200))
    reject = refused(play.call("a"))
    assert (reject.status, reject.retry_after) == (429, 60)
    play.now += 59.0
    assert refused(play.call("b")).retry_after == 1
    play.now += 1.0
    play.turn("a")


def test_what_the_prefix_cache_had_costs_no_tokens() -> None:
    play = Play(t=Quota(tokens_per_minute=100))
    for _ in range(20):
        play.turn("a", Usage(10_000, 9_999, 1))


def test_nobody_is_told_to_come_back_later_than_in_a_minute() -> None:
    play = Play(t=Quota(tokens_per_minute=1))
    play.turn("a", Usage(10**9, 0, 0))
    assert refused(play.call("a")).retry_after == 60


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 60)), max_size=40))
def test_no_more_is_used_than_the_rate_allows_and_one_step_for_each_at_once(steps: list[tuple[int, int]]) -> None:
    rate = 1000
    play, used, largest = Play(t=Quota(tokens_per_minute=rate)), 0, 0
    for tokens, seconds in steps:
        play.now += seconds
        if isinstance(action := play.call("a"), Reject):
            continue
        play.send(StepFinished(action.step, Usage(tokens, 0, 0)))
        used, largest = used + tokens, max(largest, tokens)
        assert used <= rate + rate * play.now / 60 + largest


@pytest.mark.parametrize("tenant", ["a", "b"])
def test_a_refused_step_leaves_nothing_behind(tenant: str) -> None:
    play = Play(a=Quota(workflows=1), b=Quota(tokens_per_minute=1))
    play.turn("first", tenant=tenant)
    for number in range(20):
        refused(play.call(f"w{number}", tenant))
    assert not play.scheduler.running
    assert not any(worker.running for worker in play.scheduler.workers.values())
    assert [name for _, name in play.scheduler.graph.workflows] == ["first"], "it is not even known"


def test_steps_that_come_at_once_cannot_all_pass_before_the_first_is_paid() -> None:
    play = Play(t=Quota(tokens_per_minute=1000))
    play.turn("first", Usage(300, 0, 10))
    taken = [isinstance(play.call(f"w{number}"), Dispatch) for number in range(20)]
    assert sum(taken) == 3, "700 tokens are left, and one like the first takes some 300"


def test_who_leaves_before_the_end_has_used_what_was_expected() -> None:
    play = Play(t=Quota(tokens_per_minute=1000))
    play.turn("first", Usage(300, 0, 10))
    outcomes = []
    for number in range(10):
        outcomes.append(play.call(f"w{number}"))
        play.send(StepCancelled(outcomes[-1].step))
    assert sum(isinstance(one, Dispatch) for one in outcomes) == 3


def test_a_workflow_that_turned_out_to_be_a_part_of_another_takes_no_place() -> None:
    play = Play(t=Quota(workflows=2))
    play.turn("root")
    play.turn("child")
    graph = play.scheduler.graph
    graph.adopt(graph.workflows["t", "child"], graph.workflows["t", "root"], None)
    play.turn("new")


def test_an_idle_workflow_counts_for_ten_minutes_at_most() -> None:
    play = Play(t=Quota(workflows=1))
    for _ in range(40):
        play.turn("slow")
        play.now += 5 * 3600.0
    play.turn("slow")
    refused(play.call("other"))
    play.now += 601.0
    play.turn("other")
