"""Random conversations of agents that nobody names: nothing raises, every count holds, nothing is left behind."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.actions import Dispatch
from scheduler.events import (
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.graph import Limits
from scheduler.identity import Identity
from scheduler.prompt import Answer, ToolCall, read
from scheduler.scheduler import Scheduler
from tests.scheduler.runs import asks, mint, result, said, user

ROLES = ("You lead.", "You scout.")
OPENINGS = ("hi", "The door in the north wall of the old house is locked. " * 3)
ANSWERS = ("ok", "The key hangs behind the picture of the harbour, and the harbour is a long way off.")
NAMES = (None, None, None, {"session": "x"}, {"workflow": "w"}, {"session": "y", "parent": "x"}, {"parent": "x"})
LIMITS = st.sampled_from([
    Limits(live_seconds=30, kept_seconds=60, workflows=5, steps=20, steps_per_workflow=6, sessions_per_workflow=3),
    Limits(live_seconds=30, kept_seconds=60, sessions_per_workflow=2, branches_per_session=2, aliases_per_workflow=1),
    Limits(live_seconds=300, kept_seconds=600),
])  # fmt: skip


class Conversations(RuleBasedStateMachine):
    """Plays clients whose histories share words, tools and answers."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.now, self.count = 0.0, 0
        self.open: dict[str, tuple[str, list[dict[str, Any]]]] = {}  # step -> its role and messages
        self.histories: list[tuple[str, list[dict[str, Any]]]] = []

    @rule(limits=LIMITS)
    @precondition(lambda self: self.count == 0)
    def limit(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits=limits)
        self.scheduler.handle(WorkerUp("w0", "m", ("m",), "1"), 0.0)

    def send(self, role: str, messages: list[dict[str, Any]], who: dict[str, str] | None) -> None:
        if not self.scheduler.workers:
            self.limit(Limits())
        self.count += 1
        self.now += 0.5
        step = f"s{self.count}"
        prompt = read("t", {"messages": [{"role": "system", "content": role}, *messages]})
        identity = Identity(tenant="t", rule="x" if who else "anonymous", **(who or {}))
        (action,) = self.scheduler.handle(StepArrived(step, "m", identity, None, prompt), self.now)
        assert isinstance(action, Dispatch)
        self.open[step] = (role, messages)

    @rule(role=st.sampled_from(ROLES), text=st.sampled_from(OPENINGS), who=st.sampled_from(NAMES))
    def begin(self, role: str, text: str, who: dict[str, str] | None) -> None:
        self.send(role, [user(text)], who)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), role=st.sampled_from((None, None, *ROLES)), text=st.sampled_from(("go on", *ANSWERS)),
          who=st.sampled_from(NAMES), drop=st.integers(0, 3))  # fmt: skip
    def go_on(self, data: st.DataObject, role: str | None, text: str, who: dict[str, str] | None, drop: int) -> None:
        old, messages = data.draw(st.sampled_from(self.histories))
        calls = messages[-1].get("tool_calls")
        reply = [result(call["id"], text) for call in calls] if calls else [user(text)]
        self.send(role or old, [*messages[drop if drop < len(messages) else 0 :], *reply], who)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), role=st.sampled_from(ROLES))
    def quote(self, data: st.DataObject, role: str) -> None:
        _, messages = data.draw(st.sampled_from(self.histories))
        self.send(role, [user(f"Read this:\n{messages[-1].get('content')}")], None)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), text=st.sampled_from(ANSWERS), tool=st.sampled_from((None, "new", "same")))
    def answer(self, data: st.DataObject, text: str, tool: str | None) -> None:
        step = data.draw(st.sampled_from(sorted(self.open)))
        role, messages = self.open.pop(step)
        self.now += 0.5
        calls: tuple[ToolCall, ...] = ()
        turn = said(text)
        if tool:
            call = ToolCall(mint(self.count if tool == "new" else 7), "ask", f'{{"task": "{ANSWERS[1]}"}}')
            calls, turn, text = (call,), asks(call.id, "ask", call.arguments), ""
        self.histories.append((role, [*messages, turn]))
        self.scheduler.handle(StepFinished(step, Usage(9, 3, 3), "stop", Answer(text, calls)), self.now)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), cancelled=st.booleans())
    def give_up(self, data: st.DataObject, cancelled: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.open)))
        del self.open[step]
        self.scheduler.handle(StepCancelled(step) if cancelled else StepFailed(step, "x", retryable=False), self.now)

    @precondition(lambda self: self.scheduler.graph.workflows)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        _, name = data.draw(st.sampled_from(sorted(self.scheduler.graph.workflows)))
        self.scheduler.handle(WorkflowFinished("t", name), self.now)

    @rule(seconds=st.sampled_from([1, 3, 40, 100]))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.scheduler.handle(Tick(), self.now)

    @invariant()
    def all_counts_hold(self) -> None:
        self.scheduler.check()
        assert self.scheduler.running.keys() == self.open.keys()
        for key, workflow in self.scheduler.graph.workflows.items():
            assert key == (workflow.tenant, workflow.id)
            self.scheduler.knowledge.ahead(workflow)

    def teardown(self) -> None:
        for step in list(self.open):
            self.scheduler.handle(StepCancelled(step), self.now)
        self.now += 10_000
        for _ in range(3):
            self.scheduler.handle(Tick(), self.now)
        graph, lineage = self.scheduler.graph, self.scheduler.linker.lineage
        assert not any((graph.workflows, graph.live, graph.steps, graph._root_of, graph._adopted))
        assert not any((lineage._ends, lineage._calls, lineage._exchanges))
        assert not any((lineage.handovers._sources, lineage.handovers._by_part))
        assert not self.scheduler.running


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
