"""What must never become one run: the chats of many users, agents that echo, overlapping re-runs, ids that repeat."""

from __future__ import annotations

import pytest

from scheduler.events import Tick
from scheduler.graph import Limits
from scheduler.prompt import ToolCall
from tests.scheduler.runs import Messages, Runs, asks, mint, result, said, user

LONG = "The door in the north wall is locked and the key hangs behind the picture of the harbour."


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_of_many_users_with_one_opening_each_keeps_the_session_of_the_answer_it_got(runs: Runs) -> None:
    first = [runs.call([user("hi")], f"Hello {k}!", system="S", wait=3) for k in range(100)]
    then = [runs.call([user("hi"), said(f"Hello {k}!"), user("go on")], "ok", system="S", wait=3) for k in range(100)]
    assert [runs.session(step) for step in then] == [runs.session(step) for step in first]
    assert len({runs.session(step) for step in first}) == 100


def test_of_more_users_than_are_remembered_none_gets_anothers_session(runs: Runs) -> None:
    first = [runs.call([user(LONG * 2)], f"Hello {k}!", system="S", wait=0.1) for k in range(1500)]
    for k in (0, 300, 1499):
        then = runs.call([user(LONG * 2), said(f"Hello {k}!"), user("go on")], "ok", system="S", wait=3)
        assert runs.session(then) in (runs.session(first[k]), f"w-{then}")


@pytest.mark.parametrize("moved_on", [False, True])
def test_an_answer_that_nobody_gave_is_no_continuation_of_a_short_opening(runs: Runs, moved_on: bool) -> None:
    runs.call([user("hi")], "Hello Xaver!", system="S", wait=600)
    if moved_on:
        runs.call([user("hi"), said("Hello Xaver!"), user("q")], system="S")
    yvonne = runs.call([user("hi"), said("Bonjour Yvonne!"), user("q")], system="S")
    assert runs.rule(yvonne) == "anonymous"


def test_of_two_that_were_answered_alike_nobody_guesses(runs: Runs) -> None:
    x, y = (runs.call([user("hi")], "Hello!", system="S", wait=10) for _ in range(2))
    on = runs.call([user("hi"), said("Hello!"), user("Y's question")], system="S")
    assert runs.session(on) not in (runs.session(x), runs.session(y))


def test_runs_that_are_alike_for_two_turns_part_by_their_answers(runs: Runs) -> None:
    history = [user("hi"), said("Hello!"), user("tell me a story")]
    runs.call(history[:1], "Hello!", system="S", wait=10)
    x = runs.call(history, "Once there was a cat.", system="S", wait=10)
    runs.call(history[:1], "Hello!", system="S", wait=10)
    y = runs.call(history, "A dog lived in Rome.", system="S", wait=10)
    y3 = runs.call([*history, said("A dog lived in Rome."), user("continue")], system="S")
    x3 = runs.call([*history, said("Once there was a cat."), user("continue")], system="S")
    assert runs.session(x) != runs.session(y)
    assert (runs.session(x3), runs.session(y3)) == (runs.session(x), runs.session(y))


def test_a_tool_call_that_repeats_the_question_is_no_task(runs: Runs) -> None:
    question = "What is the weather like in Paris today, and what will it be tomorrow?"
    steps = []
    for n in range(3):
        call = ToolCall(mint(n), "search", f'{{"query": "{question}"}}')
        steps.append(runs.call([user(question)], "", call, system="S", wait=30))
    assert len({runs.workflow(step) for step in steps}) == 3


def test_ids_that_repeat_are_never_believed(runs: Runs) -> None:
    def look(n: int) -> ToolCall:
        return ToolCall(f"functions.look:{n}", "look", "{}")

    runs.call([user("task A")], "", look(0), system="S")
    runs.call([user("task A"), asks(look(0).id), result(look(0).id, "x")], "", look(1), system="S")
    other = [user("task B"), asks(look(0).id), result(look(0).id, "y"), asks(look(1).id), result(look(1).id, "z")]
    assert runs.rule(runs.call(other, system="S")) == "anonymous"


def test_an_id_that_two_have_minted_says_nothing_even_when_one_has_gone(runs: Runs) -> None:
    shared = ToolCall(mint(5), "look", "{}")
    a = runs.call([user("task A")], "", shared, system="S")
    runs.call([user("task B")], "", shared, system="S")
    runs.scheduler.linker.lineage.forget(runs.step(a).session)
    runs.call([user("task C")], "", shared, system="S")
    b = runs.call([user("task D"), asks(shared.id), result(shared.id, "x")], system="S")
    assert runs.rule(b) == "anonymous"


def test_twins_that_hand_over_keep_each_its_own(runs: Runs) -> None:
    def handed(id: str) -> Messages:
        return [user("go"), asks(id, "transfer_to_b"), result(id, "ok")]

    a, b = runs.send([user("go")], system="A"), runs.send([user("go")], system="A")
    runs.answer(a, "", ToolCall(mint(1), "transfer_to_b", "{}"))
    runs.answer(b, "", ToolCall(mint(2), "transfer_to_b", "{}"))
    at_a = runs.call(handed(mint(1)), "done by a's B", system="B")
    at_b = runs.call(handed(mint(2)), "done by b's B", system="B")
    a2 = runs.call([*handed(mint(1)), said("done by a's B"), user("?")], system="A")
    b2 = runs.call([*handed(mint(2)), said("done by b's B"), user("?")], system="A")
    assert runs.step(at_a).after == (a,)
    assert runs.step(at_b).after == (b,)
    assert runs.workflow(a) == runs.workflow(at_a) == runs.workflow(a2)
    assert runs.workflow(b) == runs.workflow(at_b) == runs.workflow(b2)
    assert runs.workflow(a) != runs.workflow(b)


def test_anothers_history_does_not_outweigh_ones_own(runs: Runs) -> None:
    history = [user("hi"), said("Hello!"), user("continue")]
    for agent in "AB":
        runs.call(history[:1], "Hello!", system=f"You are {agent}.")
    first = {agent: runs.call(history, f"{agent} says", system=f"You are {agent}.") for agent in "AB"}
    on = runs.call([*history, said("B says"), user("x")], system="You are B.")
    assert runs.session(on) == runs.session(first["B"])
    assert runs.workflow(on) != runs.workflow(first["A"])


def test_a_judge_of_old_answers_is_no_part_of_those_runs(runs: Runs) -> None:
    answers = [f"{name} says: {LONG} And so it was when {name} came." for name in ("Anna", "Bert")]
    old = [runs.call([user(f"chat {n}")], answers[n], system="S", wait=600) for n in range(2)]
    judge = runs.call([user("Which is better?\n" + "\n---\n".join(answers))], system="You judge.")
    assert len({runs.workflow(step) for step in (*old, judge)}) == 3


def test_a_canned_refusal_that_is_quoted_is_no_summary(runs: Runs) -> None:
    refusal = "I'm sorry, but I cannot help with that request. Please ask me something else instead."
    one = runs.call([user("bad one")], refusal, system="S")
    two = runs.call([user(f"You told me: <{refusal}> But why?")], system="S")
    assert runs.workflow(one) != runs.workflow(two)


def test_no_tenant_can_spoil_or_see_the_hand_overs_of_another(runs: Runs) -> None:
    runs.call([user(f"I know: {LONG}")], LONG, tenant="u", system="You scout.")
    one = runs.call([user("look")], LONG, system="You scout.")
    two = runs.call([user(f"Notes:\n{LONG}\nWrite.")], system="You write.")
    assert runs.workflow(two) == runs.workflow(one)


def test_a_twin_that_parted_leaves_nothing_behind(runs: Runs) -> None:
    a, b = runs.send([user("go")]), runs.send([user("go")])
    runs.answer(a, "left")
    runs.answer(b, "right")
    for turn in ("left", "right"):
        runs.call([user("go"), said(turn), user("x")])
    runs.now += 1e5
    for _ in range(3):
        runs.scheduler.handle(Tick(), runs.now)
    assert not runs.scheduler.linker.lineage._ends
    assert runs.rule(runs.call([user("go"), said("up"), user("and")])) == "anonymous"


def test_one_name_for_everything_does_not_grow_without_bound() -> None:
    runs = Runs(Limits(kept_seconds=100, live_seconds=10))
    for n in range(5000):
        runs.call([user(f"task {n}")], "b", who={"session": "app", "rule": "x"}, wait=0)
    lineage = runs.scheduler.linker.lineage
    assert len(lineage._ends) <= 4096
    runs.now += 1000
    runs.scheduler.handle(Tick(), runs.now)
    assert not any((lineage._ends, lineage._calls, lineage._exchanges, lineage.handovers._sources))


def test_pings_of_one_session_do_not_grow_without_bound() -> None:
    runs = Runs(Limits(steps_per_workflow=50))
    for _ in range(500):
        step = runs.call([user("ping")], "pong", who={"session": "x", "rule": "x"}, wait=0)
    assert len(runs.step(step).session.workflow.repeats) <= 50
    runs.scheduler.check()


def test_a_workflow_that_a_client_named_is_never_adopted(runs: Runs) -> None:
    one = runs.call([user("a")], "", ToolCall(mint(1), "ask", '{"where": "north"}'), system="You lead.")
    child = runs.call([user("Look.")], LONG, system="You scout.", who={"session": "mine", "rule": "x"})
    two = runs.call([user("a"), asks(mint(1), "ask", '{"where": "north"}'), result(mint(1), LONG)], system="You lead.")
    assert runs.workflow(two) == runs.workflow(one) != runs.workflow(child)


def test_gathered_outputs_teach_a_join(runs: Runs) -> None:
    for n in range(4):
        texts = [f"{LONG} Run {n} has found number {n}{k} painted on it, and {k}{n} more behind it." for k in range(3)]
        for k in range(3):
            runs.call([user(f"Part {n} {k}")], texts[k], system="You map.")
        whole = runs.call([user("Reduce these:\n" + "\n---\n".join(texts))], system="You reduce.")
        assert len(runs.step(whole).after) == 3
    workflow = runs.step(whole).session.workflow
    template = runs.scheduler.knowledge.template("t", next(iter(workflow.sessions.values())).role or "")
    assert template is not None
    assert template.nodes[runs.step(whole).role or ""].join == "all"
