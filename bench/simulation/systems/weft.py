"""Weft: the real scheduler core on the virtual clock, and what it foretells in the modelled engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.simulation.system import Holdings, System, Turn, role_of, session_of
from bench.simulation.systems.index import recompute_per_token
from bench.workloads.runs import Run
from kvcache.policy import Hint, Policy
from kvcache.retention import Retention
from scheduler.actions import Dispatch
from scheduler.events import (
    Event,
    FirstToken,
    StepArrived,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.forecast import Key, RoleUses, forecast
from scheduler.graph import Step, Workflow
from scheduler.identity import Identity
from scheduler.prompt import Answer, ToolCall
from scheduler.scheduler import Scheduler
from scheduler.template import Template

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

MODEL = "model"


class Weft(System):
    """Today's core over engines that keep their LRU: what runs on real engines today.

    Clients send what ordinary ones do, the ids of session and parent session; a role stands for the system prompt and
    tools, which the core reads. It is told nothing else: no program, no end, no output length, no gap.
    """

    name = "weft"
    tick = 1.0

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.scheduler = Scheduler()
        self.turns: dict[str, Turn] = {}
        for engine in cluster.engines:
            self._handle(WorkerUp(_worker(engine.index), "pool", (MODEL,), "1", engine.kv_tokens))

    def arrived(self, turn: Turn) -> None:
        self.turns[_step(turn)] = turn
        self._handle(StepArrived(_step(turn), MODEL, self.identity(turn)))

    def first_token(self, turn: Turn) -> None:
        self._handle(FirstToken(_step(turn)))

    def finished(self, turn: Turn) -> None:
        call, record, name = turn.call, turn.record, _step(turn)
        if record.error is None:
            usage = Usage(call.prompt.end, record.cached + record.hosted, call.output)
            tools = tuple(ToolCall(f"{name}/{i}", tool, "{}") for i, tool in enumerate(call.tools))
            self._handle(StepFinished(name, usage, call.stop, Answer(calls=tools)))
        else:
            self._handle(StepFailed(name, record.error, retryable=False))
        del self.turns[name]

    def ticked(self) -> None:
        self._handle(Tick())

    def identity(self, turn: Turn) -> Identity:
        """What the turn's client says of it."""
        run, call = turn.run, turn.call
        parent = session_of(run, call.parent) if call.parent else None
        return Identity(session=turn.owner, parent=parent, role=call.role, tenant=run.tenant, rule="x-session-id")

    def _handle(self, event: Event) -> None:
        for action in self.scheduler.handle(event, self.cluster.now):
            if not isinstance(action, Dispatch):
                raise RuntimeError(f"the core did not place a step: {action}")
            self.cluster.send(self.turns[action.step], int(action.decision.worker))


class WeftForecast(Weft):
    """The same clients; engines evict by the retention index, with what the core foretells. No engine can do so yet.

    A session that waits is foretold by its learned gap; a role by the graph, declared or learned.
    """

    name = "weft-forecast"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.roles = RoleUses()
        self.cost = 0.0

    def policy(self) -> Policy:
        return Retention()

    def arrived(self, turn: Turn) -> None:
        super().arrived(turn)
        if (step := self.scheduler.running.get(_step(turn))) is not None:
            self._moved(step.session.workflow, turn)

    def finished(self, turn: Turn) -> None:
        step = self.scheduler.running.get(_step(turn))
        super().finished(turn)
        if step is None or turn.record.error is not None:
            return
        assert turn.worker is not None
        hint = self.foretell(step, recompute_per_token(self.cluster.profile, turn))
        self.cluster.engines[turn.worker].tell(turn.owner, hint)
        self._moved(step.session.workflow, turn)

    def ticked(self) -> None:
        super().ticked()
        self._tell(self.roles.lapsed(self.cluster.now, self.cost))

    def foretell(self, step: Step, cost: float) -> Hint:
        """What is foretold of the session of a step that has ended; `cost` in seconds for each token."""
        self.cost = cost
        return forecast(self.scheduler.knowledge, step, self.cluster.now, cost)

    def _moved(self, workflow: Workflow, turn: Turn) -> None:
        worker = _worker(turn.worker or 0)
        self._tell(self.roles.moved(self.scheduler.knowledge, workflow, worker, self.cluster.now, self.cost))

    def _tell(self, hints: dict[Key, Hint]) -> None:
        for (worker, tenant, role), hint in hints.items():
            self.cluster.engines[int(worker)].tell(role_of(tenant, role), hint)


class WeftHinted(WeftForecast):
    """As `weft-forecast`, with clients that say all they can.

    They name run and program, declare a template where they have one, say then which roles a call follows, and mark the
    end of each run.
    """

    name = "weft-hinted"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.declared: set[tuple[str, str]] = set()
        self.held = Holdings()

    def began(self, run: Run) -> None:
        document = run.hints.get("template")
        if document and (run.tenant, run.program) not in self.declared:
            self.declared.add((run.tenant, run.program))
            self.scheduler.knowledge.declare(run.tenant, Template.parse(run.program, document))

    def identity(self, turn: Turn) -> Identity:
        run, call = turn.run, turn.call
        follows = [one.role for one in call.after if one.session != call.session] if "template" in run.hints else []
        return Identity(
            workflow=run.id, session=call.session, parent=call.parent, role=call.role, template=run.program,
            after=tuple(dict.fromkeys(follows)), tenant=run.tenant, rule="agentic_context",
        )  # fmt: skip

    def finished(self, turn: Turn) -> None:
        super().finished(turn)
        self.held.add(turn)

    def ended(self, run: Run) -> None:
        workflow = self.scheduler.graph.get(run.tenant, run.id)
        self._handle(WorkflowFinished(run.tenant, run.id))
        if workflow is not None:
            self._tell(self.roles.over(workflow, self.cluster.now, self.cost))
        self.held.release(run, self.cluster.engines)


def _step(turn: Turn) -> str:
    return f"{turn.run.id}#{turn.index}"


def _worker(index: int) -> str:
    return str(index)
