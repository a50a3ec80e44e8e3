"""Forecasts: what of the core's knowledge the engines are told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.policy import Hint
from scheduler.actions import Dispatch
from scheduler.events import StepArrived, StepFinished, Usage, WorkerUp
from scheduler.forecast import Key, RoleUses, forecast
from scheduler.graph import Step, Workflow
from scheduler.identity import Identity
from scheduler.scheduler import Scheduler
from scheduler.template import Template

STAGES = {
    "nodes": {"plan": {"seconds": 5}, "work": {"seconds": 20}, "check": {"seconds": 5}},
    "edges": [{"from": "plan", "to": "work", "gap_seconds": 1}, {"from": "work", "to": "check", "gap_seconds": 1}],
    "starts": ["plan"],
}


class Core:
    """A scheduler over one worker, whose runs declare how they go."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.scheduler.handle(WorkerUp("w", "m", ("m",), "1"), 0.0)
        self.scheduler.knowledge.declare("t", Template.parse("stages", STAGES))
        self.uses = RoleUses()
        self.steps = 0

    def step(self, run: str, role: str, now: float, seconds: float | None = None, after: tuple[str, ...] = ()) -> Step:
        """A step comes, and ends after so many seconds if any are given."""
        self.steps += 1
        name = f"s{self.steps}"
        who = Identity(workflow=run, session=role, role=role, template="stages", after=after, tenant="t")
        (action,) = self.scheduler.handle(StepArrived(name, "m", who), now)
        assert isinstance(action, Dispatch)
        step = self.scheduler.running[name]
        if seconds is not None:
            self.scheduler.handle(StepFinished(name, Usage(100, 0, 10), "stop"), now + seconds)
        return step

    def workflow(self, run: str) -> Workflow:
        found = self.scheduler.graph.get("t", run)
        assert found is not None
        return found

    def moved(self, run: str, now: float, worker: str = "w") -> dict[Key, Hint]:
        return self.uses.moved(self.scheduler.knowledge, self.workflow(run), worker, now, 0.001)


def soon(hints: dict[Key, Hint]) -> dict[str, float | None]:
    return {role: hint.next_use for (_, _, role), hint in hints.items()}


def test_a_branch_is_foretold_by_the_gap_that_was_learned() -> None:
    core = Core()
    step = core.step("run", "plan", 0.0, 5.0)
    hint = forecast(core.scheduler.knowledge, step, 5.0, 0.002)
    assert (hint.since, hint.seconds_per_token, hint.next_use, hint.leased) == (5.0, 0.002, None, False)
    assert hint.gap is not None
    assert hint.gap.index(1.0) == core.scheduler.knowledge.gap(step.branch).index(1.0)


def test_roles_are_foretold_by_the_graph() -> None:
    core = Core()
    core.step("run", "plan", 0.0)
    assert soon(core.moved("run", 100.0)) == {"plan": 100.0, "work": 106.0, "check": 127.0}


def test_a_role_counts_for_the_run_that_needs_it_soonest() -> None:
    core = Core()
    core.step("early", "plan", 0.0)
    core.moved("early", 0.0)
    core.step("late", "plan", 3.0)
    assert soon(core.moved("late", 3.0)) == {"plan": 0.0, "work": 6.0, "check": 27.0}
    assert soon(core.uses.over(core.workflow("early"), 4.0, 0.001)) == {"plan": 3.0, "work": 9.0, "check": 30.0}
    assert soon(core.uses.over(core.workflow("late"), 5.0, 0.001)) == {"plan": None, "work": None, "check": None}


def test_what_a_run_has_passed_is_no_longer_foretold() -> None:
    core = Core()
    step = core.step("run", "plan", 0.0)
    core.moved("run", 0.0)
    core.scheduler.handle(StepFinished(step.id, Usage(100, 0, 10), "stop"), 5.0)
    assert soon(core.moved("run", 5.0)) == {"plan": None, "work": 6.0, "check": 27.0}
    core.step("run", "work", 8.0, after=("plan",))
    assert soon(core.moved("run", 8.0)) == {"work": 8.0, "check": 29.0}


def test_workers_do_not_share_what_is_foretold() -> None:
    core = Core()
    core.step("one", "plan", 0.0)
    core.step("two", "plan", 0.0)
    core.moved("one", 0.0, "w0")
    told = core.moved("two", 2.0, "w1")
    assert {worker for worker, _, _ in told} == {"w1"}
    assert soon(told)["work"] == 8.0


def test_a_run_that_sits_on_two_workers_is_foretold_on_both() -> None:
    core = Core()
    core.step("run", "plan", 0.0)
    core.moved("run", 0.0, "w0")
    assert soon(core.moved("run", 1.0, "w1"))["work"] == 7.0
    told = core.uses.over(core.workflow("run"), 2.0, 0.001)
    assert {worker for worker, _, _ in told} == {"w0", "w1"}
    assert not core.uses._uses


def test_a_use_that_is_long_overdue_lapses() -> None:
    core = Core()
    core.step("run", "plan", 0.0)
    core.moved("run", 0.0)
    assert soon(core.uses.lapsed(9.0, 0.001)) == {}
    assert soon(core.uses.lapsed(16.1, 0.001)) == {"plan": None, "work": None}
    assert soon(core.uses.lapsed(60.0, 0.001)) == {"check": None}


def test_a_run_of_one_role_says_nothing_of_it() -> None:
    core = Core()
    who = Identity(workflow="solo", session="s", role="agent", tenant="t")
    core.scheduler.handle(StepArrived("x", "m", who), 0.0)
    assert core.moved("solo", 0.0) == {}


MOVES = st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 30.0), st.booleans()), max_size=40)


@given(MOVES)
def test_what_is_told_is_the_soonest_of_what_was_foretold_and_nothing_outlives_its_run(
    moves: list[tuple[int, float, bool]],
) -> None:
    core, now = Core(), 0.0
    told: dict[Key, Hint] = {}
    live: dict[str, tuple[float, dict[str, float]]] = {}
    for number, seconds, ends in moves:
        now += seconds
        run = f"run-{number}"
        told.update(core.uses.lapsed(now, 0.001))
        core.step(run, "plan", now)
        if ends:
            told.update(core.uses.over(core.workflow(run), now, 0.001))
            live.pop(run, None)
        else:
            told.update(core.moved(run, now))
            live[run] = now, {"plan": 0.0, "work": 6.0, "check": 27.0}
        for role in ("plan", "work", "check"):
            due = [
                at + ahead[role] for at, ahead in live.values() if at + ahead[role] + max(10.0, ahead[role]) > now
            ]  # fmt: skip
            hint = told.get(("w", "t", role))
            known = hint.next_use if hint else None
            assert (known is None and not due) or abs((known or 0.0) - min(due)) < 1e-6
    for workflow in list(core.scheduler.graph.workflows.values()):
        core.uses.over(workflow, now, 0.001)
    assert not core.uses._uses
    assert not core.uses._keys
