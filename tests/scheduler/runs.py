"""A client of the scheduler for tests of what it learns: calls by their messages, answers a second later."""

from __future__ import annotations

from typing import Any

from scheduler.actions import Dispatch
from scheduler.events import StepArrived, StepFinished, Usage, WorkerUp
from scheduler.graph import Limits
from scheduler.identity import Identity
from scheduler.prompt import Answer, ToolCall, read
from scheduler.scheduler import Scheduler

Messages = list[dict[str, Any]]


def mint(n: int) -> str:
    """A tool call's id as vLLM makes it."""
    return f"chatcmpl-tool-{n:032x}"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asks(id: str, name: str = "look", arguments: str = "{}") -> dict[str, Any]:
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


class Runs:
    """A client of the scheduler, one call after the other; each answer is ready a second after its call."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.scheduler = Scheduler(limits=limits)
        self.scheduler.handle(WorkerUp("w0", "m", ("m",), "1"), 0.0)
        self.now, self.count = 0.0, 0

    def send(
        self, messages: Messages, system: str = "", tenant: str = "t", who: dict | None = None, **body: Any
    ) -> str:
        """Send a call and return its id; it runs until `answer`."""
        self.count += 1
        self.now += 0.1
        step = f"s{self.count}"
        first = [{"role": "system", "content": system}] if system else []
        prompt = read(tenant, {"messages": [*first, *messages], **body})
        identity = Identity(tenant=tenant, **(who or {}))
        (action,) = self.scheduler.handle(StepArrived(step, "m", identity, None, prompt), self.now)
        assert isinstance(action, Dispatch)
        return step

    def answer(self, step: str, text: str = "", *calls: ToolCall) -> None:
        self.now += 1.0
        event = StepFinished(step, Usage(9, 3, 3), "tool_calls" if calls else "stop", Answer(text, calls))
        self.scheduler.handle(event, self.now)

    def call(self, messages: Messages, text: str = "ok", *calls: ToolCall, wait: float = 5.0, **more: Any) -> str:
        """Send a call, have it answered, and let some seconds pass."""
        step = self.send(messages, **more)
        self.answer(step, text, *calls)
        self.now += wait
        return step

    def step(self, step: str) -> Any:
        return next(s for w in self.scheduler.graph.workflows.values() for s in w.steps if s.id == step)

    def session(self, step: str) -> str:
        return str(self.step(step).session.id)

    def rule(self, step: str) -> str:
        return str(self.step(step).rule)

    def workflow(self, step: str) -> str:
        return str(self.step(step).session.workflow.id)
