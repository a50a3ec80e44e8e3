"""What the core learns from runs while they go on, and what it then says is ahead."""

from __future__ import annotations

import pytest

from scheduler.events import StepCancelled, StepFailed, Tick, WorkflowFinished
from scheduler.knowledge import Ahead
from scheduler.prompt import ToolCall
from scheduler.template import Template
from tests.scheduler.runs import Runs, asks, result, user


def node(run: str, name: str, *after: str) -> dict:
    return {"workflow": run, "session": f"{run}/{name}", "role": name, "template": "job", "after": after, "rule": "x"}


def chain(runs: Runs, run: str, *roles: str) -> None:
    """One run of roles in line, and its end."""
    for before, role in zip(("", *roles), roles, strict=False):
        runs.call([user(f"{run} {role}")], "x" * 20, who=node(run, role, *filter(None, [before])))
    runs.scheduler.handle(WorkflowFinished("t", run), runs.now)


def ahead(runs: Runs, run: str) -> Ahead:
    workflow = runs.scheduler.graph.get("t", run)
    assert workflow is not None
    return runs.scheduler.knowledge.ahead(workflow)


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_one_run_is_enough_to_say_what_comes_next(runs: Runs) -> None:
    chain(runs, "one", "plan", "search", "write")
    runs.call([user("two plan")], who=node("two", "plan"))
    told = ahead(runs, "two")
    assert told.steps_to_execution == {"plan": float("inf"), "search": 1, "write": 2}
    assert told.next["search"] > 0.5
    assert 1.0 < told.remaining.steps < 4.0  # 2, if it goes as the one before
    assert told.remaining.critical_path[-1] == "write"
    assert 0 < told.remaining.confidence < 1


def test_the_more_runs_the_surer(runs: Runs) -> None:
    sure = []
    for n in range(6):
        chain(runs, f"run{n}", "plan", "search", "write")
        runs.call([user(f"probe{n} plan")], who=node(f"probe{n}", "plan"))
        sure.append(ahead(runs, f"probe{n}").remaining.confidence)
    assert sure == sorted(sure)
    assert sure[-1] > 0.8
    assert runs.scheduler.knowledge.scores.values()["next_role_right_ratio"] > 0.5


def test_a_declared_template_goes_before_the_learned_one_which_it_takes_measures_from(runs: Runs) -> None:
    chain(runs, "one", "plan", "write")
    document = {"nodes": {"plan": {}, "check": {"seconds": 9}, "write": {}},
                "edges": [{"from": "plan", "to": "check"}, {"from": "check", "to": "write"}]}  # fmt: skip
    runs.call([user("two plan")], who=node("two", "plan"))
    runs.scheduler.knowledge.declare("t", Template.parse("job", document))
    told = ahead(runs, "two")
    assert told.declared
    assert told.steps_to_execution["write"] == 2
    assert told.remaining.steps == pytest.approx(2, rel=0.1)
    assert told.remaining.work_seconds == pytest.approx(9 + 1, rel=0.1)
    assert told.remaining.output_tokens > 0


def test_a_declared_template_that_runs_contradict_is_not_followed_for_long(runs: Runs) -> None:
    everybody = ("plan", "write", "idle")
    edges = [{"from": one, "to": other, "gap_seconds": 0} for one in everybody for other in everybody if one != other]
    runs.scheduler.knowledge.declare("t", Template.parse("job", {
        "nodes": {role: {"seconds": 0} for role in everybody}, "edges": edges, "starts": ["plan"],
    }))  # fmt: skip
    said = []
    for n in range(100):
        chain(runs, f"run{n}", "plan", "write")
        runs.call([user(f"probe{n} plan")], who=node(f"probe{n}", "plan"))
        said.append(ahead(runs, f"probe{n}"))
    assert said[0].steps_to_execution["idle"] == 1
    assert said[-1].steps_to_execution["idle"] == float("inf")
    believed = runs.scheduler.knowledge.template("t", "job")
    assert believed is not None
    assert believed.nodes["write"].seconds == pytest.approx(1.0, rel=0.15)


def test_templates_of_two_tenants_never_meet(runs: Runs) -> None:
    runs.scheduler.knowledge.declare("t", Template.parse("job", {"nodes": {"plan": {}}}))
    chain(runs, "one", "plan")
    assert runs.scheduler.knowledge.template("u", "job") is None


def test_a_fan_out_and_its_join_are_learned_with_their_width(runs: Runs) -> None:
    for n in range(3):
        plan = runs.call([user(f"{n} plan")], who=node(f"r{n}", "plan"))
        parts = [runs.send([user(f"{n} part {k}")], who=node(f"r{n}", "work", "plan") | {"session": f"r{n}/w{k}"})
                 for k in range(3)]  # fmt: skip
        for part in parts:
            runs.answer(part, "y")
        runs.call([user(f"{n} sum")], who=node(f"r{n}", "sum", "work"))
        assert set(runs.step(parts[0]).after) == {plan}
        runs.scheduler.handle(WorkflowFinished("t", f"r{n}"), runs.now)
    template = runs.scheduler.knowledge.template("t", "job")
    assert template is not None
    assert {(e.source, e.target): round(e.count) for e in template.edges} == {("plan", "work"): 3, ("work", "sum"): 1}
    assert template.nodes["sum"].join == "all"


def test_a_call_sent_again_is_no_fan_out(runs: Runs) -> None:
    for n in range(4):
        runs.call([user(f"go {n}")], "a", system="S")
        turn = [user(f"go {n}"), {"role": "assistant", "content": "a"}, user("on")]
        for _ in range(3):
            runs.call(turn, "b", system="S")
    (program,) = runs.scheduler.knowledge.programs.values()
    (edge,) = program.learned.template().edges
    assert edge.count == pytest.approx(1)


def test_a_step_that_failed_is_replaced_by_the_one_that_repeats_it(runs: Runs) -> None:
    one = runs.send([user("go")], system="S")
    runs.scheduler.handle(StepFailed(one, "reset", retryable=False), runs.now)
    again = runs.call([user("go")], "a", system="S")
    runs.call([user("go"), {"role": "assistant", "content": "a"}, user("on")], "b", system="S")
    workflow = runs.step(again).session.workflow
    runs.scheduler.handle(WorkflowFinished("t", workflow.id), runs.now)
    (program,) = runs.scheduler.knowledge.programs.values()
    (edge,) = program.learned.template().edges
    assert (edge.source, edge.count) == (edge.target, pytest.approx(1))
    assert 0 < edge.probability < 1


def test_an_abandoned_run_teaches_that_its_line_may_end(runs: Runs) -> None:
    chain(runs, "one", "plan", "write")
    runs.call([user("two plan")], who=node("two", "plan"))
    left = runs.send([user("two write")], who=node("two", "write", "plan"))
    runs.scheduler.handle(StepCancelled(left), runs.now)
    before = ahead(runs, "two").steps_to_execution["write"]
    runs.now += runs.scheduler.graph.limits.live_seconds + 1
    runs.scheduler.handle(Tick(), runs.now)
    workflow = runs.scheduler.graph.get("t", "two")
    assert workflow is not None
    assert workflow.over
    found = runs.scheduler.knowledge.template("t", "job")
    assert found is not None
    assert before == 1
    assert found.edges[0].probability < 0.8


def test_gaps_are_learned_per_tool_and_so_is_that_a_session_never_returns(runs: Runs) -> None:
    for n in range(30):
        for tool, wait in (("fast", 1.0), ("slow", 100.0)):
            call = ToolCall(f"c{n}{tool}", tool, "{}")
            opening = [user(f"{n} {tool}")]
            one = runs.call(opening, "", call, system="S", wait=wait)
            if n % 3:
                runs.call([*opening, asks(call.id, tool), result(call.id, "ok")], "done", system="S")
            runs.scheduler.handle(WorkflowFinished("t", runs.workflow(one)), runs.now)
    probes = {}
    for tool in ("fast", "slow"):
        step = runs.call([user(f"probe {tool}")], "", ToolCall(f"p{tool}", tool, "{}"), system="S")
        probes[tool] = runs.scheduler.knowledge.gap(runs.step(step).branch)
    assert probes["fast"].quantile(0.5) < 10 < probes["slow"].quantile(0.5)
    assert 0.1 < probes["fast"].never < 0.6


def test_without_a_template_a_run_is_expected_to_go_on_as_its_role_does(runs: Runs) -> None:
    for n in range(10):
        turns = [user(f"{n}")]
        for k in range(5):
            step = runs.call(list(turns), f"a{k}", system="S")
            turns += [{"role": "assistant", "content": f"a{k}"}, user(f"{n} {k}")]
        runs.scheduler.handle(WorkflowFinished("t", runs.workflow(step)), runs.now)
    who = {"workflow": "new", "template": "never seen", "rule": "metadata"}
    runs.call([user("x")], "a", system="S", who=who)
    assert 2 < ahead(runs, "new").remaining.steps < 12
