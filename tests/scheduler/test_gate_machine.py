"""Random schedules past capacity: every hold ends within its stated bound, nobody is lost, and all sums come back to zero."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.actions import Action, Dispatch, Hold, Reject
from scheduler.events import FirstToken, StepArrived, StepCancelled, StepFinished, Tick, Usage, WorkerDown, WorkerUp
from scheduler.identity import Identity
from scheduler.scheduler import Scheduler

KV = 10_000
SESSIONS = [f"{run}/{session}" for run in "abcdefgh" for session in "xy"]
WORKERS = ("w0", "w1")


class Crowd(RuleBasedStateMachine):
    """More sessions than two workers hold; a size is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.now, self.count = Scheduler(), 0.0, 0
        self.running: dict[str, int] = {}  # step -> prompt tokens
        self.held: dict[str, tuple[float, int]] = {}  # step -> deadline, tokens
        self.context = dict.fromkeys(SESSIONS, 200)
        self.busy: dict[str, str] = {}  # step -> session
        self.lives = 0

    @initialize()
    def begin(self) -> None:
        for worker in WORKERS:
            self.send(WorkerUp(worker, "pool", ("m",), "0", kv_tokens=KV))
        self.arrive("a/x", 400)
        self.finish(next(iter(self.running)), 10)

    def send(self, event: object) -> list[Action]:
        self.now += 0.1
        actions = self.scheduler.handle(event, self.now)  # type: ignore[arg-type]
        for action in actions:
            if isinstance(action, Hold):
                assert action.deadline >= self.now
                self.held[action.step] = action.deadline, self.tokens
            elif isinstance(action, Dispatch):
                deadline, tokens = self.held.pop(action.step, (self.now, self.tokens))
                assert self.now <= deadline + 0.2, "held beyond the stated bound"
                assert action.step not in self.running
                self.running[action.step] = tokens
            elif isinstance(action, Reject):
                self.held.pop(action.step, None)
                del self.busy[action.step]
        return actions

    @rule(session=st.sampled_from(SESSIONS), more=st.sampled_from([50, 2500, 5000]))
    def arrive(self, session: str, more: int) -> None:
        while session in self.busy.values() and len(self.busy) < len(SESSIONS):
            session = SESSIONS[(SESSIONS.index(session) + 3) % len(SESSIONS)]
        if session in self.busy.values():
            return
        self.count += 1
        step, run = f"s{self.count}", session.split("/")[0]
        self.tokens = self.context[session] = min(self.context[session] + more, 12_000)
        self.busy[step] = session
        who = Identity(tenant="t", workflow=run, session=session, rule="metadata")
        self.send(StepArrived(step, "m", who, size=self.tokens))
        assert step in self.running or step in self.held or step not in self.busy

    @precondition(lambda self: self.running)
    @rule(data=st.data(), output=st.sampled_from([1, 100, 400]), clean=st.booleans())
    def end(self, data: st.DataObject, output: int, clean: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.running)))
        if clean:
            self.finish(step, output)
            return
        del self.running[step], self.busy[step]
        self.send(StepCancelled(step))

    def finish(self, step: str, output: int) -> None:
        tokens = self.running.pop(step)
        self.context[self.busy.pop(step)] = tokens + output
        self.send(FirstToken(step))
        self.send(StepFinished(step, Usage(tokens, 0, output), "tool_calls"))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[step], self.busy[step]
        self.send(StepCancelled(step))

    @rule(seconds=st.sampled_from([1, 10, 60]))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 0.9
            self.send(Tick())
        assert all(deadline > self.now for deadline, _ in self.held.values()), "the deadline of a hold has passed"

    @rule(worker=st.sampled_from(WORKERS), rarely=st.sampled_from([True, *[False] * 7]))
    def restart(self, worker: str, rarely: bool) -> None:
        if not rarely:
            return
        for action in self.send(WorkerDown(worker)):
            if action.step in self.running:
                del self.running[action.step], self.busy[action.step]
                self.send(StepCancelled(action.step))
        self.lives += 1
        self.send(WorkerUp(worker, "pool", ("m",), str(self.lives), kv_tokens=KV))

    @invariant()
    def every_step_is_somewhere(self) -> None:
        self.scheduler.check()
        assert self.scheduler.running.keys() == self.busy.keys() == self.running.keys() | self.held.keys()

    def teardown(self) -> None:
        while self.busy:
            step = next(iter(self.running or self.held))
            self.running.pop(step, None)
            self.held.pop(step, None)
            del self.busy[step]
            self.send(StepCancelled(step))
        self.scheduler.check()
        self.now += 100_000
        self.send(Tick())
        assert not any(book.accounts or book.of or book.claimed for book in self.scheduler.gate.books.values())


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
