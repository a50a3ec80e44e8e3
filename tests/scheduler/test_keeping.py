"""What the core tells the engines of the KV they hold: what is dead, who returns when, what to fetch ahead."""

from __future__ import annotations

import pytest

from scheduler.actions import Action, Advice, Dispatch, Prefetch, Release, Retain
from scheduler.events import (
    AdviceDue,
    FirstToken,
    ResidencyChanged,
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerDown,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.graph import Limits
from scheduler.habits import FEW
from scheduler.identity import Identity
from scheduler.keeping import role_owner
from scheduler.prompt import Answer, ToolCall
from scheduler.scheduler import Scheduler
from scheduler.template import Template

STAGES = {
    "nodes": {"plan": {"seconds": 5}, "work": {"seconds": 20}, "check": {"seconds": 5}},
    "edges": [
        {"from": "plan", "to": "work", "gap_seconds": 1},
        {"from": "work", "to": "check", "gap_seconds": 1},
        {"from": "check", "to": "plan", "gap_seconds": 1},
    ],
    "starts": ["plan"],
}


class Core:
    """A scheduler over workers whose engines take advice; runs declare how they go."""

    def __init__(self, workers: int = 1, advised: bool = True, host: int = 0) -> None:
        self.scheduler = Scheduler(limits=Limits(live_seconds=600.0, kept_seconds=3600.0))
        for number in range(workers):
            self.up(f"w{number}", advised=advised, host=host)
        self.scheduler.knowledge.declare("t", Template.parse("stages", STAGES))
        self.steps = 0

    def up(self, worker: str, life: str = "1", advised: bool = True, host: int = 0) -> None:
        self.scheduler.handle(WorkerUp(worker, "m", ("m",), life, 10_000, host, advised, host > 0), 0.0)

    def arrive(self, run: str, session: str, now: float, **who: object) -> Dispatch:
        self.steps += 1
        identity = Identity(workflow=run, session=session, tenant="t", **who)  # type: ignore[arg-type]
        actions = self.scheduler.handle(StepArrived(f"s{self.steps}", "m", identity), now)
        (sent,) = [action for action in actions if isinstance(action, Dispatch)]
        return sent

    def stage(self, run: str, role: str, now: float, after: tuple[str, ...] = ()) -> Dispatch:
        return self.arrive(run, role, now, role=role, template="stages", after=after)

    def round(self, run: str, start: float = 0.0) -> dict[str, str]:
        """One round of the stages, a second each; the branch of each role."""
        branches = {}
        before: tuple[str, ...] = ()
        for number, role in enumerate(STAGES["nodes"]):
            sent = self.stage(run, role, start + number, before)
            self.finish(sent, start + number + 1.0)
            branches[role], before = branch(sent), (role,)
        return branches

    def finish(self, sent: Dispatch, now: float, stop: str = "tool_calls", tokens: int = 100) -> list[Action]:
        calls = (ToolCall("c", "bash", "{}"),) if stop == "tool_calls" else ()
        return self.scheduler.handle(StepFinished(sent.step, Usage(tokens, 0, 10), stop, Answer(calls=calls)), now)

    def told(self, now: float) -> list[Advice]:
        return self.scheduler.handle(AdviceDue(), now)  # type: ignore[return-value]


def branch(sent: Dispatch) -> str:
    return sent.owner.partition(".")[0]


def retained(advice: list[Advice]) -> dict[str, Retain]:
    return {one.owner: one for one in advice if isinstance(one, Retain)}


def released(advice: list[Advice]) -> list[tuple[str, str]]:
    return sorted((one.worker, one.owner) for one in advice if isinstance(one, Release))


def test_a_branch_that_waits_is_foretold_by_its_learned_gap_once() -> None:
    core = Core()
    sent = core.arrive("run", "main", 0.0)
    assert core.told(0.1) == []
    core.finish(sent, 5.0)
    hint = retained(core.told(5.1))[branch(sent)].hint
    assert hint.since == 5.0
    assert hint.next_use is None
    waiting = core.scheduler.graph.get("t", "run").sessions["main"].branches[0]  # type: ignore[union-attr]
    assert hint.gap is not None
    assert 0.5 < hint.gap.index(1.0) / core.scheduler.knowledge.gap(waiting).index(1.0) < 1.0  # it may be the last
    assert core.told(5.2) == []


def test_a_branch_whose_next_step_has_come_already_is_not_foretold() -> None:
    core = Core()
    core.finish(core.arrive("run", "main", 0.0), 5.0)
    core.arrive("run", "main", 5.05)
    assert retained(core.told(5.1)).keys() == {role_owner("t", None)}


def test_a_role_of_which_no_graph_says_anything_is_foretold_by_how_often_its_steps_come() -> None:
    core = Core()
    for number in range(6):
        core.finish(core.arrive(f"run-{number}", "main", 10.0 * number, role="plan"), 10.0 * number + 1)
        told = retained(core.told(10.0 * number + 1.1)).get(role_owner("t", "plan"))
        assert (told is not None) == (number > 0), "one step tells of no gap"
    assert told is not None
    hint = told.hint
    assert (hint.since, hint.next_use, hint.leased) == (50.0, None, True)
    assert hint.gap is not None
    assert hint.gap.index(8.0) > 4 * hint.gap.index(100.0), "soon, as so far; once overdue, less and less"


def test_a_role_goes_by_its_steps_again_once_no_graph_says_when_it_runs() -> None:
    core = Core()
    core.round("one")
    core.round("two", 60.0)
    core.stage("two", "plan", 63.5, ("check",))
    work = role_owner("t", "work")
    assert retained(core.told(63.5))[work].hint.next_use is not None
    core.scheduler.handle(WorkflowFinished("t", "one"), 64.0)
    core.scheduler.handle(WorkflowFinished("t", "two"), 64.0)
    hint = retained(core.told(64.1))[work].hint
    assert (hint.next_use, hint.since, hint.reuse) == (None, 61.0, 0.98)
    assert hint.gap is not None
    assert hint.hold == hint.gap.quantile(0.95)


def test_a_role_whose_steps_come_sooner_than_the_graph_says_goes_by_them() -> None:
    core = Core()
    core.round("first")
    core.stage("first", "work", 100.0, ("plan",))
    plan, work = role_owner("t", "plan"), role_owner("t", "work")
    for number in range(6):
        now = 101.0 + 3 * number
        core.finish(core.arrive(f"run-{number}", "main", now, role="plan"), now + 0.1)
        told = retained(core.told(now + 0.2))
    assert told[plan].hint.gap is not None, "every 3 s; the graph says in half a minute"
    core.told(117.0)
    core.stage("second", "plan", 118.0)
    hints = retained(core.told(118.0))
    assert hints[work].hint.next_use is not None, "in 6 s; its steps came 100 s apart"


def test_a_role_that_is_overdue_is_foretold_no_more() -> None:
    core = Core()
    for number in range(4):
        core.finish(core.arrive(f"run-{number}", "main", 2.0 * number, role="plan"), 2.0 * number + 1)
        core.told(2.0 * number + 1.1)
    hint = retained(core.told(4000.0))[role_owner("t", "plan")].hint
    assert (hint.gap, hint.next_use, hint.leased) == (None, None, False)
    assert core.told(4001.0) == []


def test_the_roles_of_two_tenants_are_two() -> None:
    core = Core()
    for number, tenant in enumerate("abab"):
        identity = Identity(workflow=f"run-{number}", session="main", tenant=tenant, role="plan")
        core.scheduler.handle(StepArrived(f"t{number}", "m", identity), 2.0 * number)
        told = retained(core.told(2.0 * number + 0.1))
    assert told.keys() == {role_owner("b", "plan")}
    assert told[role_owner("b", "plan")].hint.since == 6.0


@pytest.mark.parametrize("ends", ["finishes", "is cancelled", "fails"])
def test_what_is_foretold_of_a_run_that_stands_still_lapses_when_its_next_step_is_overdue(ends: str) -> None:
    core = Core()
    core.round("run")
    sent = core.stage("run", "plan", 100.0, ("check",))
    assert role_owner("t", "check") in retained(core.told(100.0))
    if ends == "finishes":
        core.finish(sent, 101.0)
    elif ends == "fails":
        core.scheduler.handle(StepFailed(sent.step, "x", retryable=False), 101.0)
    else:
        core.scheduler.handle(StepCancelled(sent.step), 101.0)
    core.told(101.1)
    if ends == "finishes":
        assert core.scheduler.keeping.forecast._uses
        core.told(104.0)
    assert not core.scheduler.keeping.forecast._uses


def test_a_run_stands_still_nowhere_as_long_as_it_runs_somewhere() -> None:
    core = Core(workers=2)
    core.round("run")
    core.told(3.0)
    here = next(iter(core.scheduler.keeping.forecast.workers("t\0run")))
    there = "w1" if here == "w0" else "w0"
    identity = Identity(workflow="run", session="other", tenant="t", role="plan", template="stages", after=("check",))
    core.scheduler.handle(StepArrived("far", "m", identity, pinned=there), 3.5)
    core.told(3.6)
    core.told(8.0)
    assert set(core.scheduler.keeping.forecast.workers("t\0run")) == {here, there}
    core.scheduler.handle(StepFinished("far", Usage(100, 0, 10), "tool_calls", Answer()), 8.5)
    core.told(8.6)
    core.told(12.0)
    assert not core.scheduler.keeping.forecast._uses


def test_the_graph_foretells_roles_and_the_one_session_that_has_the_role() -> None:
    core = Core()
    branches = core.round("run")
    first = core.stage("run", "plan", 100.0, ("check",))
    hints = {owner: one.hint.next_use for owner, one in retained(core.told(100.0)).items()}
    assert hints[role_owner("t", "plan")] == 100.0
    assert hints[role_owner("t", "work")] == hints[branches["work"]] == pytest.approx(106, abs=0.5)
    assert hints[role_owner("t", "check")] == pytest.approx(127, abs=2.5)
    assert branch(first) not in hints


def test_a_branch_that_the_graph_was_wrong_about_is_foretold_by_its_gap_again() -> None:
    core = Core()
    branches = core.round("run")
    core.stage("run", "plan", 100.0, ("check",))
    core.told(100.0)
    hint = retained(core.told(117.0))[branches["work"]].hint
    assert hint.next_use is None
    assert hint.gap is not None
    assert hint.since == 2.0


def test_the_end_of_a_run_releases_all_its_branches_and_foretells_its_roles_no_more() -> None:
    core = Core()
    one, two = core.stage("run", "plan", 0.0), core.stage("run", "work", 0.0)
    core.finish(one, 1.0)
    core.finish(two, 1.0)
    core.told(1.0)
    core.scheduler.handle(WorkflowFinished("t", "run"), 2.0)
    advice = core.told(2.1)
    assert released(advice) == sorted([("w0", branch(one)), ("w0", branch(two))])
    assert {one.hint.next_use for one in retained(advice).values()} == {None}


def test_the_end_of_a_session_that_the_client_marks_releases_it_at_once() -> None:
    core = Core()
    sent = core.arrive("run", "child", 0.0, final=True)
    core.finish(sent, 1.0)
    assert released(core.told(1.1)) == [("w0", branch(sent))]


def test_what_speaks_again_before_it_was_told_is_not_released() -> None:
    core = Core()
    core.finish(core.arrive("run", "main", 0.0), 1.0)
    core.told(1.0)
    core.scheduler.handle(WorkflowFinished("t", "run"), 2.0)
    core.arrive("run", "main", 2.05)
    assert released(core.told(2.1)) == []


def test_a_session_that_moved_is_dead_where_it_was() -> None:
    core = Core(workers=2)
    sent = core.arrive("run", "main", 0.0)
    core.finish(sent, 1.0)
    core.told(1.0)
    was = sent.decision.worker
    other = "w1" if was == "w0" else "w0"
    identity = Identity(workflow="run", session="main", tenant="t")
    (moved,) = core.scheduler.handle(StepArrived("pinned", "m", identity, pinned=other), 2.0)
    assert isinstance(moved, Dispatch)
    assert moved.decision.worker == other
    assert released(core.told(2.1)) == [(was, branch(sent))]


def test_a_quiet_session_is_released_when_it_is_forgotten_at_the_latest() -> None:
    core = Core()
    sent = core.arrive("run", "main", 0.0)
    core.finish(sent, 1.0)
    core.told(1.0)
    core.scheduler.handle(Tick(), 4000.0)
    assert released(core.told(4000.1)) == [("w0", branch(sent))]


def test_a_session_that_often_returns_late_is_kept_when_it_is_quiet() -> None:
    core = Core()
    now = 0.0
    for _ in range(40):
        core.finish(core.arrive("run", "main", now), now, stop="stop")
        now += 900.0
    core.told(now)
    core.finish(core.arrive("run", "main", now), now, stop="stop")
    core.told(now)
    core.scheduler.handle(Tick(), now + 601.0)
    assert released(core.told(now + 601.0)) == []


def test_engines_that_take_no_advice_are_told_nothing() -> None:
    core = Core(advised=False, host=100)
    sent = core.stage("run", "plan", 0.0)
    core.scheduler.handle(FirstToken(sent.step), 1.0)
    core.finish(sent, 5.0)
    core.scheduler.handle(WorkflowFinished("t", "run"), 6.0)
    assert core.told(6.1) == []


def test_a_lost_worker_is_told_nothing_of_what_it_held() -> None:
    core = Core()
    core.finish(core.arrive("run", "main", 0.0), 1.0)
    core.scheduler.handle(WorkerDown("w0"), 2.0)
    assert core.told(2.1) == []


def test_what_runs_next_is_fetched_while_the_step_before_decodes() -> None:
    core = Core(host=10_000)
    branches = core.round("run")
    sent = core.stage("run", "plan", 100.0, ("check",))
    fetched = core.scheduler.handle(FirstToken(sent.step), 101.0)
    within = {one.owner: one.within for one in fetched if isinstance(one, Prefetch)}
    assert within.keys() == {role_owner("t", role) for role in ("work", "check")} | {
        branches["work"],
        branches["check"],
    }
    assert within[role_owner("t", "work")] == within[branches["work"]] == pytest.approx(5, abs=0.5)
    assert within[role_owner("t", "check")] == within[branches["check"]] == pytest.approx(26, abs=2.5)


def test_a_parent_is_fetched_when_its_child_has_answered() -> None:
    core = Core(host=10_000)
    parent = core.arrive("run", "main", 0.0)
    core.finish(parent, 1.0)
    child = core.arrive("run", "child", 2.0, parent="main")
    assert core.finish(child, 3.0, stop="tool_calls") == []
    child = core.arrive("run", "child", 4.0, parent="main")
    (fetch,) = core.finish(child, 5.0, stop="stop")
    assert isinstance(fetch, Prefetch)
    assert fetch.owner == branch(parent)


def test_sub_agents_are_released_when_they_answer_once_few_of_their_kind_were_called_again() -> None:
    core = Core()
    released = []
    for number in range(FEW + 4):
        run, now = f"r{number}", 100.0 * number
        core.finish(core.arrive(run, run, now, role="main"), now + 1)
        child = core.arrive(run, f"{run}/sub", now + 2, role="sub", parent=run)
        core.finish(child, now + 3, stop="tool_calls")
        assert Release("w0", branch(child)) not in core.told(now + 3.5), "it works on"
        child = core.arrive(run, f"{run}/sub", now + 4, role="sub", parent=run)
        core.finish(child, now + 5, stop="stop")
        released.append(Release("w0", branch(child)) in core.told(now + 5.5))
        core.finish(core.arrive(run, run, now + 6, role="main"), now + 7)
        core.scheduler.handle(WorkflowFinished("t", run), now + 8)
        core.told(now + 9)
    assert released[0] is False
    assert released[-1] is True
    assert released == sorted(released)


def test_sub_agents_whose_kind_is_called_again_are_kept_when_they_answer() -> None:
    core = Core()
    for number in range(3 * FEW):
        child = core.arrive("run", "sub", 10.0 * number, role="sub", parent="run")
        core.finish(child, 10.0 * number + 1, stop="stop")
        assert Release("w0", branch(child)) not in core.told(10.0 * number + 2)


def test_a_parent_is_not_fetched_while_another_of_its_children_works() -> None:
    core = Core(host=10_000)
    core.finish(core.arrive("run", "main", 0.0), 1.0)
    children = [core.arrive("run", f"child{number}", 2.0, parent="main") for number in range(3)]
    core.finish(children[0], 3.0, stop="tool_calls")
    assert core.finish(children[1], 4.0, stop="stop") == []
    core.finish(core.arrive("run", "child0", 5.0, parent="main"), 6.0, stop="stop")
    assert len(core.finish(children[2], 7.0, stop="stop")) == 1


def test_a_session_that_goes_on_by_itself_is_foretold_by_its_gap_whatever_the_graph_says() -> None:
    core = Core()
    loop = {"from": "work", "to": "work", "gap_seconds": 1}
    loops = {**STAGES, "edges": [*STAGES["edges"], loop]}
    core.scheduler.knowledge.declare("t", Template.parse("stages", loops))
    core.finish(core.stage("run", "plan", 0.0), 0.5)
    core.finish(core.stage("run", "work", 1.0, ("plan",)), 1.5)
    sent = core.stage("run", "work", 2.0, ("work",))
    core.finish(sent, 2.5)
    work = branch(sent)
    assert retained(core.told(3.0))[work].hint.gap is not None
    core.stage("run", "plan", 4.0, ("work",))
    assert retained(core.told(4.0))[work].hint.next_use is not None, "another one runs, and work comes after it"


def test_a_child_that_broke_off_does_not_keep_its_parent_from_being_fetched() -> None:
    core = Core(host=10_000)
    core.finish(core.arrive("run", "main", 0.0), 1.0)
    broken, whole = (core.arrive("run", f"child{number}", 2.0, parent="main") for number in range(2))
    core.scheduler.handle(StepFailed(broken.step, "it broke", retryable=False), 3.0)
    assert len(core.finish(whole, 4.0, stop="stop")) == 1


def test_of_two_sessions_of_a_role_neither_is_foretold_by_the_graph_because_the_other_goes_on() -> None:
    core = Core()
    loops = {**STAGES, "edges": [*STAGES["edges"], {"from": "work", "to": "work", "gap_seconds": 60}]}
    core.scheduler.knowledge.declare("t", Template.parse("stages", loops))
    core.finish(core.stage("run", "plan", 0.0), 0.5)
    ends = []
    for session, at in (("a", 1.0), ("b", 50.0)):
        sent = core.arrive("run", session, at, role="work", template="stages", after=("plan",))
        core.finish(sent, at + 0.5)
        ends.append(branch(sent))
    hints = retained(core.told(51.0))
    assert all(hints[one].hint.next_use is None for one in ends if one in hints)


def test_nothing_is_fetched_where_there_is_no_tier() -> None:
    core = Core()
    sent = core.stage("run", "plan", 0.0)
    assert core.scheduler.handle(FirstToken(sent.step), 1.0) == []


def test_residency_is_what_the_engine_reports_and_empty_after_a_restart() -> None:
    core = Core()
    worker = core.scheduler.workers["w0"]
    core.scheduler.handle(ResidencyChanged("w0", {"b1": [64, 0], "b2": [32, 96]}, full=True), 1.0)
    core.scheduler.handle(ResidencyChanged("w0", {"b1": [0, 0]}), 1.1)
    assert worker.residency.tokens("b1") == (0, 0)
    assert worker.residency.tokens("b2") == (32, 96)
    core.up("w0", life="2")
    assert len(worker.residency) == 0


def test_residency_is_guessed_where_no_engine_reports() -> None:
    core = Core(advised=False)
    first, second = core.arrive("a", "main", 0.0), core.arrive("b", "main", 0.0)
    core.finish(first, 1.0, tokens=6000)
    core.finish(second, 2.0, tokens=3000)
    tokens = core.scheduler.workers["w0"].residency.tokens
    assert (tokens(branch(first)), tokens(branch(second))) == ((6010, 0), (3010, 0))
    core.finish(core.arrive("b", "main", 3.0), 4.0, tokens=5000)
    assert (tokens(branch(first)), tokens(branch(second))) == ((0, 0), (5010, 0)), "the least recently used is gone"


def test_nothing_of_keeping_outlives_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(host=10_000)
    for number in range(20):
        sent = core.stage(f"run-{number}", "plan", number)
        core.scheduler.handle(FirstToken(sent.step), number + 0.1)
        if number % 2:
            core.finish(sent, number + 0.5)
        else:
            core.scheduler.handle(StepFailed(sent.step, "x", retryable=False), number + 0.5)
        core.told(number + 0.6)
    core.scheduler.handle(Tick(), 10_000.0)
    core.told(10_000.0)
    keeping = core.scheduler.keeping
    assert not keeping._branches
    assert not keeping._waiting
    assert not keeping._dead
    assert not keeping._moved
    assert not keeping.forecast._uses


def test_what_is_dead_is_not_spoken_of_again_when_its_foretold_use_lapses() -> None:
    core = Core()
    branches = core.round("run")
    core.stage("run", "plan", 100.0, ("check",))
    assert branches["work"] in retained(core.told(100.0))
    last = core.arrive("run", "work", 101.0, role="work", template="stages", final=True)
    core.finish(last, 102.0)
    assert ("w0", branches["work"]) in released(core.told(102.1))
    for now in (110.0, 130.0, 400.0):
        assert branches["work"] not in retained(core.told(now))


def test_looking_ahead_keeps_hold_of_nothing() -> None:
    core = Core(host=10_000)
    core.round("run")
    sent = core.stage("run", "plan", 100.0, ("check",))
    core.told(100.0)
    core.scheduler.handle(FirstToken(sent.step), 101.0)
    core.scheduler.handle(StepFailed(sent.step, "x", retryable=False), 102.0)
    core.scheduler.handle(WorkflowFinished("t", "run"), 103.0)
    core.told(103.1)
    assert not core.scheduler.keeping._branches
    assert not core.scheduler.keeping.forecast._uses
