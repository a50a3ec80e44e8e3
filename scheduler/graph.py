"""Run graphs: what each workflow has run so far, as sessions and steps. Soft state, bounded, oldest forgotten first."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler.actions import Decision
from scheduler.events import StepArrived, Usage
from scheduler.identity import Identity

PLACED, FINISHED, FAILED, CANCELLED, REJECTED = "running", "finished", "failed", "cancelled", "rejected"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much is remembered. A session is live for `live_seconds` after its last step."""

    live_seconds: float = 600.0
    kept_seconds: float = 3600.0
    workflows: int = 100_000
    steps: int = 200_000
    steps_per_workflow: int = 2_000
    sessions_per_workflow: int = 10_000


@dataclass(slots=True, eq=False)
class Step:
    """One LLM call. Times are in seconds on the driver's clock, None until they happen."""

    id: str
    model: str
    rule: str
    session: Session
    after: tuple[str, ...]
    arrived: float
    pinned: str | None = None
    dispatched: float | None = None
    first_token: float | None = None
    finished: float | None = None
    usage: Usage = Usage()
    stop: str | None = None
    state: str = PLACED
    decision: Decision | None = None
    tried: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Session:
    """One growing context. `seats` says, per pool, on which (worker, incarnation) its KV lies."""

    id: str
    workflow: Workflow
    owner: str
    role: str | None = None
    parent: str | None = None
    seats: dict[str, tuple[str, str]] = field(default_factory=dict)
    last_step: str | None = None
    running: int = 0
    touched: float = 0.0
    ended: bool = False

    @property
    def state(self) -> str:
        """`running` while a step is, `ended` when the client said so, else `waiting` for its next step."""
        return "running" if self.running else "ended" if self.ended else "waiting"


@dataclass(slots=True, eq=False)
class Workflow:
    """One run of an agent program: sessions that share a root."""

    id: str
    tenant: str
    arrived: float
    template: str | None = None
    sessions: dict[str, Session] = field(default_factory=dict)
    steps: deque[Step] = field(default_factory=deque)
    touched: float = 0.0
    finished: bool = False

    @property
    def running(self) -> int:
        """Steps that a worker is serving."""
        return sum(session.running for session in self.sessions.values())

    @property
    def state(self) -> str:
        """`running`, `waiting` for the client, or `finished`."""
        return "running" if self.running else "finished" if self.finished else "waiting"


class Graph:
    """All run graphs, in the order of their last step."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.workflows: OrderedDict[tuple[str, str], Workflow] = OrderedDict()
        self.live: OrderedDict[Session, None] = OrderedDict()
        self.steps = 0
        self._root_of: dict[tuple[str, str], Workflow] = {}

    def link(self, event: StepArrived, now: float) -> Step:
        """Join the step to its workflow and session, making either where it is new."""
        identity = event.identity
        workflow = self._workflow(event, now)
        session = self._session(workflow, identity, identity.session or workflow.id)
        step = Step(event.step, event.model, identity.rule, session, self._after(session), now, event.pinned)
        workflow.steps.append(step)
        self.steps += 1
        if len(workflow.steps) > self.limits.steps_per_workflow:
            workflow.steps.popleft()
            self.steps -= 1
        workflow.finished = False
        session.ended = identity.final
        session.last_step = step.id
        self.touch(session, now)
        return step

    def touch(self, session: Session, now: float) -> None:
        """The session is active: it is live, and the last to be forgotten."""
        session.touched = session.workflow.touched = now
        self.live[session] = None
        self.live.move_to_end(session)
        self.workflows.move_to_end((session.workflow.tenant, session.workflow.id))

    def get(self, tenant: str, workflow: str) -> Workflow | None:
        """The tenant's workflow of that id."""
        return self.workflows.get((tenant, workflow))

    def knows(self, identity: Identity) -> bool:
        """Whether a step of this identity would continue a workflow rather than begin one."""
        names = (identity.workflow, identity.parent, identity.session)
        return any(
            (identity.tenant, name) in self.workflows or (identity.tenant, name) in self._root_of
            for name in names
            if name
        )

    def of_tenant(self, tenant: str) -> Iterator[Workflow]:
        """The tenant's workflows, the latest active first."""
        return (w for w in reversed(self.workflows.values()) if w.tenant == tenant)

    def quiet(self, now: float) -> list[Session]:
        """Take from the live sessions those with no step for `live_seconds`, or that ended. Amortised O(1)."""
        gone = []
        while self.live:
            session = next(iter(self.live))
            if session.touched + self.limits.live_seconds > now:
                break
            self.live.popitem(last=False)
            if session.running:  # a step longer than the window
                self.touch(session, now)
            else:
                gone.append(session)
        return gone

    def forget(self, now: float) -> list[Session]:
        """Drop workflows that are too old or too many, and return the sessions dropped. Never a running one."""
        gone: list[Session] = []
        for _ in range(len(self.workflows)):
            key, workflow = next(iter(self.workflows.items()))
            over = len(self.workflows) > self.limits.workflows or self.steps > self.limits.steps
            if not over and workflow.touched + self.limits.kept_seconds > now:
                break
            if workflow.running:
                self.workflows.move_to_end(key)
                continue
            gone += workflow.sessions.values()
            self._drop(key, workflow)
        return gone

    def crop(self, workflow: Workflow) -> list[Session]:
        """Drop and return the oldest idle sessions of a workflow that has more than it may. Amortised O(1)."""
        gone: list[Session] = []
        for _ in range(len(workflow.sessions)):
            if len(workflow.sessions) <= self.limits.sessions_per_workflow:
                break
            name, session = next(iter(workflow.sessions.items()))
            del workflow.sessions[name]
            if session.running or name == workflow.id or session.last_step == workflow.steps[-1].id:
                workflow.sessions[name] = session
                continue
            self._forget_session(session)
            gone.append(session)
        return gone

    def _forget_session(self, session: Session) -> None:
        workflow = session.workflow
        self.live.pop(session, None)
        if self._root_of.get((workflow.tenant, session.id)) is workflow:
            del self._root_of[workflow.tenant, session.id]

    def _drop(self, key: tuple[str, str], workflow: Workflow) -> None:
        del self.workflows[key]
        self.steps -= len(workflow.steps)
        for session in workflow.sessions.values():
            self._forget_session(session)

    def _workflow(self, event: StepArrived, now: float) -> Workflow:
        identity = event.identity
        tenant, root = identity.tenant, None
        if identity.workflow is None:  # harnesses that name a session or its parent, but not the root
            known = (identity.session, identity.parent)
            root = next((w for s in known if s and (w := self._root_of.get((tenant, s)))), None)
        name = identity.workflow or identity.parent or identity.session or f"w-{event.step}"
        workflow = root or self.workflows.get((tenant, name))
        if workflow is None:
            workflow = self.workflows[tenant, name] = Workflow(name, tenant, now)
        workflow.template = identity.template or workflow.template
        return workflow

    def _session(self, workflow: Workflow, identity: Identity, name: str) -> Session:
        session = workflow.sessions.get(name)
        if session is None:
            session = Session(name, workflow, _owner(workflow.tenant, workflow.id, name))
            workflow.sessions[name] = session
            self._root_of[workflow.tenant, name] = workflow
        session.role = identity.role or session.role
        session.parent = identity.parent or session.parent
        return session

    def _after(self, session: Session) -> tuple[str, ...]:
        if session.last_step is not None:
            return (session.last_step,)
        parent = session.workflow.sessions.get(session.parent or "")
        return (parent.last_step,) if parent and parent.last_step else ()


def _owner(tenant: str, workflow: str, session: str) -> str:
    # The same after a restart of the front end, so that a worker it adopts knows the owners of its blocks.
    key = "\0".join((tenant, workflow, session)).encode("utf-8", "surrogatepass")
    return "b" + hashlib.blake2b(key, digest_size=8).hexdigest()
