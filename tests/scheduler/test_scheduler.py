from __future__ import annotations

import pytest

from scheduler.actions import Action, Cancel, Dispatch, Reject
from scheduler.events import (
    FirstToken,
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.graph import Limits
from scheduler.identity import Identity
from scheduler.scheduler import Scheduler


class Driver:
    """Sends events to a scheduler on a clock of its own, and checks it after each."""

    def __init__(self, workers: int = 2, limits: Limits | None = None) -> None:
        self.scheduler = Scheduler(limits=limits)
        self.now, self.count = 1000.0, 0
        for index in range(workers):
            self.up(f"w{index}")

    def send(self, event: object) -> list[Action]:
        actions = self.scheduler.handle(event, self.now)  # type: ignore[arg-type]
        self.scheduler.check()
        return actions

    def up(self, worker: str, models: tuple[str, ...] = ("m",), life: str = "1", pool: str = "m") -> list[Action]:
        return self.send(WorkerUp(worker, pool, models, life, 1000))

    def step(self, session: str | None = None, model: str = "m", **identity: object) -> Dispatch | Reject:
        self.count += 1
        who = Identity(session=session, tenant="t", rule="x-session-id" if session else "anonymous", **identity)  # type: ignore[arg-type]
        (action,) = self.send(StepArrived(f"s{self.count}", model, who))
        assert isinstance(action, Dispatch | Reject)
        return action

    def place(self, session: str | None = None, **more: object) -> str:
        action = self.step(session, **more)  # type: ignore[arg-type]
        assert isinstance(action, Dispatch)
        return action.decision.worker

    def finish(self, step: str | None = None) -> None:
        self.send(StepFinished(step or f"s{self.count}", Usage(10, 5, 3), "stop"))

    def turn(self, session: str, **more: object) -> str:
        worker = self.place(session, **more)
        self.finish()
        return worker


def test_a_session_stays_on_its_worker() -> None:
    d = Driver()
    first = d.turn("a")
    d.turn("b")
    d.turn("c")
    assert [d.turn("a") for _ in range(3)] == [first] * 3
    action = d.step("a")
    assert isinstance(action, Dispatch)
    assert action.decision.reason == "continues"


def test_new_sessions_go_to_the_worker_with_the_fewest_live_ones() -> None:
    d = Driver(workers=3)
    assert [d.turn(s) for s in "abcdef"] == ["w0", "w1", "w2"] * 2


def test_anonymous_steps_weigh_on_a_worker_only_while_they_run() -> None:
    d = Driver()
    d.place()
    assert d.place() == "w1"
    d.finish("s1")
    d.finish("s2")
    assert not d.scheduler.graph.live
    assert d.place() == "w0"


def test_a_session_that_is_quiet_for_long_weighs_nothing_but_keeps_its_seat() -> None:
    d = Driver(limits=Limits(live_seconds=60))
    d.turn("a")
    d.now += 61
    d.send(Tick())
    assert not d.scheduler.graph.live
    assert not any(w.sessions for w in d.scheduler.workers.values())
    assert d.turn("b") == "w1"
    assert d.turn("a") == "w0"


def test_a_session_that_is_later_than_its_kind_ever_was_weighs_nothing_until_it_returns() -> None:
    d = Driver()
    for number in range(30):
        for _ in range(10):
            d.turn(f"earlier {number}", role="agent")
            d.now += 2
        d.send(WorkflowFinished("t", f"earlier {number}"))
    here = d.turn("late", role="agent")
    d.now += 5
    d.send(Tick())
    assert len(d.scheduler.workers[here].sessions) == 1, "it may well come"
    d.now += 60
    d.send(Tick())
    assert not d.scheduler.workers[here].sessions
    assert d.turn("late", role="agent") == here, "its KV is there"
    assert len(d.scheduler.workers[here].sessions) == 1


def test_steps_that_nobody_can_follow_are_not_waited_for() -> None:
    d = Driver()
    for _ in range(30):
        d.step()
        d.finish()
    assert not d.scheduler._awaited._due


def test_a_finished_workflow_weighs_nothing() -> None:
    d = Driver()
    d.turn("a")
    d.send(WorkflowFinished("t", "a"))
    assert not any(w.sessions for w in d.scheduler.workers.values())
    workflow = d.scheduler.graph.get("t", "a")
    assert workflow
    assert workflow.state == "finished"


def test_a_final_step_ends_its_session() -> None:
    d = Driver()
    d.turn("a", final=True)
    assert not d.scheduler.graph.live


def test_a_step_that_met_a_lost_worker_goes_once_to_another() -> None:
    d = Driver()
    assert d.place("a") == "w0"
    (again,) = d.send(StepFailed("s1", "refused", retryable=True))
    assert isinstance(again, Dispatch)
    assert again.decision.worker == "w1"
    assert again.decision.reason.startswith("retried")
    (last,) = d.send(StepFailed("s1", "refused", retryable=True))
    assert isinstance(last, Reject)
    assert last.status == 502
    assert not d.scheduler.running


def test_a_step_that_kills_workers_sees_two_of_them_at_most() -> None:
    d = Driver(workers=5)
    d.place("a")
    assert isinstance(d.send(StepFailed("s1", "reset", retryable=True))[0], Dispatch)
    assert isinstance(d.send(StepFailed("s1", "reset", retryable=True))[0], Reject)


def test_among_equals_the_new_worker_comes_first() -> None:
    d = Driver()
    for session in "ab":
        d.turn(session, final=True)
    d.send(WorkerDown("w1"))
    d.up("w1", life="2")
    assert d.turn("c") == "w1"


def test_a_workflow_with_too_many_sessions_drops_its_oldest_idle_ones() -> None:
    d = Driver(limits=Limits(sessions_per_workflow=5))
    d.place("busy", workflow="w")
    for index in range(50):
        d.turn(f"s{index}", workflow="w")
    workflow = d.scheduler.graph.get("t", "w")
    assert workflow
    assert len(workflow.sessions) == 5
    assert {"busy", "s49"} <= workflow.sessions.keys()
    assert len(d.scheduler.graph._root_of) == 5


def test_a_model_nobody_has_leaves_no_trace() -> None:
    d = Driver()
    d.step("a", model="x" * 1000)
    assert not d.scheduler.graph.workflows


def test_a_worker_that_cannot_start_does_not_keep_others_waiting() -> None:
    d = Driver()
    d.send(WorkerDown("w2", failed=True))
    refused = d.step("a", model="later")
    assert isinstance(refused, Reject)
    assert refused.status == 404


def test_a_session_moves_for_good_when_its_worker_refused() -> None:
    d = Driver()
    assert d.place("a") == "w0"
    d.send(StepFailed("s1", "refused", retryable=True))
    d.finish("s1")
    assert d.turn("a") == "w1"


def test_a_step_whose_answer_had_begun_is_not_retried() -> None:
    d = Driver()
    d.place("a")
    d.send(FirstToken("s1"))
    assert d.send(StepFailed("s1", "reset", retryable=False)) == []
    assert not d.scheduler.running


def test_a_lost_worker_cuts_off_its_steps_and_its_sessions_move() -> None:
    d = Driver()
    d.turn("a")
    d.place("a")
    assert d.send(WorkerDown("w0")) == [Cancel("s2", "worker w0 is lost")]
    (again,) = d.send(StepFailed("s2", "cut", retryable=True))
    assert isinstance(again, Dispatch)
    assert again.decision.worker == "w1"


def test_a_restarted_worker_has_no_sessions_and_gets_the_next_new_ones() -> None:
    d = Driver()
    for session in "abcd":
        d.turn(session)
    d.send(WorkerDown("w0"))
    d.up("w0", life="2")
    assert d.turn("e") == "w0"
    assert d.turn("f") == "w0"
    action = d.step("b")
    assert isinstance(action, Dispatch)
    assert action.decision == action.decision.__class__("w1", "continues")


def test_a_session_does_not_count_on_the_kv_of_an_earlier_life() -> None:
    d = Driver(workers=1)
    d.turn("a")
    d.up("w0", life="2")
    action = d.step("a")
    assert isinstance(action, Dispatch)
    assert action.decision.reason.startswith("moved")


def test_a_blip_of_the_same_life_keeps_the_seat() -> None:
    d = Driver()
    d.turn("a")
    d.turn("b")
    d.send(WorkerDown("w1"))
    d.up("w1")
    assert d.turn("b") == "w1"


def test_a_draining_worker_keeps_its_sessions_and_takes_no_new_one() -> None:
    d = Driver()
    d.turn("a")
    d.send(WorkerDraining("w0"))
    assert [d.turn(s) for s in "bcd"] == ["w1"] * 3
    assert d.turn("a") == "w0"


def test_a_workflow_may_span_pools_with_a_seat_in_each() -> None:
    d = Driver(workers=0)
    d.up("big", ("big",), pool="big")
    d.up("small", ("small", "small-lora"), pool="small")
    assert [d.turn("a", model=m) for m in ("big", "small", "small-lora", "big")] == ["big", "small", "small", "big"]
    workflow = d.scheduler.graph.get("t", "a")
    assert workflow
    assert len(workflow.sessions) == 1


def test_a_model_nobody_has_is_not_found_and_one_that_is_down_is_unavailable() -> None:
    d = Driver()
    unknown = d.step("a", model="nope")
    assert isinstance(unknown, Reject)
    assert (unknown.status, unknown.retry_after) == (404, None)
    d.send(WorkerDown("w0"))
    d.send(WorkerDown("w1"))
    down = d.step("a")
    assert isinstance(down, Reject)
    assert down.status == 503
    assert down.retry_after is not None


def test_while_a_worker_starts_an_unknown_model_may_be_its_own() -> None:
    d = Driver()
    d.send(WorkerDown("w2"))
    starting = d.step("a", model="later")
    assert isinstance(starting, Reject)
    assert starting.status == 503


def test_a_pinned_step_goes_to_its_worker_or_nowhere() -> None:
    d = Driver()
    who = Identity(tenant="t", session="a", rule="x")
    (action,) = d.send(StepArrived("p1", "m", who, pinned="w1"))
    assert isinstance(action, Dispatch)
    assert action.decision.worker == "w1"
    d.send(WorkerDown("w1"))
    (action,) = d.send(StepArrived("p2", "m", who, pinned="w1"))
    assert isinstance(action, Reject)


def test_tenants_with_equal_ids_never_meet() -> None:
    d = Driver()
    d.turn("a")
    (action,) = d.send(StepArrived("o1", "m", Identity(tenant="other", session="a", rule="x")))
    assert isinstance(action, Dispatch)
    assert action.decision.worker == "w1"
    assert d.scheduler.graph.get("other", "a") is not d.scheduler.graph.get("t", "a")


def test_a_child_session_joins_its_parents_workflow() -> None:
    d = Driver()
    d.turn("root")
    d.turn("child", parent="root")
    d.turn("grandchild", parent="child")
    workflow = d.scheduler.graph.get("t", "root")
    assert workflow
    assert set(workflow.sessions) == {"root", "child", "grandchild"}
    assert [s.after for s in workflow.steps] == [(), ("s1",), ("s2",)]


def test_a_step_follows_the_step_before_it_in_its_session() -> None:
    d = Driver()
    d.turn("a")
    d.turn("a")
    workflow = d.scheduler.graph.get("t", "a")
    assert workflow
    assert [s.after for s in workflow.steps] == [(), ("s1",)]
    assert workflow.steps[0].usage == Usage(10, 5, 3)


def test_events_on_steps_that_are_gone_do_nothing() -> None:
    d = Driver()
    d.turn("a")
    gone = [StepFinished("s1", Usage()), StepFailed("s1", "x", True), StepCancelled("s1"), FirstToken("zzz")]
    assert [d.send(event) for event in gone] == [[]] * 4


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    d = Driver(limits=Limits(workflows=10, steps=1000, steps_per_workflow=3))
    for index in range(50):
        d.turn(f"session-{index}")
        d.send(Tick())
    assert len(d.scheduler.graph.workflows) == 10
    assert d.scheduler.graph.get("t", "session-49")
    assert len(d.scheduler.graph._root_of) == 10
    for _ in range(5):
        d.turn("long")
    workflow = d.scheduler.graph.get("t", "long")
    assert workflow
    assert len(workflow.steps) == 3


def test_old_workflows_are_forgotten_but_never_a_running_one() -> None:
    d = Driver(limits=Limits(live_seconds=10, kept_seconds=20))
    d.place("running")
    d.turn("old")
    d.now += 100
    d.send(Tick())
    assert d.scheduler.graph.get("t", "old") is None
    assert d.scheduler.graph.get("t", "running")
    d.finish("s1")


@pytest.mark.parametrize("seconds", [0, 30])
def test_the_owner_of_a_session_is_the_same_after_a_restart(seconds: int) -> None:
    one, two = Driver(), Driver()
    two.now += seconds
    a, b = one.step("a"), two.step("a")
    assert isinstance(a, Dispatch)
    assert isinstance(b, Dispatch)
    assert a.owner == b.owner
    assert a.owner != a.session
