"""Deadlines and budgets: told how likely they are, refused early where that was asked for, and nobody overtakes."""

from __future__ import annotations

import pytest

from scheduler import view
from scheduler.actions import Action, Dispatch, Reject
from scheduler.events import FirstToken, StepArrived, StepFinished, Usage, WorkerUp, WorkflowFinished
from scheduler.identity import Identity, resolve
from scheduler.pledges import MOST
from scheduler.position import Position
from scheduler.prospect import Dice, Game
from scheduler.scheduler import Scheduler
from scheduler.template import Template


class Play:
    """One worker of unknown size; runs of ten calls of 100 tokens, 1 s each and 1 s apart, have taught their kind."""

    def __init__(self, taught: int = 30) -> None:
        self.now, self.count = 0.0, 0
        self.scheduler = Scheduler()
        self.send(WorkerUp("w", "pool", ("m",), "0"))
        for run in range(taught):
            for _ in range(10):
                self.turn(f"taught{run}")
            self.send(WorkflowFinished("t", f"taught{run}"))

    def send(self, event: object) -> list[Action]:
        actions = self.scheduler.handle(event, self.now)  # type: ignore[arg-type]
        self.scheduler.check()
        return actions

    def call(self, run: str, *, strict: bool = False, **asked: float) -> Dispatch | Reject:
        self.count += 1
        who = Identity(tenant="t", workflow=run, session=run, template="kind", role="agent", rule="metadata", **asked)
        (action,) = self.send(StepArrived(f"s{self.count}", "m", who, strict=strict))
        assert isinstance(action, Dispatch | Reject)
        return action

    def turn(self, run: str, *, strict: bool = False, **asked: float) -> Dispatch | Reject:
        action = self.call(run, strict=strict, **asked)
        if isinstance(action, Dispatch):
            self.send(FirstToken(action.step))
            self.now += 1.0
            self.send(StepFinished(action.step, Usage(90, 0, 10), "tool_calls"))
            self.now += 1.0
        return action


def terms(action: Dispatch | Reject) -> dict[str, float]:
    assert isinstance(action, Dispatch)
    return dict(action.decision.terms)


def test_a_run_that_asks_for_nothing_is_told_nothing() -> None:
    assert "in_time_probability" not in terms(Play().call("r"))


def test_an_easy_deadline_is_likely_and_a_tight_one_is_a_warning() -> None:
    play = Play()
    easy, tight = play.call("easy", deadline=600.0), play.call("tight", deadline=3.0)
    assert terms(easy)["in_time_probability"] > 0.9
    assert terms(tight)["in_time_probability"] < 0.2
    assert isinstance(tight, Dispatch)
    assert tight.decision.reason.endswith("deadline at risk")
    assert isinstance(easy, Dispatch)
    assert "risk" not in easy.decision.reason


def test_a_chance_moves_with_the_run() -> None:
    play = Play()
    chances = [terms(play.turn("r", deadline=12.0))["in_time_probability"] for _ in range(8)]
    assert chances[0] > 0
    assert chances[-1] == 0, "its time is over"


def test_what_cannot_be_done_is_refused_only_where_that_was_asked_for() -> None:
    play = Play()
    assert isinstance(play.call("patient", deadline=1.0), Dispatch)
    refused = play.call("strict", strict=True, deadline=1.0)
    assert isinstance(refused, Reject)
    assert (refused.status, refused.retry_after) == (422, None)
    assert "needs some" in refused.reason
    assert isinstance(play.call("easy", strict=True, deadline=600.0), Dispatch)


def test_nothing_is_refused_for_what_is_only_guessed() -> None:
    play = Play(taught=0)
    assert isinstance(play.call("r", strict=True, deadline=1.0), Dispatch)


def test_a_run_or_two_of_a_kind_are_too_few_to_refuse_others_for_it() -> None:
    play = Play(taught=2)
    assert all(isinstance(play.call(f"r{n}", strict=True, deadline=5.0), Dispatch) for n in range(10))


def test_a_budget_that_its_first_prompt_exceeds_is_known_at_once() -> None:
    assert terms(Play().call("r", budget=50.0))["in_budget_probability"] == 0.0


def test_tokens_spent_before_the_budget_was_named_count_too() -> None:
    play = Play(taught=0)
    for _ in range(3):
        play.turn("r")
    refused = play.call("r", strict=True, budget=250.0)
    assert isinstance(refused, Reject)
    assert "spent" in refused.reason


def test_a_step_that_says_it_is_the_last_is_still_to_be_done() -> None:
    play = Play()
    who = Identity(tenant="t", workflow="r", session="r", template="kind", role="agent", final=True, deadline=0.01)
    (action,) = play.send(StepArrived("last", "m", who))
    assert terms(action)["in_time_probability"] < 0.1  # type: ignore[arg-type]


def test_a_monstrous_template_and_many_sessions_take_bounded_work() -> None:
    nodes = {role: {"seconds": 0} for role in "ab"}
    edges = [{"from": "a", "to": "b", "count": 10_000}, {"from": "b", "to": "b", "count": 10_000}]
    template = Template.parse("wide", {"nodes": nodes, "edges": edges, "starts": ["a"]})
    dice = Dice(1)
    for _ in range(64):
        assert Game(template).draw(Position(running={"a": 1}), dice).tokens == 0.0
    play = Play()
    for number in range(300):
        who = Identity(tenant="t", workflow="r", session=f"{number}", template="kind", role="agent", rule="metadata")
        play.send(StepArrived(f"many{number}", "m", who))
    rests, _ = play.scheduler.knowledge.prospects(play.scheduler.graph.workflows["t", "r"], play.now, dice, 2)
    assert max(one.tokens for one in rests) <= 8 * 2_000 * 100


def test_a_deadline_that_has_passed_and_a_budget_that_is_spent_are_facts() -> None:
    play = Play(taught=0)
    play.turn("late", strict=True, deadline=1.0)
    late = play.call("late", strict=True)
    assert isinstance(late, Reject), "what was asked of a run once holds"
    assert "passed" in late.reason
    play.turn("poor", strict=True, budget=100.0)
    poor = play.call("poor", strict=True, budget=100.0)
    assert isinstance(poor, Reject)
    assert "spent" in poor.reason


def test_a_budget_counts_all_tokens_of_the_run() -> None:
    play = Play()
    play.turn("r", budget=100_000.0)
    assert terms(play.call("r"))["in_budget_probability"] > 0.9
    asked = view.detail(
        play.scheduler.graph.workflows["t", "r"], play.scheduler.knowledge, play.scheduler.workers, play.scheduler.gate
    )["asked"]
    assert asked == {
        "deadline": None, "token_budget": 100_000.0, "spent_tokens": 100, "strict": False,
        "in_budget_probability": asked["in_budget_probability"],
    }  # fmt: skip


def test_a_tight_deadline_overtakes_nobody_and_one_with_time_stands_back() -> None:
    play = Play()
    for run, deadline in (("plain", None), ("tight", 1.0), ("free", 86_400.0)):
        asked = {} if deadline is None else {"deadline": deadline}
        action = play.call(run, **asked)
        step = play.scheduler.running[action.step]
        back = play.scheduler._back(step)
        assert back == (MOST if run == "free" else 0.0)


@pytest.mark.parametrize(
    ("given", "read"),
    [("30", 30.0), (30, 30.0), ("1.5", 1.5), ("", None), ("soon", None), ("-1", None), ("nan", None), ("inf", None),
     (True, None), ([], None), (0, None), ("1e400", None)],
)  # fmt: skip
def test_a_deadline_that_cannot_be_read_is_none(given: object, read: float | None) -> None:
    who = resolve("t", {}, {"metadata": {"deadline_seconds": given, "token_budget": given, "workflow_id": "w"}})
    assert (who.deadline, who.budget) == (read, read)
