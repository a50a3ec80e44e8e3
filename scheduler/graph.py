"""Run graphs: what each workflow has run so far, as sessions, branches and steps. Soft state, the oldest forgotten."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler.actions import Decision
from scheduler.estimates import Past
from scheduler.events import Usage
from scheduler.handover import Source
from scheduler.pledges import Pledge
from scheduler.position import Progress
from scheduler.prompt import shorten
from scheduler.transitions import Context

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
    branches_per_session: int = 64
    aliases_per_workflow: int = 1_000


@dataclass(slots=True, eq=False)
class Step:
    """One LLM call. Times are in seconds on the driver's clock, None until they happen.

    `after` are the steps whose output it needed; `role` is its node in the template, `before` that of the first of
    those; `size` and `flex` are as of `StepArrived`; `tools` are those that its answer called; `gap` is
    the time since the step before it on its branch ended. `prefill` is how long its worker took to its first token, not
    counting what came before.
    For lineage: `head` names its system prompt and tools, `link` its messages (0: unknown), `said` its answer, `taken`
    the message that took the answer up; an `opening` has no known history.
    """

    id: str
    model: str
    rule: str
    branch: Branch = field(repr=False)
    after: tuple[str, ...]
    arrived: float
    pinned: str | None = None
    role: str | None = None
    before: str | None = None
    head: int = 0
    link: int = 0
    size: int = 0
    flex: bool = False
    said: int | None = None
    taken: int | None = None
    opening: bool = False
    gap: float | None = None
    dispatched: float | None = None
    first_token: float | None = None
    prefill: float = 0.0
    finished: float | None = None
    usage: Usage = Usage()
    stop: str | None = None
    tools: tuple[str, ...] = ()
    state: str = PLACED
    decision: Decision | None = None
    tried: tuple[str, ...] = ()

    @property
    def session(self) -> Session:
        """The session of its branch."""
        return self.branch.session


@dataclass(slots=True, eq=False)
class Branch:
    """One line of a session's history. `end` names the messages of its latest prompt.

    Of its last step that ended, `tokens` is the context with the answer's `answer` tokens, `size` that of the prompt.

    `look` is the role that its prompts show (`scheduler.prompt`), whatever the client calls it; `past` and `tools`,
    those of the last answer, are what its next step is predicted from.
    """

    id: str
    session: Session = field(repr=False)
    parent: Branch | None = field(default=None, repr=False)
    look: str | None = None
    end: int = 0
    last: Step | None = field(default=None, repr=False)
    past: Past = Past()
    tools: tuple[str, ...] = ()
    tokens: int = 0
    answer: int = 0
    size: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """One growing context. `seats` says, per pool, on which (worker, incarnation) its KV lies.

    It is overdue after `due`. `asked` are the words of the task that it was spawned by, as far as only those tell its
    parent. `marks`, `recent` and `outputs` are what lineage knows it by, to be forgotten with it.
    """

    id: str
    workflow: Workflow = field(repr=False)
    role: str | None = None
    parent: str | None = None
    seats: dict[str, tuple[str, str]] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    last_step: str | None = None
    running: int = 0
    taken: int = 0
    touched: float = 0.0
    due: float = 0.0
    ended: bool = False
    gone: bool = False
    named: bool = False
    asked: frozenset[int] = frozenset()
    outputs: list[Source] = field(default_factory=list)
    marks: array[int] = field(default_factory=lambda: array("Q"))
    recent: array[int] = field(default_factory=lambda: array("Q"))

    @property
    def state(self) -> str:
        """`running` while a step is, `ended` when the client said so, else `waiting` for its next step."""
        return "running" if self.running else "ended" if self.ended else "waiting"


@dataclass(slots=True, eq=False)
class Workflow:
    """One run of an agent program: sessions that share a root. `named` where the client gave the name.

    `progress` is where the run stands in its template; `ends` are the steps that ended and that none has followed yet;
    `repeats` says which step a step repeats; `over` that its end has been learned from; `pledge` what was asked of it,
    which had `spent` so many tokens.
    """

    id: str
    tenant: str
    arrived: float
    template: str | None = None
    named: bool = True
    sessions: dict[str, Session] = field(default_factory=dict, repr=False)
    steps: deque[Step] = field(default_factory=deque, repr=False)
    aliases: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    repeats: dict[str, str] = field(default_factory=dict)
    ends: dict[str, Context] = field(default_factory=dict)
    pledge: Pledge | None = None
    spent: int = 0
    touched: float = 0.0
    finished: bool = False
    over: bool = False

    @property
    def running(self) -> int:
        """Steps under way."""
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
        self._adopted: dict[tuple[str, str], Workflow] = {}

    def workflow(self, tenant: str, name: str, now: float, named: bool = True) -> Workflow:
        """The tenant's workflow of that name, made where there is none."""
        if (workflow := self.get(tenant, name)) is None:
            workflow = self.workflows[tenant, name] = Workflow(name, tenant, now, named=named)
        workflow.named = workflow.named or named
        return workflow

    def session(self, workflow: Workflow, name: str, named: bool = True) -> Session:
        """The workflow's session of that name, made with one branch where there is none."""
        if (session := workflow.sessions.get(name)) is None:
            session = workflow.sessions[name] = Session(name, workflow, named=named)
            # The same after a restart of the front end, so that a worker it adopts knows the owners of its blocks.
            key = "\0".join((workflow.tenant, workflow.id, name))
            session.branches.append(Branch("b" + shorten(key), session))
            if named:
                self._root_of[workflow.tenant, name] = workflow
        return session

    def fork(self, branch: Branch) -> Branch:
        """A new branch of the session of `branch`."""
        session = branch.session
        name = f"{session.branches[0].id}/{session.taken}/{len(session.branches)}"
        made = Branch("b" + shorten(name), session, branch, past=branch.past, tools=branch.tools)
        made.tokens, made.answer, made.size = branch.tokens, branch.answer, branch.size
        session.branches.append(made)
        if len(session.branches) > self.limits.branches_per_session:
            del session.branches[1]
        return made

    def add(self, step: Step, now: float) -> None:
        """The step has come to its branch."""
        session, workflow = step.session, step.session.workflow
        workflow.steps.append(step)
        self.steps += 1
        self._crop_steps(workflow)
        workflow.finished = workflow.over = session.ended = session.gone = False
        session.last_step = step.id
        session.taken += 1
        step.branch.last = step
        self.touch(session, now)

    def part(self, step: Step, now: float) -> Session:
        """Take a first step that was held to be another run's into a workflow of its own, with whom it called.

        Returns the session that it leaves.
        """
        session, old = step.session, step.session.workflow
        workflow = self.workflow(old.tenant, f"w-{step.id}-twin", now, named=False)
        workflow.arrived, workflow.template = step.arrived, old.template
        made = self.session(workflow, workflow.id, named=False)
        made.branches[0].look = step.branch.look
        made.role, made.seats, made.last_step, made.taken = session.role, dict(session.seats), step.id, 1
        self._move(old, workflow, {step.id}, set())
        if step.state == PLACED:
            session.running -= 1
            made.running += 1
        session.taken -= 1
        if session.branches[0].last is step:
            session.branches[0].last = next((s for s in reversed(old.steps) if s.session is session), None)
        step.branch = made.branches[0]
        step.branch.last = step
        old.repeats.pop(step.id, None)
        self._follow(step, old, session)
        self.touch(made, now)
        return session

    def _follow(self, step: Step, old: Workflow, sibling: Session) -> None:
        """The sessions that began after a step go with it, and those that began after them."""
        workflow, seen, moved, steps = step.session.workflow, {sibling}, set(), {step.id}
        for other in old.steps:
            if other.session not in seen and not other.session.named and not steps.isdisjoint(other.after[:1]):
                moved.add(other.session)
            seen.add(other.session)
            if other.session in moved:
                steps.add(other.id)
        for session in moved:
            if old.sessions.pop(session.id, None):
                workflow.sessions[session.id] = session
                session.workflow = workflow
                session.parent = step.session.id if session.parent == sibling.id else session.parent
        self._move(old, workflow, set(), {s for s in moved if s.workflow is workflow})

    def give(self, session: Session, taker: Step) -> None:
        """Move a session, with those below it, to the step of another workflow that turned out to have called it."""
        old, new = session.workflow, taker.session.workflow
        moved = {session}
        for other in old.sessions.values():  # a parent is older than its children
            if any(other.parent == one.id for one in moved):
                moved.add(other)
        boss = old.sessions.get(session.parent or "")
        given = {step.id for step in old.steps if step.session is boss}
        for step in old.steps:
            if step.session is session and not given.isdisjoint(step.after):
                step.after = tuple(dict.fromkeys(taker.id if one in given else one for one in step.after))
        session.parent, session.asked = taker.session.id, frozenset()
        for one in moved:
            one.workflow = new
            new.sessions[one.id] = old.sessions.pop(one.id)
        self._move(old, new, set(), moved)
        new.steps = deque(sorted(new.steps, key=lambda step: step.arrived))
        old.touched = max((one.touched for one in old.sessions.values()), default=old.arrived)
        old.progress.give({step.id for step in new.steps if step.session in moved}, new.progress)
        for step in new.steps:
            if step.session in moved and (context := old.ends.pop(step.id, None)):
                new.ends[step.id] = context
            if step.session in moved and step.id in old.repeats:
                new.repeats[step.id] = old.repeats.pop(step.id)
        self._crop_steps(new)

    def _move(self, old: Workflow, new: Workflow, steps: set[str], sessions: set[Session]) -> None:
        """Move steps to another workflow, by their ids and by their sessions."""
        theirs = [step for step in old.steps if step.id in steps or step.session in sessions]
        old.steps = deque(step for step in old.steps if step.id not in steps and step.session not in sessions)
        new.steps.extend(theirs)

    def adopt(self, child: Workflow, into: Workflow, parent: str | None) -> None:
        """The child turned out to be a part of another workflow: its sessions and steps move there."""
        del self.workflows[child.tenant, child.id]
        for session in child.sessions.values():
            session.workflow = into
            session.parent = session.parent or parent
            into.sessions[session.id] = session
        into.steps = deque(sorted((*child.steps, *into.steps), key=lambda step: step.arrived))
        into.progress.absorb(child.progress)
        into.repeats |= child.repeats
        into.ends |= child.ends
        into.pledge, into.spent = into.pledge or child.pledge, into.spent + child.spent
        for name in (child.id, *child.aliases):
            self._adopted[child.tenant, name] = into
            into.aliases.append(name)
        while len(into.aliases) > self.limits.aliases_per_workflow:
            self._adopted.pop((into.tenant, into.aliases.pop(0)), None)
        self._crop_steps(into)

    def _crop_steps(self, workflow: Workflow) -> None:
        while len(workflow.steps) > self.limits.steps_per_workflow:
            workflow.repeats.pop(workflow.steps.popleft().id, None)
            self.steps -= 1

    def touch(self, session: Session, now: float) -> None:
        """The session is active: it is live, and the last to be forgotten."""
        session.touched = session.workflow.touched = now
        self.live[session] = None
        self.live.move_to_end(session)
        self.workflows.move_to_end((session.workflow.tenant, session.workflow.id))

    def get(self, tenant: str, workflow: str) -> Workflow | None:
        """The tenant's workflow of that id, also where another has adopted it."""
        return self.workflows.get((tenant, workflow)) or self._adopted.get((tenant, workflow))

    def root_of(self, tenant: str, session: str) -> Workflow | None:
        """The workflow in which the tenant named a session so."""
        return self._root_of.get((tenant, session))

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
        for name in workflow.aliases:
            self._adopted.pop((workflow.tenant, name), None)
        for session in workflow.sessions.values():
            self._forget_session(session)
