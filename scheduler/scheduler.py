"""The scheduler: events in, actions out, time passed in. It never waits and holds only soft state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scheduler import graph as g
from scheduler import pledges
from scheduler.accounts import Admitted
from scheduler.actions import Action, Cancel, Decision, Dispatch, Hold, Reject
from scheduler.admission import Gate
from scheduler.awaited import Awaited
from scheduler.events import (
    AdviceDue,
    Event,
    FirstToken,
    ResidencyChanged,
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.fairness import FLEX, Shares
from scheduler.keeping import Keeping, role_owner
from scheduler.knowledge import Knowledge
from scheduler.linking import Linker
from scheduler.placement import Placement, SoonestDone
from scheduler.places import Places
from scheduler.quotas import Quotas
from scheduler.residency import Residency
from scheduler.sizes import Sizes
from scheduler.workers import Worker, Workers

FASTEST = 5e-4  # seconds a token; no worker decodes faster
TRIES = 2
"""Workers that see a step before their first byte. Not all: it may be the step that kills them."""


class Scheduler:
    """Links each step to its workflow, sends it to its session's worker, and places what has none.

    A session keeps its worker while that worker lives: its KV is there. Sessions move only when the worker is
    lost or refuses the connection, and at a step boundary.
    """

    def __init__(self, placement: Placement | None = None, limits: g.Limits | None = None) -> None:
        self.graph = g.Graph(limits or g.Limits())
        self.linker = Linker(self.graph)
        self.knowledge = Knowledge()
        self.workers = Workers()
        self.gate = Gate(self.knowledge)
        self.keeping = Keeping(self.knowledge, self.workers, self.gate)
        self.sizes = Sizes()
        self.shares, self.quotas = Shares(), Quotas()
        self.placement = placement or SoonestDone(self.gate, self.sizes)
        self.running: dict[str, g.Step] = {}
        self._awaited = Awaited()
        self.places = Places(self._back)
        self._planned: dict[str, Decision] = {}  # where held steps were to go
        self._homeless: list[g.Step] = []  # held steps whose worker is lost
        self._handlers: dict[type, Callable[[Any, float], list[Action]]] = {
            StepArrived: self._arrived,
            FirstToken: self._first_token,
            StepFinished: self._finished,
            StepFailed: self._failed,
            StepCancelled: self._cancelled,
            WorkerUp: self._up,
            WorkerDraining: self._draining,
            WorkerDown: self._down,
            ResidencyChanged: self._residency_changed,
            WorkflowFinished: self._workflow_finished,
            Tick: self._tick,
            AdviceDue: self._advise,
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at `now` seconds and return what to do. Events on unknown steps do nothing."""
        actions = self._handlers[type(event)](event, now)
        homeless, self._homeless = self._homeless, []
        for step in homeless:
            actions += self._come(step, now)
        admitted = self.gate.admitted(now, everywhere=isinstance(event, Tick))
        actions += [self._admitted(one, now) for one in admitted]
        if isinstance(event, StepArrived) and event.step in self.gate.held:
            actions.append(self._hold(self.running[event.step]))
        return actions

    def _arrived(self, event: StepArrived, now: float) -> list[Action]:
        if not self.workers.know(event.model):
            return [self.workers.refusal(event.step, event.model)]  # and remember nothing of it
        who = event.identity
        if exceeded := self.quotas.exceeded(who.tenant, lambda: self.linker.knows(who, event.prompt, now), now):
            return [Reject(event.step, 429, f"Tenant {who.tenant!r}: {exceeded.reason}.", exceeded.retry_after)]
        linked = self.linker.link(event, now)
        step = linked.step
        if linked.parted:
            self.knowledge.parted(linked.parted)
        if linked.rewritten:
            self.keeping.given_up(linked.rewritten)
        self.knowledge.arrived(step, linked.original)
        for session in self.graph.crop(step.session.workflow):
            self._forget(session)
        step.session.running += 1
        step.size, step.flex = event.size, event.flex
        self.shares.arrived(step.session.workflow.tenant)
        self.running[step.id] = step
        self.quotas.came(step, self.sizes.expected(step) - step.branch.tokens, now)
        if hopeless := pledges.came(step, who, event.strict, self.knowledge, now):
            self._settle(step, g.REJECTED, now)
            return [Reject(step.id, 422, f"The run cannot be done as asked: {hopeless}.")]
        self.gate.begins(step, now)
        return self._come(step, now)

    def _come(self, step: g.Step, now: float) -> list[Action]:
        """Send the step to its worker, if that has a gate that is open; no actions: it is held."""
        self._planned.pop(step.id, None)
        decision = self._choose(step)
        if decision is None:
            return [self._refuse(step, now)]
        worker = self.workers[decision.worker]
        passes = bool(step.tried) or step.pinned is not None
        if self.gate.arrived(step, worker, self.sizes.expected(step), now, back=self._back(step), passes=passes):
            return [self._dispatch(step, worker, decision, now)]
        self._planned[step.id] = decision
        self._sit(step.session, worker)
        return []

    def _back(self, step: g.Step) -> float:
        """Seconds that the step stands back in line."""
        behind = self.shares.behind(step.session.workflow.tenant) + pledges.stands_back(step)
        return behind + (FLEX if step.flex else 0.0)

    def _admitted(self, one: Admitted, now: float) -> Action:
        planned = self._planned.pop(one.step.id)
        moved = "moved, " if one.worker.id != planned.worker and not planned.reason.startswith("moved") else ""
        terms = {**planned.terms, "held_seconds": round(one.waited, 3), "lru_affinity_seconds": round(one.plain, 3)}
        decision = Decision(one.worker.id, f"{moved}{planned.reason}, held: {one.why}", terms)
        return self._dispatch(one.step, one.worker, decision, now)

    def _hold(self, step: g.Step) -> Hold:
        session, (held, book, _) = step.session, self.gate.held[step.id]
        reason = f"no room for {held.tokens} tokens: {book.claimed} of {book.capacity} claimed, {book.kept} kept free"
        return Hold(step.id, session.workflow.id, session.id, book.worker.id, held.deadline, reason)

    def _choose(self, step: g.Step) -> Decision | None:
        """Where the step is to go; None: nowhere."""
        if (seat := self._seat(step)) is not None:
            return seat.continues
        able = [w for w in self.workers.values() if _serves(w, step)]
        fresh = [w for w in able if not w.draining] or able
        if not fresh:
            return None
        decision = self.placement.place(step, fresh)
        self.workers[decision.worker].placed += 1
        return Decision(decision.worker, self._why(step, decision.reason), decision.terms)

    def _dispatch(self, step: g.Step, worker: Worker, decision: Decision, now: float) -> Dispatch:
        if (pledge := step.session.workflow.pledge) is not None:
            reason = ", ".join(filter(None, (decision.reason, pledge.warning)))
            decision = Decision(decision.worker, reason, {**decision.terms, **pledge.terms})
        step.decision, step.dispatched = decision, now
        worker.running[step.id] = step
        self._sit(step.session, worker)
        self.keeping.came(step, worker)
        session = step.session
        return Dispatch(
            step.id, session.workflow.id, session.id, self._owner(step), decision, self.places.given(step)
        )  # fmt: skip

    def _sit(self, session: g.Session, worker: Worker) -> None:
        """The session counts for the worker from now on."""
        old = session.seats.get(worker.pool)
        if old is not None and old != worker.seat:
            self.workers[old[0]].sessions.discard(session)
            self.keeping.dead(session, old[0])
            self.gate.moved(session, old[0], worker.id)
        session.seats[worker.pool] = worker.seat
        worker.sessions.add(session)

    def _owner(self, step: g.Step) -> str:
        """The account of the step's blocks in the engine: branch and role, as ids that mean nothing elsewhere."""
        tenant = step.session.workflow.tenant
        return f"{step.branch.id}.{role_owner(tenant, step.role)}"

    def _seat(self, step: g.Step) -> Worker | None:
        """The worker that holds the session's KV, if it can serve the step and has not restarted since."""
        seats = step.session.seats
        found = (self.workers[worker] for worker, _ in seats.values())
        return next((w for w in found if seats.get(w.pool) == w.seat and _serves(w, step)), None)

    def _why(self, step: g.Step, reason: str) -> str:
        if step.pinned is not None:
            return "pinned"
        if step.tried:
            return f"retried, {reason}"
        pools = {w.pool for w in self.workers.serving(step.model)}
        return f"moved, {reason}" if pools & step.session.seats.keys() else reason

    def _refuse(self, step: g.Step, now: float) -> Reject:
        self._settle(step, g.FAILED if step.tried else g.REJECTED, now)
        if step.tried:
            return Reject(step.id, 502, "the worker failed before it answered, and so did every other that was tried")
        return self.workers.refusal(step.id, step.model)

    def _release(self, step: g.Step, now: float) -> None:
        """Give back the step's place on its worker, or at the gate."""
        self._planned.pop(step.id, None)
        self.places.left(step)
        self.gate.ended(step, now)
        if step.decision is not None:
            self.workers[step.decision.worker].running.pop(step.id, None)

    def _settle(self, step: g.Step, state: str, now: float) -> None:
        """The step is over, however it ended."""
        self._release(step, now)
        del self.running[step.id]
        self.shares.ended(step.session.workflow.tenant, step.usage)
        self.quotas.ended(step, now)
        step.session.workflow.spent += step.usage.prompt + step.usage.output
        step.state, step.finished = state, now
        step.session.running -= 1
        if state != g.FINISHED:
            self.knowledge.failed(step)
            self.keeping.broke(step)
        self.graph.touch(step.session, now)
        followable = step.session.named or step.session.workflow.named or step.link
        if not followable or step.session.ended:
            self._leave(step.session)
        if step.session.ended and not step.session.running:
            self.keeping.dead(step.session)
            self.gate.gone(step.session)

    def _leave(self, session: g.Session) -> None:
        """The session counts for no worker until its next step."""
        if not session.running:
            self.graph.live.pop(session, None)
            for worker, _ in session.seats.values():
                self.workers[worker].sessions.discard(session)

    def _first_token(self, event: FirstToken, now: float) -> list[Action]:
        if (step := self.running.get(event.step)) and step.first_token is None:
            step.first_token = now
            self.gate.first_token(step)
            if step.decision is not None and step.dispatched is not None:
                worker = self.workers[step.decision.worker]
                step.prefill, worker.served = now - max(step.dispatched, worker.served), now
            return [*self.keeping.ahead(step, now)]
        return []

    def _finished(self, event: StepFinished, now: float) -> list[Action]:
        if step := self.running.get(event.step):
            step.usage, step.stop, step.tools = event.usage, event.stop, event.tools
            self._measure(step, now)
            self._settle(step, g.FINISHED, now)
            if event.answer:
                self.linker.answered(step, event.answer)
            self.knowledge.finished(step)
            self._awaited.expect(step.session, self.gate.stands(step), self.graph, now)
            return self._keep(step)
        return []

    def _measure(self, step: g.Step, now: float) -> None:
        """Learn what the step's prompt and its prefill came to."""
        self.sizes.learn(step)
        usage = step.usage
        decoded = now - (step.first_token or now)
        if step.decision is not None and decoded > FASTEST * (usage.output - 1) > 0:  # its first token came as such
            self.workers[step.decision.worker].rates.learn(usage.cached, usage.prompt, step.prefill)

    def _keep(self, step: g.Step) -> list[Action]:
        """What the step leaves is kept for the next one, or dead if the client said that none comes."""
        if step.decision is not None:
            usage = step.usage
            self.workers[step.decision.worker].residency.guessed(step.branch.id, usage.prompt + usage.output)
        if not step.session.ended or step.session.running:
            self.keeping.ended(step)
        return [*self.keeping.returns(step)]

    def _lapse(self, now: float) -> None:
        """Let overdue sessions count for no worker until their next step; their seats stay."""
        for session in self._awaited.lapsed(now):
            for worker, _ in session.seats.values():
                self.workers[worker].sessions.discard(session)

    def _failed(self, event: StepFailed, now: float) -> list[Action]:
        if (step := self.running.get(event.step)) is None:
            return []
        if not event.retryable or step.decision is None:
            self._settle(step, g.FAILED, now)
            return []
        self._release(step, now)
        worker, seats = self.workers[step.decision.worker], step.session.seats
        step.tried += (worker.id,)
        if seats.get(worker.pool) == worker.seat:
            del seats[worker.pool]
            worker.sessions.discard(step.session)
            self.gate.gone(step.session, worker.id)
        return self._come(step, now) if len(step.tried) < TRIES else [self._refuse(step, now)]

    def _cancelled(self, event: StepCancelled, now: float) -> list[Action]:
        if step := self.running.get(event.step):
            self._settle(step, g.CANCELLED, now)
        return []

    def _up(self, event: WorkerUp, now: float) -> list[Action]:
        worker = self.workers.named(event.worker)
        life = f"{event.incarnation}/{event.pool}"  # another model is another KV
        lost = self._lose(worker) if worker.incarnation != life else []
        worker.pool, worker.models = event.pool, frozenset(event.models)
        worker.incarnation, worker.kv_tokens, worker.host_tokens = life, event.kv_tokens, event.host_tokens
        worker.advised, worker.fetches, worker.residency.room = event.advised, event.fetches, event.kv_tokens
        self.gate.came(worker)
        worker.up, worker.failed = True, False
        return lost

    def _draining(self, event: WorkerDraining, now: float) -> list[Action]:
        self.workers.named(event.worker).draining = True
        return []

    def _down(self, event: WorkerDown, now: float) -> list[Action]:
        worker = self.workers.named(event.worker)
        worker.up, worker.draining, worker.failed = False, False, event.failed
        return self._lose(worker)

    def _lose(self, worker: Worker) -> list[Action]:
        """What the worker held is gone; whatever runs there is cut off."""
        worker.placed = 0
        worker.sessions.clear()
        worker.residency = Residency(worker.kv_tokens)
        self._homeless += self.gate.lost(worker)
        return [Cancel(step, f"worker {worker.id} is lost") for step in worker.running]

    def _workflow_finished(self, event: WorkflowFinished, now: float) -> list[Action]:
        if workflow := self.graph.get(event.tenant, event.workflow):
            workflow.finished = True
            self.knowledge.over(workflow)
            self.keeping.over(workflow)
            for session in workflow.sessions.values():
                session.ended = True
                self._forget(session)
        return []

    def _advise(self, event: AdviceDue, now: float) -> list[Action]:
        self.gate.faded(now)
        return [*self.keeping.told(now)]

    def _tick(self, event: Tick, now: float) -> list[Action]:
        self._lapse(now)
        self.quotas.passed(now)
        self.gate.faded(now)
        for session in self.graph.quiet(now):
            self._leave(session)
            self.keeping.quiet(session, now)
            if session.workflow.touched == session.touched:  # the last of its sessions
                self.knowledge.over(session.workflow)
        for session in self.graph.forget(now):
            self._forget(session)
        return [one for one in self.places.moved() if self.workers[one.worker].advised]

    def _residency_changed(self, event: ResidencyChanged, now: float) -> list[Action]:
        if worker := self.workers.get(event.worker):
            worker.residency.reported(event.owners, event.full)
        return []

    def _forget(self, session: g.Session) -> None:
        self._leave(session)
        self.keeping.dead(session)
        self.gate.gone(session)
        self.knowledge.gone(session)
        self.linker.lineage.forget(session)

    def check(self) -> None:
        """Raise AssertionError where a counter and what it counts disagree. For tests, and safe in production."""
        on_workers = {step for w in self.workers.values() for step in w.running}
        assert on_workers | self.gate.held.keys() == self.running.keys(), (
            "a step is nowhere, or one that ended somewhere"
        )
        assert not on_workers & self.gate.held.keys(), "a step runs and is held"
        assert self._planned.keys() == self.gate.held.keys(), "a plan without its step"
        self.gate.check()
        sessions = [s for w in self.graph.workflows.values() for s in w.sessions.values()]
        assert sum(s.running for s in sessions) == len(self.running), "a session counts a step that ended"
        assert self.graph.steps == sum(len(w.steps) for w in self.graph.workflows.values()), "steps miscounted"
        for workflow in self.graph.workflows.values():
            assert all(s.workflow is workflow for s in workflow.sessions.values()), "a session belongs elsewhere"
            assert len(workflow.repeats) <= len(workflow.steps), "repeats outlive their steps"
        for worker in self.workers.values():
            assert set(worker.sessions) <= self.graph.live.keys(), "a worker holds a session that is not live"
            assert all(s.seats.get(worker.pool) == worker.seat for s in worker.sessions), "a seat is elsewhere"


def _serves(worker: Worker, step: g.Step) -> bool:
    """Whether the step may go to the worker now."""
    return worker.serves(step.model) and worker.id not in step.tried and step.pinned in (None, worker.id)
