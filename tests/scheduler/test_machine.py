"""Random schedules against the scheduler: nothing is lost or doubled, every counter comes back to zero."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.actions import Action, Cancel, Dispatch, Hold, Reject
from scheduler.events import (
    FirstToken,
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.graph import Limits
from scheduler.identity import Identity
from scheduler.scheduler import Scheduler

WORKERS = ("w0", "w1", "w2")
SESSIONS = ("a", "b", "c", "d", None)
STALE = 1.5  # seconds between two ticks at most, here


class Schedules(RuleBasedStateMachine):
    """Plays clients, workers and the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(limits=Limits(live_seconds=30, kept_seconds=60, workflows=4, steps=12))
        self.now = 0.0
        self.open: dict[str, str] = {}  # step -> worker
        self.held: dict[str, float] = {}  # step -> deadline
        self.settled: set[str] = set()
        self.arrived = self.lives = 0

    def send(self, event: object) -> list[Action]:
        self.now += 0.5
        actions = self.scheduler.handle(event, self.now)  # type: ignore[arg-type]
        for action in actions:
            assert action.step not in self.settled, "an action on a step that is over"
            if isinstance(action, Dispatch):
                assert self.scheduler.workers[action.decision.worker].up
                assert self.now <= self.held.pop(action.step, self.now) + STALE, "held beyond the stated bound"
                self.open[action.step] = action.decision.worker
            elif isinstance(action, Reject):
                self.open.pop(action.step, None)
                self.held.pop(action.step, None)
                self.settled.add(action.step)
            elif isinstance(action, Hold):
                assert action.step not in self.open
                assert action.step not in self.held
                self.held[action.step] = action.deadline
            else:
                assert isinstance(action, Cancel)
                assert action.step in self.open
        return actions

    @initialize(workers=st.sampled_from([0, 1, 2, 2]))
    def begin(self, workers: int) -> None:
        for worker in WORKERS[:workers]:
            self.up(worker, ("m",), True, 100)

    @rule(session=st.sampled_from(SESSIONS), parent=st.sampled_from(SESSIONS), final=st.booleans(),
          model=st.sampled_from(["m", "m", "m", "n"]), pinned=st.sampled_from([*[None] * 12, *WORKERS]), size=st.sampled_from([0, 5, 40, 90]))  # fmt: skip
    def arrive(
        self, session: str | None, parent: str | None, final: bool, model: str, pinned: str | None, size: int
    ) -> None:
        self.arrived += 1
        step = f"s{self.arrived}"
        who = Identity(tenant="t", session=session, parent=parent if session else None, final=final, rule="x")
        (action,) = (a for a in self.send(StepArrived(step, model, who, pinned, size=size)) if a.step == step)
        assert isinstance(action, Dispatch | Hold | Reject)
        if isinstance(action, Dispatch) and pinned:
            assert action.decision.worker == pinned

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave_the_gate(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.held)))
        self.settled.add(step)
        del self.held[step]
        self.send(StepCancelled(step))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=st.sampled_from(["finish", "finish", "cancel", "begun", "first"]),
          tokens=st.sampled_from([5, 30, 80]))  # fmt: skip
    def end(self, data: st.DataObject, how: str, tokens: int) -> None:
        step = data.draw(st.sampled_from(sorted(self.open)))
        if how == "first":
            self.send(FirstToken(step))
            return
        self.settled.add(step)
        del self.open[step]
        event = {
            "finish": StepFinished(step, Usage(tokens, 2, 1)),
            "cancel": StepCancelled(step),
            "begun": StepFailed(step, "reset", retryable=False),
        }[how]
        assert all(isinstance(action, Dispatch) for action in self.send(event)), "others may get in"

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.open)))
        tried = self.open[step]
        (action,) = (a for a in self.send(StepFailed(step, "refused", retryable=True)) if a.step == step)
        if isinstance(action, Dispatch):
            assert action.decision.worker != tried

    @rule(worker=st.sampled_from(WORKERS), models=st.sampled_from([("m",), ("m", "n")]), new=st.booleans(),
          kv=st.sampled_from([0, 100, 100]))  # fmt: skip
    def up(self, worker: str, models: tuple[str, ...], new: bool, kv: int) -> None:
        self.lives += new
        self.send(WorkerUp(worker, models[-1], models, str(self.lives), kv_tokens=kv))

    @rule(worker=st.sampled_from(WORKERS), rarely=st.sampled_from([False, False, False, True]))
    def trouble(self, worker: str, rarely: bool) -> None:
        if rarely:
            self.down(worker)

    def down(self, worker: str) -> None:
        on_it = {step for step, where in self.open.items() if where == worker}
        assert {action.step for action in self.send(WorkerDown(worker)) if isinstance(action, Cancel)} == on_it

    @rule(worker=st.sampled_from(WORKERS), rarely=st.sampled_from([False, False, False, True]))
    def drain(self, worker: str, rarely: bool) -> None:
        if rarely:
            self.send(WorkerDraining(worker))

    @rule(session=st.sampled_from(["a", "b", "c"]))
    def finish_workflow(self, session: str) -> None:
        self.send(WorkflowFinished("t", session))

    @rule(seconds=st.sampled_from([1, 40, 100]))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 0.5
            self.send(Tick())

    @invariant()
    def every_step_is_somewhere(self) -> None:
        self.scheduler.check()
        assert self.scheduler.running.keys() == self.open.keys() | self.held.keys()
        assert len(self.open) + len(self.held) + len(self.settled) == self.arrived
        for step, worker in self.open.items():
            assert step in self.scheduler.workers[worker].running

    def teardown(self) -> None:
        while self.open or self.held:
            step = next(iter(self.open or self.held))
            self.open.pop(step, None)
            self.held.pop(step, None)
            self.settled.add(step)
            self.send(StepCancelled(step))
        self.scheduler.check()
        assert not self.scheduler.running
        self.now += 1000
        self.scheduler.handle(Tick(), self.now)
        assert not self.scheduler.graph.live
        assert not any(w.sessions or w.running for w in self.scheduler.workers.values())
        assert not self.scheduler.graph.workflows
        assert self.scheduler.graph.steps == 0
        assert not self.scheduler.graph._root_of
        assert not any(book.accounts or book.of or book.claimed for book in self.scheduler.gate.books.values())


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
