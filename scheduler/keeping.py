"""Keeping: what the engines that hold a run's KV are told of it, and when.

A branch that waits for its next step is foretold by its learned gap, or by the graph of its run where that says that
its role runs next. A role, on whose account the common prefix of its steps is kept, is foretold by the graphs of all
runs that can reach it; where none can, by how often its steps come. Events only note what has changed; `told` says it,
some ten times a second.
"""

from __future__ import annotations

from itertools import islice

from kvcache.policy import Hint
from kvcache.retention import SOON
from scheduler.actions import Advice, Prefetch, Release, Retain
from scheduler.admission import Gate
from scheduler.awaited import RETURNING
from scheduler.estimates import TOOL
from scheduler.forecast import Forecast, Key
from scheduler.gaps import Gap
from scheduler.graph import Branch, Session, Step, Workflow
from scheduler.habits import answers
from scheduler.knowledge import Knowledge, latest
from scheduler.prompt import shorten
from scheduler.recurrence import Recurrence
from scheduler.workers import Worker

NEVER = float("inf")
GONE = 0.98  # the chance that it never returns, from which on a session that has long been quiet is given up
FETCHES = 4  # owners that are fetched ahead at once for one step
SESSIONS = 256  # of a run, the latest, that are looked at
HORIZON = 60.0  # seconds; what runs later is fetched by a later step


def role_owner(tenant: str, role: str | None) -> str:
    """The owner on whose account the common prefix of a tenant's role is kept; it means nothing elsewhere."""
    return f"r{shorten(tenant + chr(0) + (role or ''))}"


class Keeping:
    """Notes what changes for the owners of KV. `workers` are the core's: those that take no advice are told nothing."""

    def __init__(self, knowledge: Knowledge, workers: dict[str, Worker], gate: Gate) -> None:
        self.forecast = Forecast()
        self._gate = gate
        self._knowledge, self._workers = knowledge, workers
        self._recurrence = Recurrence()
        self._came: dict[Key, None] = {}  # roles of which a step has come
        self._dead: dict[Key, None] = {}
        self._waiting: dict[Branch, str] = {}
        self._moved: dict[tuple[str, Workflow], None] = {}
        self._over: dict[Workflow, None] = {}
        self._branches: dict[str, Branch] = {}  # those whose next use the graph foretells

    def came(self, step: Step, worker: Worker) -> None:
        """A step was sent to a worker."""
        if worker.advised:
            assert step.dispatched is not None
            key = (worker.id, role_owner(step.session.workflow.tenant, step.role))
            self._recurrence.came(key, step.dispatched)
            self._came[key] = None
        self._waiting.pop(step.branch, None)
        self._dead.pop((worker.id, step.branch.id), None)
        self._note(step, worker)

    def ended(self, step: Step) -> None:
        """A step has ended well: its branch waits for the next one from now on, or has answered for good."""
        worker = self._sent_to(step)
        if worker is None:
            return
        if self._gate.habits.answered(step):
            self.given_up(step.branch)
        else:
            self._waiting[step.branch] = worker.id
        self._note(step, worker)

    def broke(self, step: Step) -> None:
        """A step has ended, but not well: its run goes on without it, or not at all."""
        worker = self._sent_to(step)
        if worker is not None:
            self._note(step, worker)

    def dead(self, session: Session, worker: str | None = None) -> None:
        """What a session holds is dead, on all its workers or on one that it has left."""
        names = [worker] if worker is not None else [name for name, _ in session.seats.values()]
        for branch in session.branches:
            self.given_up(branch, names)

    def given_up(self, branch: Branch, workers: list[str] | None = None) -> None:
        """What a branch holds is dead."""
        names = workers if workers is not None else [name for name, _ in branch.session.seats.values()]
        self._waiting.pop(branch, None)
        self._branches.pop(branch.id, None)
        for name in names:
            self.forecast.dropped((name, branch.id))
            if (worker := self._advised(name)) is not None:
                self._dead[worker.id, branch.id] = None
                worker.residency.dropped(branch.id)

    def over(self, workflow: Workflow) -> None:
        """The run makes no further call; its sessions are declared dead one by one."""
        self._over[workflow] = None

    def quiet(self, session: Session, now: float) -> None:
        """No step has come for long: the session is given up if as good as none returns so late."""
        branch = latest(session)
        if branch is None or self._knowledge.gap(branch).never_after(now - session.touched) >= GONE:
            self.dead(session)

    def told(self, now: float) -> list[Advice]:
        """What the engines are to be told now."""
        advice: list[Advice] = [Release(*key) for key in self._dead]
        for session, name in self._gate.changed():
            branch = latest(session)
            if branch is not None and self._advised(name) is not None and not session.ended:
                self._waiting[branch] = name
        changed = self._foretold(now)
        for branch, worker in self._waiting.items():
            changed.setdefault((worker, branch.id), self.forecast.next_use((worker, branch.id)))
            self._branches[branch.id] = branch
        lapsed, known = self._recurrence.lapsed(now), self._recurrence.gap
        for key in [*lapsed, *(one for one in self._came if known(one) is not None)]:
            changed.setdefault(key, self.forecast.next_use(key))
        for (worker, owner), at in changed.items():
            if (worker, owner) not in self._dead and self._advised(worker) is not None:
                advice.append(Retain(worker, owner, self._hint(worker, owner, at, now)))
            if at is None:
                self._branches.pop(owner, None)
        self._dead, self._waiting, self._came = {}, {}, {}
        return advice

    def ahead(self, step: Step, now: float) -> list[Advice]:
        """The step decodes: what its run needs soon, where its worker can fetch it from the host tier."""
        worker = self._sent_to(step)
        if worker is None or not worker.fetches:
            return []
        waits, _ = self._owners(step.session.workflow, worker, now)
        soon = sorted((wait, owner) for owner, wait in waits.items() if 0 < wait <= HORIZON)
        return [Prefetch(worker.id, owner, wait) for wait, owner in soon[:FETCHES]]

    def returns(self, step: Step) -> list[Advice]:
        """The step has ended its session's turn: the one that called it goes on with the answer, if it was the last."""
        parent = step.session.workflow.sessions.get(step.session.parent or "")
        if parent is None or parent.running or not answers(step):
            return []
        branch, seats = latest(parent), [self._advised(name) for name, _ in parent.seats.values()]
        fetching = [worker.id for worker in seats if worker is not None and worker.fetches]
        if branch is None or not fetching or any(_works(one, step) for one in _latest_sessions(parent.workflow)):
            return []
        return [Prefetch(worker, branch.id, HORIZON) for worker in fetching]

    def _note(self, step: Step, worker: Worker) -> None:
        """What is foretold of the step's run may have changed there, and wherever something was."""
        if worker.advised:
            workflow = step.session.workflow
            for name in {worker.id: None} | self.forecast.workers(_name(workflow)):
                self._moved[name, workflow] = None

    def _sent_to(self, step: Step) -> Worker | None:
        return self._advised(step.decision.worker) if step.decision else None

    def _advised(self, name: str) -> Worker | None:
        worker = self._workers.get(name)
        return worker if worker is not None and worker.up and worker.advised else None

    def _foretold(self, now: float) -> dict[Key, float | None]:
        """The owners whose next use by the graph may have changed."""
        changed: dict[Key, float | None] = {}
        over, moved, self._over, self._moved = self._over, self._moved, {}, {}
        for workflow in over:
            changed |= self.forecast.over(_name(workflow))
        for name, workflow in moved:
            worker = self._advised(name)
            if worker is not None and workflow not in over:
                waits, branches = self._owners(workflow, worker, now)
                self._branches |= branches
                changed |= self.forecast.moved(_name(workflow), name, waits, now, still=not workflow.running)
        return changed | self.forecast.lapsed(now)

    def _owners(self, workflow: Workflow, worker: Worker, now: float) -> tuple[dict[str, float], dict[str, Branch]]:
        """Seconds until the owners of a run on a worker run, as far as its graph says; and the branches among them."""
        if not self._knowledge.several_roles(workflow):
            return {}, {}  # of a single role, its sessions' gaps say more
        waits = {role: wait for role, wait in self._knowledge.next_uses(workflow, now).items() if wait < NEVER}
        owners = {role_owner(workflow.tenant, role): wait for role, wait in waits.items()}
        branches: dict[str, Branch] = {}
        idle: dict[str, list[Session]] = {}
        sessions = _latest_sessions(workflow)
        turn = self._turn(workflow, sessions)
        for session in sessions:
            rests = session.role in waits and not session.running and not session.ended
            if rests and worker.seat in session.seats.values():
                idle.setdefault(session.role or "", []).append(session)
        for role, sessions in idle.items():
            branch = latest(sessions[0]) if len(sessions) == 1 else None  # of several nobody knows which
            if branch is not None and branch is not turn and waits[role] > 0:
                owners[branch.id], branches[branch.id] = waits[role], branch
        return owners, branches

    def _turn(self, workflow: Workflow, sessions: list[Session]) -> Branch | None:
        """The branch that goes on, where none runs and the last step was of a role that follows itself.

        Its own gap foretells it: that has a distribution, where the graph has a mean.
        """
        if not sessions or any(session.running for session in sessions):
            return None
        branch = latest(max(sessions, key=lambda session: session.touched))
        role = branch.last.role if branch is not None and branch.last is not None else None
        return branch if self._knowledge.repeats(workflow, role or "") else None

    def _hint(self, worker: str, owner: str, at: float | None, now: float) -> Hint:
        branch = self._branches.get(owner)
        leased = branch is None or self._gate.leased(branch.session, worker)  # a role has no gate to pass
        if branch is not None:
            waits = self._idle(branch, worker) if at is None else None
        elif (waits := self._recurrence.gap((worker, owner))) is not None and at is not None:
            waits = waits if _sooner(*waits, at, now) else None
        if waits is None:
            return Hint(now) if at is None else Hint(now, next_use=at, leased=leased)
        since, gap = waits
        return Hint(since, gap=gap, hold=gap.quantile(RETURNING), reuse=1 - gap.never, leased=leased)

    def _idle(self, branch: Branch, worker: str) -> tuple[float, Gap] | None:
        """Since when a branch waits for its next step, and its gap."""
        if branch.last is None or branch.last.finished is None:
            return None
        never = 1.0 - self._gate.returning(branch.session, worker)
        return branch.last.finished, self._knowledge.gap(branch).unlikely(never)


def _sooner(since: float, gap: Gap, at: float, now: float) -> bool:
    """Whether a use is likelier soon by this gap than where it is foretold for `at`: by their retention indices."""
    return gap.index(max(now - since, SOON)) * max(at - now, SOON) > 1


def _latest_sessions(workflow: Workflow) -> list[Session]:
    return list(islice(reversed(workflow.sessions.values()), SESSIONS))


def _works(session: Session, step: Step) -> bool:
    """Whether a session that the caller of this step's session has called, too, is still to answer."""
    if session is step.session or session.parent != step.session.parent or session.ended:
        return False
    branch = latest(session)
    at_tools = branch is not None and branch.past.stop == TOOL and session.due > (step.finished or 0.0)
    return session.running > 0 or at_tools


def _name(workflow: Workflow) -> str:
    return f"{workflow.tenant}\0{workflow.id}"
