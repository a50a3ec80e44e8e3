"""Drives the scheduler from the event loop: gives it events and the time, carries out its actions."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from scheduler.actions import Action, Advice, Cancel, Decision, Dispatch, Hold, Reject
from scheduler.events import (
    AdviceDue,
    Event,
    FirstToken,
    StepArrived,
    StepCancelled,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerDown,
    WorkerUp,
)
from scheduler.identity import ANONYMOUS
from scheduler.scheduler import TRIES, Scheduler
from scheduler.workers import RETRY_AFTER_SECONDS
from server.call import Call
from server.errors import ApiError

log = structlog.get_logger("weft")

FALLBACK = "core-failed, fewest-attempts"
FLEX = "flex"  # OpenAI's `service_tier` of offline work
GRACE = 5.0  # seconds beyond its deadline that a hold may last
RETRY_SOON = 1  # seconds until a step that was held may be sent again
SESSION_HEADER = (0, 32)
ADVICE = 10  # times that engines are told what has changed, in each tick
_RELEASE = re.compile(r"(\d+)\.([1-9]\d+)")  # 0.1.dev: built from a source tree, of any age


def bearer(api_key: str | None) -> dict[str, str]:
    """The header by which a worker knows us; none where it asks for no key."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker that is up is reached."""

    worker: str
    url: str
    cards: tuple[dict[str, Any], ...] = ()
    api_key: str | None = None
    incarnation: str = ""
    version: str = ""
    abilities: Mapping[str, Any] = field(default_factory=dict)

    @property
    def advised(self) -> bool:
        """Whether its engine has our plug-in and takes advice."""
        return bool(self.abilities.get("control"))

    @property
    def orders(self) -> bool:
        """Whether its engine lets steps go by their priority."""
        return bool(self.abilities.get("order"))

    @property
    def models(self) -> tuple[str, ...]:
        """The ids it serves: the model and its adapters."""
        return tuple(card["id"] for card in self.cards)

    @property
    def reads_session_header(self) -> bool:
        """Whether its vLLM takes a request's session from `X-Session-ID`; older ones from `vllm_xargs` alone."""
        numbers = _RELEASE.match(self.version)
        return numbers is None or (int(numbers[1]), int(numbers[2])) >= SESSION_HEADER


@dataclass(slots=True, eq=False)
class Attempt:
    """One step in the relay's hands, from its arrival to its end: what happened to it, for those who watch.

    Times are in seconds on the core's clock. While a step is held, `decided` is what it waits for. `cut` ends the
    attempt on the worker at once, for a reason.
    """

    call: Call
    arrived: float
    dispatch: Dispatch | None = None
    hold: Hold | None = None
    decided: asyncio.Future[Dispatch | Reject] | None = None
    dispatched: float | None = None
    dispatched_first: float | None = None
    first_token: float | None = None
    finished: float | None = None
    state: str = "running"
    status: int = 0
    tried: list[str] = field(default_factory=list)
    after: tuple[str, ...] = ()
    rule: str = ANONYMOUS
    role: str | None = None
    cut: Callable[[str], None] | None = None

    @property
    def usage(self) -> Usage:
        """Tokens, as the worker reported them so far."""
        return self.call.dialect.usage


@dataclass(eq=False)
class Core:
    """The one owner of the scheduler. If the scheduler fails, steps are still served, least-loaded, and counted.

    A stream is committed to status 200 once it has waited for `hold_commit_seconds`; a step that is not streamed is
    held for at most `hold_unary_seconds`.
    """

    scheduler: Scheduler = field(default_factory=Scheduler)
    watchers: list[Callable[[Attempt], None]] = field(default_factory=list)
    advisors: list[Callable[[Advice], None]] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    in_flight: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    draining: bool = False
    hold_commit_seconds: float = 10.0
    hold_unary_seconds: float = 50.0

    def __post_init__(self) -> None:
        # Epoch seconds that never step back.
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since the epoch, monotonic."""
        return time.monotonic() + self._offset

    @property
    def ready(self) -> bool:
        """Whether a worker can serve and new work is welcome."""
        return bool(self.endpoints) and not self.draining

    def arrive(self, call: Call, pinned: str | None = None) -> tuple[Attempt, Dispatch | Hold | Reject]:
        """A step has come: schedule it. The caller ends the attempt with `end`, whatever happens."""
        attempt = self.attempts[call.id] = Attempt(call, self.now())
        flex = call.fields.get("service_tier") == FLEX
        actions = self._handle(
            StepArrived(call.id, call.model, call.identity, pinned, call.prompt, len(call.body), flex, _strict(call))
        )
        if step := self.scheduler.running.get(call.id):
            attempt.after, attempt.rule, attempt.role = step.after, step.rule, step.role
        return attempt, self._take(attempt, actions)

    async def admitted(self, attempt: Attempt, hold: Hold, patience: float) -> Dispatch | Reject:
        """Wait until a held step may go, at most `patience` seconds. One that the core forgets goes by the fallback."""
        assert attempt.decided is not None
        left = hold.deadline + GRACE - self.now()
        try:
            async with asyncio.timeout(min(patience, left)):
                return await attempt.decided
        except TimeoutError:
            if attempt.decided.done() and not attempt.decided.cancelled():  # in the same turn
                return attempt.decided.result()
            if patience < left:
                text = f"held for {patience:g} s, as {hold.reason}; send it again, it keeps its place"
                return Reject(attempt.call.id, 503, text, RETRY_SOON)
            self.failed_to_learn(RuntimeError(f"step {attempt.call.id} was held beyond its deadline"))
            return self._sent(attempt, self._fallback(attempt))

    def failed(self, attempt: Attempt, reason: str, retryable: bool) -> Dispatch | Hold | Reject | None:
        """The attempt on its worker broke. Returns where to go next; None where the answer had begun."""
        self._leave_worker(attempt)
        actions = self._handle(StepFailed(attempt.call.id, reason, retryable))
        return self._take(attempt, actions) if retryable else None

    def first_token(self, attempt: Attempt) -> None:
        """Content has come."""
        attempt.first_token = self.now()
        self._handle(FirstToken(attempt.call.id))

    def end(self, attempt: Attempt, state: str) -> None:
        """The step is over. Gives back everything it counted for; safe to call at any point after `arrive`."""
        if self.attempts.pop(attempt.call.id, None) is None:
            return
        attempt.state, attempt.finished = state, self.now()
        self._leave_worker(attempt)
        step, dialect = attempt.call.id, attempt.call.dialect
        if state == "finished":
            self._handle(StepFinished(step, dialect.usage, dialect.stop, dialect.answer))
        elif state == "cancelled":
            self._handle(StepCancelled(step))
        else:
            self._handle(StepFailed(step, state, retryable=False))
        for watch in self.watchers:
            with self.counting():
                watch(attempt)

    def worker_up(self, endpoint: Endpoint, pool: str, kv_tokens: int) -> None:
        """The worker answers, or changed what it serves."""
        self.endpoints[endpoint.worker] = endpoint
        abilities = endpoint.abilities
        self._handle(
            WorkerUp(
                endpoint.worker, pool, endpoint.models, endpoint.incarnation, kv_tokens,
                int(abilities.get("host_tier") or 0), endpoint.advised, bool(abilities.get("prefetch")),
            )
        )  # fmt: skip

    def worker_down(self, worker: str, failed: bool = False) -> None:
        """The worker does not answer, or has not yet; `failed` where it never will."""
        self.endpoints.pop(worker, None)
        self._handle(WorkerDown(worker, failed))

    def tell(self, event: Event) -> None:
        """Pass on an event that dispatches nothing."""
        self._handle(event)

    async def tick(self, seconds: float = 1.0) -> None:
        """Tell the scheduler that time passes, until cancelled."""
        while True:
            for _ in range(ADVICE):
                await asyncio.sleep(seconds / ADVICE)
                self._handle(AdviceDue())
            self._handle(Tick())

    def _handle(self, event: Event) -> list[Action]:
        actions: list[Action] = []
        with self.counting():
            actions = self.scheduler.handle(event, self.now())
        for action in actions:
            if isinstance(action, Cancel) and (attempt := self.attempts.get(action.step)) and attempt.cut:
                attempt.cut(action.reason)
            elif isinstance(action, Advice):
                for advise in self.advisors:
                    advise(action)
            elif isinstance(action, Dispatch | Reject) and (attempt := self.attempts.get(action.step)):
                self._decide(attempt, action)
        return actions

    def _decide(self, attempt: Attempt, action: Dispatch | Reject) -> None:
        """A held step is held no more."""
        if attempt.decided is not None and not attempt.decided.done():
            attempt.decided.set_result(self._sent(attempt, action))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What fails in here costs a decision or a record, never the step: it is logged and counted."""
        try:
            yield
        except Exception as error:
            self.failed_to_learn(error)

    def failed_to_learn(self, error: Exception) -> None:
        """Log and count a failure that must not cost a step."""
        self.failures += 1
        log.error("the core failed; steps are served without it", exc_info=error)

    def _take(self, attempt: Attempt, actions: list[Action]) -> Dispatch | Hold | Reject:
        mine = (a for a in actions if isinstance(a, Dispatch | Hold | Reject) and a.step == attempt.call.id)
        action = next(mine, None) or self._fallback(attempt)
        if isinstance(action, Hold):
            attempt.hold, attempt.decided = action, asyncio.get_running_loop().create_future()
            return action
        return self._sent(attempt, action)

    def _sent(self, attempt: Attempt, action: Dispatch | Reject) -> Dispatch | Reject:
        if isinstance(action, Dispatch):
            attempt.dispatch, attempt.dispatched = action, self.now()
            attempt.dispatched_first = attempt.dispatched_first or attempt.dispatched
            attempt.tried.append(action.decision.worker)
            self.in_flight[action.decision.worker] += 1
        return action

    def _leave_worker(self, attempt: Attempt) -> None:
        """Give back the attempt's place on its worker, once."""
        if attempt.dispatched is not None and attempt.dispatch is not None:
            attempt.cut = attempt.dispatched = None
            self.in_flight[attempt.dispatch.decision.worker] -= 1

    def _fallback(self, attempt: Attempt) -> Dispatch | Reject:
        call, tried = attempt.call, attempt.tried
        able = [e.worker for e in self.endpoints.values() if call.model in e.models and e.worker not in tried]
        if not able or len(tried) >= TRIES:
            return Reject(call.id, 503, f"no worker of {call.model!r} is up", RETRY_AFTER_SECONDS)
        worker = min(able, key=lambda name: (self.in_flight[name], name))
        return Dispatch(call.id, f"w-{call.id}", f"w-{call.id}", f"b{call.id[:16]}", Decision(worker, FALLBACK))

    def missing(self, model: str) -> ApiError:
        """Why no worker serves `model` now."""
        refusal = self.scheduler.workers.refusal("", model)
        return ApiError(refusal.status, refusal.reason, retry_after=refusal.retry_after)

    def knows(self, call: Call) -> bool:
        """Whether the call continues a workflow."""
        return self.scheduler.linker.knows(call.identity, call.prompt, self.now())

    def default_model(self) -> str:
        """What a request without `model` means: the first model of the first worker."""
        return next((e.models[0] for e in self.endpoints.values() if e.models), "")


def _strict(call: Call) -> bool:
    """`Prefer: handling=strict` (RFC 7240): rather refuse than do otherwise than was asked."""
    return any(one.strip().lower() == "handling=strict" for one in call.headers.get("prefer", "").split(","))
