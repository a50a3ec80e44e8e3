"""Whose run a call belongs to when nobody says it: continuations, forks, repeats, twins, compactions, hand-overs."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler import view
from scheduler.events import StepArrived, StepCancelled, Tick, WorkflowFinished
from scheduler.graph import Limits
from scheduler.identity import Identity
from scheduler.prompt import ToolCall, read
from tests.scheduler.runs import Messages, Runs, asks, mint, result, said, user

LONG = "The door in the north wall is locked and the key hangs behind the picture of the harbour."
TASK = "Look behind the picture of the harbour and tell me what hangs there."


STORY = f"{LONG} {TASK} " * 2


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_a_prompt_that_extends_another_continues_its_session(runs: Runs) -> None:
    one = runs.call([user("a")], "b", system="S")
    two = runs.call([user("a"), said("b"), user("c")], system="S")
    assert runs.session(two) == runs.session(one)
    assert runs.step(two).branch is runs.step(one).branch
    assert runs.step(two).after == (one,)
    assert runs.step(two).gap == pytest.approx(5.1)
    assert (runs.rule(one), runs.rule(two)) == ("anonymous", "lineage:prefix")


def test_equal_openings_of_two_tenants_never_meet(runs: Runs) -> None:
    runs.call([user("a")], "b")
    other = runs.call([user("a"), said("b"), user("c")], tenant="u")
    assert runs.rule(other) == "anonymous"


def test_a_changing_date_in_the_system_prompt_does_not_end_a_session(runs: Runs) -> None:
    one = runs.call([user("a")], "b", system="Today is Friday, November 20, 2026. Run 17.")
    two = runs.call([user("a"), said("b"), user("c")], system="Today is Saturday, November 21, 2026. Run 18.")
    assert runs.session(two) == runs.session(one)


def test_a_fork_is_a_new_branch_of_its_session_from_where_it_left(runs: Runs) -> None:
    first = runs.call([user(STORY)], "b")
    old = runs.call([user(STORY), said("b"), user("c")], "d")
    runs.call([user(STORY), said("b"), user("c"), said("d"), user("e")])
    fork = runs.call([user(STORY), said("b"), user("c"), said("D"), user("E")], "F")
    assert runs.session(fork) == runs.session(first)
    assert runs.step(fork).branch is not runs.step(first).branch
    assert runs.step(fork).after == (old,)
    on = runs.call([user(STORY), said("b"), user("c"), said("D"), user("E"), said("F"), user("G")])
    assert runs.step(on).branch is runs.step(fork).branch


def test_a_call_sent_again_follows_what_the_first_one_followed(runs: Runs) -> None:
    one = runs.call([user("a")], "b")
    two = runs.call([user("a"), said("b"), user("c")])
    again = runs.call([user("a"), said("b"), user("c")])
    assert runs.step(again).branch is runs.step(two).branch
    assert runs.step(again).after == (one,)
    assert runs.step(again).gap is None


def test_twins_part_when_each_is_taken_up(runs: Runs) -> None:
    a, b = runs.send([user("go")]), runs.send([user("go")])
    assert runs.session(a) == runs.session(b)
    runs.answer(a, "left")
    runs.answer(b, "right")
    b2 = runs.call([user("go"), said("right"), user("and")])
    a2 = runs.call([user("go"), said("left"), user("and")])
    assert runs.session(a) == runs.session(a2)
    assert runs.session(b) == runs.session(b2)
    assert runs.workflow(a) != runs.workflow(b)
    runs.scheduler.check()


def test_twins_part_even_where_their_client_rewrites_the_answers(runs: Runs) -> None:
    a, b = runs.send([user("go")]), runs.send([user("go")])
    runs.answer(a, "left ")
    runs.answer(b, "right")
    ones = [runs.call([user("go"), said(turn), user("and")]) for turn in ("L", "R")]
    assert runs.workflow(ones[0]) != runs.workflow(ones[1])


def test_samples_of_one_call_are_one_session(runs: Runs) -> None:
    steps = [runs.send([user("go")]) for _ in range(4)]
    for index, step in enumerate(steps):
        runs.answer(step, f"answer {index}")
    on = runs.call([user("go"), said("answer 2"), user("and")])
    assert {runs.session(step) for step in (*steps, on)} == {runs.session(on)}
    assert runs.step(on).after == (steps[2],)


def test_the_same_opening_later_is_another_run(runs: Runs) -> None:
    one, two = runs.call([user("hi")], wait=60), runs.call([user("hi")], wait=60)
    assert runs.workflow(one) != runs.workflow(two)


def test_an_opening_whose_call_was_given_up_is_the_same_run(runs: Runs) -> None:
    one = runs.send([user("hi")])
    runs.scheduler.handle(StepCancelled(one), runs.now)
    runs.now += 30
    again = runs.call([user("hi")], "yes")
    assert runs.session(again) == runs.session(one)
    on = runs.call([user("hi"), said("yes"), user("c")])
    fork = runs.call([user("hi"), said("yes"), user("d")])
    assert runs.session(fork) == runs.session(on) == runs.session(one)


def test_many_equal_openings_at_once_do_not_become_one_run(runs: Runs) -> None:
    steps = [runs.send([user("hi")]) for _ in range(20)]
    assert len({runs.workflow(step) for step in steps}) == 3


def test_a_deterministic_run_repeated_later_is_a_run_of_its_own(runs: Runs) -> None:
    """Word for word the same, all the way: only time tells them apart."""
    turns = [user("a"), said("b"), user("c"), said("d"), user("e"), said("f"), user("g")]
    first = [runs.call(turns[: 2 * k + 1], turns[2 * k + 1]["content"] if k < 3 else "end") for k in range(4)]
    runs.now += 60
    second = [runs.call(turns[: 2 * k + 1], turns[2 * k + 1]["content"] if k < 3 else "end") for k in range(4)]
    assert len({runs.workflow(step) for step in first}) == 1
    assert len({runs.workflow(step) for step in second}) == 1
    assert runs.workflow(first[0]) != runs.workflow(second[0])


def test_a_minted_tool_call_is_found_though_the_history_before_it_was_rewritten(runs: Runs) -> None:
    tool = ToolCall(mint(1), "look", "{}")
    one = runs.call([user("a long beginning")], "", tool, system="S")
    two = runs.call([user("in short"), asks(mint(1)), result(mint(1), "a door")], system="S")
    assert runs.session(two) == runs.session(one)
    assert runs.rule(two) == "lineage:tool-call"
    assert runs.step(two).after == (one,)
    assert runs.step(one).tools == ("look",)


def test_tool_call_ids_that_are_not_unique_say_nothing(runs: Runs) -> None:
    tool = ToolCall("functions.look:0", "look", "{}")
    runs.call([user("one")], "", tool, system="S")
    runs.call([user("two")], "", tool, system="S")
    three = runs.call([user("new"), asks(tool.id), result(tool.id, "a door")], system="S")
    assert runs.rule(three) == "anonymous"


def test_a_tool_call_answered_under_another_system_prompt_is_a_hand_over(runs: Runs) -> None:
    tool = ToolCall(mint(1), "transfer_to_b", "{}")
    one = runs.call([user("a")], "", tool, system="You are A.")
    shared = [user("a"), asks(tool.id, tool.name), result(tool.id, "You are B now.")]
    two = runs.call(shared, "done", system="You are B.")
    assert runs.workflow(two) == runs.workflow(one)
    assert runs.session(two) != runs.session(one)
    assert runs.step(two).after == (one,)
    back = runs.call([*shared, said("done"), user("and?")], system="You are A.")
    assert runs.session(back) == runs.session(one)
    assert set(runs.step(back).after) == {one, two}


def test_agents_that_take_turns_share_a_workflow(runs: Runs) -> None:
    """As AutoGen's round robin does it: one's answer is the other's user message."""
    line, judged = "Roses are red, and so is the door of the house.", "That is too plain; write of what lies behind it."
    a1 = runs.call([user("Write a line.")], line, system="You write.")
    b1 = runs.call([user("Write a line."), user(line)], judged, system="You judge.")
    a2 = runs.call([user("Write a line."), said(line), user(judged)], "R", system="You write.")
    assert runs.workflow(a1) == runs.workflow(b1) == runs.workflow(a2)
    assert runs.session(a1) == runs.session(a2) != runs.session(b1)


def test_a_transfer_of_which_only_the_task_and_a_notice_are_left_is_a_hand_over(runs: Runs) -> None:
    """As AutoGen's swarm does it: neither the call's id nor the first agent's text goes on."""
    one = runs.call(
        [user("Report on the door.")], "", ToolCall(mint(1), "transfer_to_writer", "{}"), system="You scout."
    )
    notice = user("Transferred to writer, adopting the role of writer immediately.")
    two = runs.call([user("Report on the door."), notice], system="You write.")
    assert runs.workflow(two) == runs.workflow(one)
    assert runs.step(two).after == (one,)


def test_a_supervisor_sees_its_agents_words_as_an_assistants(runs: Runs) -> None:
    """As LangGraph's supervisor does it, with a call that no worker minted."""
    to = ToolCall(mint(1), "transfer_to_scout", "{}")
    one = runs.call([user("a")], "", to, system="You lead.")
    shared = [user("a"), asks(to.id, to.name), result(to.id, "Successfully transferred to scout")]
    child = runs.call(shared, LONG, system="You scout.")
    back = [said(LONG), asks("5a", "transfer_back_to_boss"), result("5a", "Successfully transferred back to boss")]
    two = runs.call([*shared, *back], system="You lead.")
    assert runs.session(two) == runs.session(one) != runs.session(child)
    assert set(runs.step(two).after) == {one, child}


def test_the_last_turns_alone_are_a_compaction(runs: Runs) -> None:
    turns = [[said(f"I read file {n} and found the class. " * 3), user(f"line {n} of output " * 3)] for n in range(3)]
    runs.call([user("task")], turns[0][0]["content"], system="S")
    runs.call([user("task"), *turns[0]], turns[1][0]["content"], system="S")
    old = runs.call([user("task"), *turns[0], *turns[1]], turns[2][0]["content"], system="S")
    new = runs.call([user("Turns were dropped."), *turns[0], *turns[1], *turns[2]], system="S")
    assert runs.session(new) == runs.session(old)
    assert runs.rule(new) == "lineage:compaction"
    assert runs.step(new).branch is not runs.step(old).branch
    other = runs.call([user("task 99"), *turns[2], said("more"), user("x")], system="S")
    assert runs.rule(other) == "anonymous"  # one exchange is anybody's


def test_a_short_exchange_that_many_have_is_no_evidence(runs: Runs) -> None:
    runs.call([user("task one")], system="S")
    runs.call([user("task one"), said("OK"), user("continue")], system="S")
    new = runs.call([user("task two"), said("OK"), user("continue"), said("x"), user("y")], system="S")
    assert runs.rule(new) == "anonymous"


def test_a_summary_that_the_model_wrote_goes_on_in_its_session(runs: Runs) -> None:
    one = runs.call([user("task")], "b", system="S")
    summary = runs.call([user("task"), said("b"), user("Summarise.")], STORY, system="S")
    new = runs.call([user(f"So far:\n{STORY}\nGo on.")], system="S")
    assert runs.session(new) == runs.session(one)
    assert runs.step(new).after == (summary,)


def test_a_delegated_task_makes_a_child_and_its_answer_comes_back(runs: Runs) -> None:
    tool = ToolCall(mint(1), "ask_scout", f'{{"task": "{TASK}"}}')
    one = runs.call([user("a")], "", tool, system="You lead.")
    child = runs.call([user(TASK)], LONG, system="You scout.")
    two = runs.call([user("a"), asks(tool.id, tool.name, tool.arguments), result(tool.id, LONG)], system="You lead.")
    assert runs.workflow(one) == runs.workflow(child) == runs.workflow(two)
    assert runs.step(child).session.parent == runs.session(one)
    assert runs.rule(child) == "lineage:task"
    assert runs.step(child).after == (one,)
    assert runs.step(two).after == (one, child)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("quicker", [0, 1])
def test_of_two_children_with_one_task_each_goes_to_whom_its_answer_came_back(
    runs: Runs, order: tuple[int, int], quicker: int
) -> None:
    """The second boss has not yet asked when the first child begins, so both seem to be children of the first."""
    tasks = [ToolCall(mint(n + 1), "ask_scout", f'{{"task": "{TASK}"}}') for n in range(2)]
    opening = [[user(f"Begin in the {where}.")] for where in ("north", "south")]
    bosses = [runs.send(messages, system="You lead.") for messages in opening]
    runs.answer(bosses[0], "", tasks[0])
    children = [runs.send([user(TASK)], system="You scout.")]
    runs.answer(bosses[1], "", tasks[1])
    children.append(runs.send([user(TASK)], system="You scout."))
    looks = [ToolCall(mint(n + 3), "look", f'{{"where": "room {n}"}}') for n in range(2)]
    for child, look in zip(children, looks, strict=True):
        runs.answer(child, "", look)
    found = [f"{LONG} It is the {colour} key." for colour in ("brass", "silver")]
    for n in (quicker, 1 - quicker):
        messages = [user(TASK), asks(looks[n].id, looks[n].name), result(looks[n].id, "a key")]
        runs.call(messages, found[n], system="You scout.")
    ends = ["", ""]
    for n in order:
        back = [asks(tasks[n].id, "ask_scout", tasks[n].arguments), result(tasks[n].id, found[n])]
        ends[n] = runs.call([*opening[n], *back], system="You lead.")
    for n in range(2):
        child = runs.step(children[n])
        assert runs.workflow(bosses[n]) == child.session.workflow.id == runs.workflow(ends[n])
        assert child.session.parent == runs.session(bosses[n])
        assert len(runs.step(ends[n]).after) == 2
    assert runs.workflow(bosses[0]) != runs.workflow(bosses[1])
    runs.scheduler.check()


def test_a_child_whose_answer_has_come_back_stays_whoever_else_is_given_it(runs: Runs) -> None:
    """Another run gave out the same task, and a cache of its own answered it."""
    tasks = [ToolCall(mint(n + 1), "ask_scout", f'{{"task": "{TASK}"}}') for n in range(2)]
    opening = [[user(f"Begin in the {where}.")] for where in ("north", "south")]
    boss = runs.call(opening[0], "", tasks[0], system="You lead.", wait=0)
    child = runs.call([user(TASK)], LONG, system="You scout.", wait=0)
    other = runs.call(opening[1], "", tasks[1], system="You lead.", wait=0)
    for n in range(2):
        back = [asks(tasks[n].id, "ask_scout", tasks[n].arguments), result(tasks[n].id, LONG)]
        runs.call([*opening[n], *back], system="You lead.")
    assert runs.workflow(child) == runs.workflow(boss) != runs.workflow(other)
    assert runs.step(child).session.parent == runs.session(boss)
    runs.scheduler.check()


def test_a_child_found_only_by_its_answer_is_adopted(runs: Runs) -> None:
    tool = ToolCall(mint(1), "ask_scout", '{"where": "north"}')
    one = runs.call([user("a")], "", tool, system="You lead.")
    child = runs.call([user("Look north.")], LONG, system="You scout.")
    alone = runs.workflow(child)
    assert alone != runs.workflow(one)
    reply = result(tool.id, f"The scout reports: {LONG} End of report.")
    two = runs.call([user("a"), asks(tool.id, tool.name, tool.arguments), reply], system="You lead.")
    assert runs.workflow(child) == runs.workflow(two) == runs.workflow(one)
    assert runs.step(two).after == (one, child)
    assert runs.step(child).session.parent == runs.session(one)
    assert runs.scheduler.graph.get("t", alone) is runs.scheduler.graph.get("t", runs.workflow(one))
    runs.scheduler.check()


def test_a_run_that_is_older_than_the_gap_is_not_adopted(runs: Runs) -> None:
    other = runs.call([user("Look north.")], LONG, system="You scout.")
    one = runs.call([user("a")], "", ToolCall(mint(1), "read", "{}"), system="You lead.")
    two = runs.call([user("a"), asks(mint(1), "read"), result(mint(1), LONG)], system="You lead.")
    assert runs.workflow(two) == runs.workflow(one) != runs.workflow(other)


def test_outputs_that_are_gathered_make_one_workflow(runs: Runs) -> None:
    texts = [f"{LONG} It has number {n} painted on it, and {n} more behind." for n in range(3)]
    parts = [runs.call([user(f"Part {n}")], texts[n], system="You map.") for n in range(3)]
    whole = runs.call([user("Reduce these:\n" + "\n---\n".join(texts))], system="You reduce.")
    assert {runs.workflow(step) for step in (*parts, whole)} == {runs.workflow(whole)}
    assert set(runs.step(whole).after) == set(parts)


def test_what_two_runs_have_said_word_for_word_is_the_output_of_neither(runs: Runs) -> None:
    runs.call([user("one")], LONG, system="A")
    runs.call([user("two")], LONG, system="A")
    three = runs.call([user(f"Consider:\n{LONG}")], system="B")
    assert runs.rule(three) == "anonymous"


def test_a_quotation_of_a_part_is_no_hand_over(runs: Runs) -> None:
    runs.call(
        [user("one")], LONG + "\nAnd then there is the matter of the second door, which nobody has seen.", system="A"
    )
    assert runs.rule(runs.call([user(f"I read: {LONG}")], system="B")) == "anonymous"


def test_finished_and_forgotten_runs_are_nobodys_kin() -> None:
    runs = Runs(Limits(kept_seconds=100, live_seconds=10))
    one = runs.call([user("a")], "b")
    runs.scheduler.handle(WorkflowFinished("t", runs.workflow(one)), runs.now)
    assert runs.rule(runs.call([user("a"), said("b"), user("c")])) == "anonymous"
    runs.now += 1000
    runs.scheduler.handle(Tick(), runs.now)
    lineage = runs.scheduler.linker.lineage
    assert not any((lineage._ends, lineage._calls, lineage._exchanges, lineage.handovers._sources))
    assert runs.rule(runs.call([user("a"), said("b"), user("c")])) == "anonymous"


def test_a_named_session_keeps_its_branches_apart(runs: Runs) -> None:
    """A client that names its session may still fork, and ask things on the side."""
    who = {"session": "x", "rule": "x-session-id"}
    one = runs.call([user("a")], "b", who=who)
    side = runs.call([user("Give this a title.")], "T", who=who)
    two = runs.call([user("a"), said("b"), user("c")], "d", who=who)
    assert {runs.session(step) for step in (one, side, two)} == {"x"}
    assert runs.step(two).branch is runs.step(one).branch
    assert runs.step(side).branch is not runs.step(one).branch


def test_a_client_that_names_its_session_may_rewrite_every_answer(runs: Runs) -> None:
    who = {"session": "x", "rule": "x-session-id"}
    steps = [runs.call([user("a")], "b", who=who)]
    steps.append(runs.call([user("a"), said("B"), user("c")], "d", who=who))
    steps.append(runs.call([user("a"), said("B"), user("c"), said("D"), user("e")], who=who))
    assert len({runs.step(step).branch.id for step in steps}) == 1
    assert runs.step(steps[2]).after == (steps[1],)


def test_a_named_workflow_has_its_sessions_found(runs: Runs) -> None:
    who = {"workflow": "run", "rule": "metadata.user_id"}
    one = runs.call([user("a")], "b", system="main", who=who)
    child = runs.call([user("x")], "y", system="sub", who=who)
    two = runs.call([user("a"), said("b"), user("c")], system="main", who=who)
    assert {runs.workflow(step) for step in (one, child, two)} == {"run"}
    assert runs.session(one) == runs.session(two) == "run"
    assert runs.session(child) != "run"


def test_named_predecessors_become_edges(runs: Runs) -> None:
    def node(name: str, *after: str) -> dict[str, Any]:
        return {"workflow": "run", "role": name, "after": after, "rule": "metadata"}

    plan = runs.call([user("p")], who=node("plan"))
    search = runs.call([user("s")], who=node("search", "plan"))
    read_ = runs.call([user("r")], who=node("read", "plan"))
    write = runs.call([user("w")], who=node("write", "search", "read"))
    assert runs.step(search).after == runs.step(read_).after == (plan,)
    assert set(runs.step(write).after) == {search, read_}


def test_the_owner_names_branch_and_role_and_nothing_of_the_client(runs: Runs) -> None:
    who = {"session": "secret", "role": "planner", "rule": "x"}
    prompt = read("t", {"messages": [user("a")]})
    (action,) = runs.scheduler.handle(StepArrived("o", "m", Identity(tenant="t", **who), None, prompt), 1.0)
    branch, role = action.owner.split(".")
    assert branch == runs.step("o").branch.id
    assert role.startswith("r")
    assert "secret" not in action.owner
    assert "planner" not in action.owner


def test_the_view_shows_tools_gaps_and_branches(runs: Runs) -> None:
    one = runs.call([user("a")], "", ToolCall(mint(1), "look", "{}"))
    runs.call([user("a"), asks(mint(1)), result(mint(1), "x")])
    told = view.detail(
        runs.step(one).session.workflow, runs.scheduler.knowledge, runs.scheduler.workers, runs.scheduler.gate
    )
    assert [step["tools"] for step in told["steps"]] == [["look"], []]
    assert told["steps"][1]["gap_seconds"] == pytest.approx(5.1)


def test_twins_whose_words_are_the_same_are_told_apart_by_the_ids_of_their_tool_calls(runs: Runs) -> None:
    one, two = ToolCall(mint(1), "look", "{}"), ToolCall(mint(2), "look", "{}")
    a, b = runs.send([user("go")]), runs.send([user("go")])
    runs.answer(a, "", one)
    runs.answer(b, "", two)
    b2 = runs.call([user("go"), asks(two.id), result(two.id, "a door")])
    a2 = runs.call([user("go"), asks(one.id), result(one.id, "a door")])
    assert runs.session(a) == runs.session(a2)
    assert runs.session(b) == runs.session(b2)
    assert runs.workflow(a) != runs.workflow(b)


def test_a_run_that_repeats_an_older_one_is_told_apart_by_the_ids_of_its_tool_calls(runs: Runs) -> None:
    runs_of = []
    for n in range(2):
        ids = [mint(10 * n + turn) for turn in range(3)]
        history: Messages = [user("go")]
        steps = []
        for id in ids:
            steps.append(runs.call(list(history), "", ToolCall(id, "look", "{}")))
            history += [asks(id), result(id, "a door")]
        runs_of.append({runs.workflow(step) for step in steps})
        runs.now += 60
    assert [len(found) for found in runs_of] == [1, 1]
    assert runs_of[0] != runs_of[1]


def test_whom_a_twin_called_goes_with_it(runs: Runs) -> None:
    rooms = ("cellar", "attic")
    asked = [f"Look around in the {room} of the house." for room in rooms]
    found = [
        f"In the {room} I have found a box that is locked, a broken chair and a window to the south" for room in rooms
    ]
    tasks = [ToolCall(mint(n + 1), "ask", f'{{"task": "{asked[n]}"}}') for n in range(2)]
    twins = [runs.send([user("go")], system="You lead.") for _ in rooms]
    for step, task in zip(twins, tasks, strict=True):
        runs.answer(step, "", task)
    children = [runs.call([user(asked[n])], found[n], system="You look.") for n in range(2)]
    ends = [""] * 2
    for n, task in reversed(list(enumerate(tasks))):
        back = [user("go"), asks(task.id, "ask", task.arguments), result(task.id, found[n])]
        ends[n] = runs.call(back, system="You lead.")
    for n in range(2):
        assert runs.workflow(twins[n]) == runs.workflow(children[n]) == runs.workflow(ends[n])
        assert runs.step(children[n]).session.parent == runs.session(ends[n])
        assert set(runs.step(ends[n]).after) == {twins[n], children[n]}
    assert runs.workflow(ends[0]) != runs.workflow(ends[1])
    runs.scheduler.check()


def test_a_tool_call_that_quotes_the_prompt_is_no_task(runs: Runs) -> None:
    """As mini-swe-agent's last command, which its instructions spell out, and which nobody answers."""
    opening = [user("Solve it. At the end run:\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT and stop\nThank you, 1.")]
    command = '{"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT and stop"}'
    one = runs.call(opening, "", ToolCall(mint(1), "bash", command), wait=60)
    again = [user(opening[0]["content"].replace("1.", "2."))]
    two = runs.call(again)
    assert runs.workflow(one) != runs.workflow(two)


def test_an_id_that_a_client_wrote_into_the_text_is_read(runs: Runs) -> None:
    """As smolagents writes down its calls."""
    one = runs.call([user("go")], "I look.", ToolCall(mint(3), "look", "{}"), system="S")
    text = f"I look.\nCalling tools:\n[{{'id': '{mint(3)}', 'type': 'function'}}]"
    two = runs.call([user("go"), said(text), user("Observation:\na door")], system="S")
    assert runs.session(two) == runs.session(one)
