"""The real core over one engine in this process, driven as `weft serve` drives it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection
from typing import Any

from msgspec import json

from bench.simulation.system import session_of
from bench.workloads.runs import Call, Run
from scheduler.actions import Advice, Dispatch
from scheduler.events import AdviceDue, FirstToken, StepArrived, StepFinished, Tick, Usage, WorkerUp, WorkflowFinished
from scheduler.identity import Identity
from scheduler.prompt import Answer, ToolCall
from scheduler.scheduler import Scheduler
from scheduler.template import Template
from server.advice import actions

MODEL = "model"
STALE = "weft-stale"
HINTED = ("weft-hinted", "saga", "kvflow", STALE)
NAMED, LYING, LIAR = "weft-named", "lying", "weft-liar"
LATE = 5.0  # seconds after which a stale message comes


class Clock:
    """Virtual seconds, for the engine's plug-in too."""

    now = 0.0


class Brain:
    """The real core, as `weft serve` drives it, over the one engine. Where the mode has a liar, those runs are its."""

    def __init__(self, engine: Any, mode: str, clock: Clock, tier_tokens: int, lied: Collection[str] = ()) -> None:
        self.scheduler, self._engine, self._clock = Scheduler(), engine, clock
        self._hinted, self._named, self._lies = mode in HINTED, mode == NAMED, mode == LYING
        self._late = LATE if mode == STALE else 0.0
        self._lied_of = frozenset(lied if mode == LIAR else ())
        self._sent: deque[tuple[float, dict[str, Any]]] = deque()
        self._told: dict[str, float] = {}
        abilities = engine({"ask": "abilities"})
        if not abilities["eviction"]:
            raise RuntimeError(f"the plug-in does not keep the KV: {abilities}")
        fetches = bool(abilities["prefetch"])
        # One call at a time: without a size the gate holds nobody.
        self.scheduler.handle(WorkerUp("w", "pool", (MODEL,), "1", 0, tier_tokens, True, fetches), clock.now)
        self._declared: set[str] = set()
        self._messages = 0
        self._ticked = 0.0

    def arrived(self, name: str, run: Run, call: Call) -> str:
        """The owner on whose account the call runs."""
        template = run.hints.get("template") if self._hinted else None
        if template and run.program not in self._declared:
            self._declared.add(run.program)
            self.scheduler.knowledge.declare(run.tenant, Template.parse(run.program, template))
        who = self._liar(run, call) if run.id in self._lied_of else self._identity(run, call, bool(template))
        actions = self._handle(StepArrived(name, MODEL, who))
        (sent,) = [one for one in actions if isinstance(one, Dispatch)]
        self.pass_time()
        return sent.owner

    def finished(self, name: str, call: Call, usage: Usage) -> None:
        """The call has ended; the engine is told what that changes."""
        self._handle(FirstToken(name))
        tools = tuple(ToolCall(f"{name}/{i}", tool, "{}") for i, tool in enumerate(call.tools))
        self._handle(StepFinished(name, usage, call.stop, Answer(calls=tools)))
        self.pass_time()

    def ended(self, run: Run) -> None:
        """The run is over, as only hinted clients say."""
        if self._hinted:
            self._handle(WorkflowFinished(run.tenant, run.id))
            self.pass_time()

    def pass_time(self) -> None:
        """Say what is to be said."""
        if self._clock.now - self._ticked >= 1.0:
            self._ticked = self._clock.now
            self._handle(Tick())
        self._handle(AdviceDue())
        while self._sent and self._sent[0][0] <= self._clock.now:
            self._engine(self._sent.popleft()[1])

    def _identity(self, run: Run, call: Call, declared: bool) -> Identity:
        if self._named:
            return Identity(workflow=run.id, session=call.session, role=call.role, tenant=run.tenant, rule="metadata")
        if not self._hinted:
            parent = session_of(run, call.parent) if call.parent else None
            name = session_of(run, call.session)
            return Identity(session=name, parent=parent, role=call.role, tenant=run.tenant, rule="x-session-id")
        follows = [one.role for one in call.after if one.session != call.session] if declared else []
        return Identity(
            workflow=run.id, session=call.session, parent=call.parent, role=call.role, template=run.program,
            after=tuple(dict.fromkeys(follows)), tenant=run.tenant, rule="agentic_context",
        )  # fmt: skip

    def _liar(self, run: Run, call: Call) -> Identity:
        """A tenant that declares that all its agents run again at once, whoever has just run."""
        if run.program not in self._declared:
            self._declared.add(run.program)
            roles = {one.role or "" for one in run.calls} | {"another"}
            pairs = itertools.permutations(sorted(roles), 2)
            edges = [{"from": one, "to": other, "gap_seconds": 0.001} for one, other in pairs]
            nodes = {role: {"seconds": 0.0, "fork": "all"} for role in roles}
            lie = {"nodes": nodes, "edges": edges, "starts": sorted(roles)}
            self.scheduler.knowledge.declare(LIAR, Template.parse(run.program, lie))
        return Identity(
            workflow=run.id, session=call.session, role=call.role, template=run.program, tenant=LIAR, rule="metadata"
        )

    def _handle(self, event: Any) -> list[Any]:
        decided = self.scheduler.handle(event, self._clock.now)
        if advice := [one for one in decided if isinstance(one, Advice)]:
            self._messages += 1
            told = self._lied(advice) if self._lies else actions("", advice, self._clock.now)
            message = {"protocol_version": 1, "message_id": str(self._messages), "actions": json.encode(told)}
            self._sent.append((self._clock.now + self._late, message | {"residency": {"seen": -1}}))
        return decided

    def _lied(self, advice: list[Advice]) -> list[dict[str, Any]]:
        """Who has just been used is never needed again or dead, who was used longest ago at once."""
        for one in advice:
            self._told.pop(one.owner, None)
            self._told[one.owner] = self._clock.now
        lies = []
        for place, owner in enumerate(self._told):
            lie = {"owner": owner, "next_use": 10.0 * place}
            lies.append({"action_id": owner, "action_type": "kv.retain", "action_version": 1, "payload": lie})
        last = next(reversed(self._told))
        dead = {"action_id": "dead", "action_type": "kv.release", "action_version": 1, "payload": {"owner": last}}
        return [*lies, dead]
