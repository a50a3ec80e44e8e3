"""Weft: the real scheduler core on the virtual clock, and what it tells the modelled engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.simulation.system import System, Turn, role_of, session_of
from bench.workloads.runs import Piece, Run
from kvcache.policy import Policy
from kvcache.retention import Retention
from scheduler.actions import Action, Cancel, Dispatch, Hold, Prefetch, Release, Reprioritise, Retain
from scheduler.events import (
    AdviceDue,
    Event,
    FirstToken,
    StepArrived,
    StepFailed,
    StepFinished,
    Tick,
    Usage,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.identity import Identity
from scheduler.keeping import role_owner
from scheduler.prompt import Answer, ToolCall
from scheduler.residency import Residency
from scheduler.scheduler import Scheduler
from scheduler.template import Template

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster
    from bench.simulation.engine import Engine

MODEL = "model"
CHARACTERS = 4  # a token
TICK = 10  # times that the engines are told what has changed, per second


class WeftAttached(System):
    """The core over engines that keep their LRU, as vLLM servers without our plug-in do.

    Clients send what ordinary ones do, the ids of session and parent session; a role stands for the system prompt and
    tools, which the core reads. It is told nothing else: no program, no end, no output length, no gap.
    """

    name = "weft-attached"
    tick = 1.0
    advised = False
    gated = True

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.scheduler = Scheduler()
        self.turns: dict[str, Turn] = {}
        self.places: dict[str, int] = {}
        for engine in cluster.engines:
            self.up(engine)

    def up(self, engine: Engine) -> None:
        """The engine can serve."""
        fetches, known = self.advised and engine.tier_tokens > 0, engine.kv_tokens if self.gated else 0
        name, life = _worker(engine.index), f"{self.cluster.now}"
        self._handle(WorkerUp(name, "pool", (MODEL,), life, known, engine.tier_tokens, self.advised, fetches))

    def lost(self, worker: int, turns: Sequence[Turn]) -> None:
        self._handle(WorkerDown(_worker(worker)))
        for turn in turns:
            begun = turn.record.first_token is not None
            self._handle(StepFailed(_step(turn), "the worker died", retryable=not begun))
            if begun:
                self.cluster.again(turn)

    def restored(self, worker: int) -> None:
        self.up(self.cluster.engines[worker])

    def drained(self, worker: int) -> None:
        self._handle(WorkerDraining(_worker(worker)))

    def arrived(self, turn: Turn) -> None:
        self.turns[_step(turn)] = turn
        self._handle(StepArrived(_step(turn), MODEL, self.identity(turn), size=CHARACTERS * turn.call.prompt.end))

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
        self.places.pop(name, None)

    def ticked(self) -> None:
        self._handle(Tick())

    def key(self, turn: Turn) -> float | None:
        return self.places.get(_step(turn))

    def identity(self, turn: Turn) -> Identity:
        """What the turn's client says of it."""
        run, call = turn.run, turn.call
        parent = session_of(run, call.parent) if call.parent else None
        return Identity(session=turn.owner, parent=parent, role=call.role, tenant=run.tenant, rule="x-session-id")

    def _handle(self, event: Event) -> None:
        for action in self.scheduler.handle(event, self.cluster.now):
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Hold | Cancel):
            return
        if not isinstance(action, Dispatch):
            raise RuntimeError(f"the core did not place a step: {action}")
        if action.priority:
            self.places[action.step] = action.priority
        self.cluster.send(self.turns[action.step], int(action.decision.worker))


class Weft(WeftAttached):
    """The same clients; engines with our plug-in, which evict, release and prefetch as the core says."""

    name = "weft"
    tick = 1 / TICK
    advised = ours = True
    obeyed: tuple[type, ...] = (Retain, Release, Prefetch)

    def __init__(self, cluster: Cluster) -> None:
        self._names: dict[str, str] = {}  # what the simulation calls an owner
        self._latest: dict[str, Piece] = {}  # the prompt of its latest step
        self._steps: dict[str, str] = {}  # the latest step of a branch
        self._ticks = 0
        super().__init__(cluster)

    def up(self, engine: Engine) -> None:
        super().up(engine)
        self.scheduler.workers[_worker(engine.index)].residency = _Seen(self, engine)

    def policy(self) -> Policy:
        return Retention()

    def resident(self, engine: Engine, owner: str) -> tuple[int, int]:
        """Tokens of an owner's latest prompt and answer on the device, and beyond those in the host tier."""
        piece = self._latest.get(self._names.get(owner, ""))
        if piece is None:
            return 0, 0
        device, all_ = engine.resident(piece)
        return device, all_ - device

    def finished(self, turn: Turn) -> None:
        if turn.record.error is None:
            self._latest[turn.owner] = turn.call.answer or turn.call.prompt
        super().finished(turn)

    def ticked(self) -> None:
        self._ticks += 1
        if self._ticks % TICK == 0:
            self._handle(Tick())
        self._handle(AdviceDue())

    def _act(self, action: Action) -> None:
        if isinstance(action, Dispatch):
            turn = self.turns[action.step]
            branch = action.owner.partition(".")[0]
            self._names[branch], self._steps[branch] = turn.owner, action.step
            self._names[role_owner(turn.run.tenant, turn.call.role)] = role_of(turn.run.tenant, turn.call.role)
            super()._act(action)
        elif isinstance(action, Reprioritise):
            if (step := self._steps.get(action.owner)) in self.turns:
                self.places[step] = action.priority
        elif not isinstance(action, Retain | Release | Prefetch):
            super()._act(action)
        elif isinstance(action, self.obeyed) and (owner := self._names.get(action.owner)) is not None:
            engine = self.cluster.engines[int(action.worker)]
            if isinstance(action, Retain):
                engine.tell(owner, action.hint)
            elif isinstance(action, Release):
                engine.release(owner)
            elif (piece := self._latest.get(owner)) is not None:
                engine.prefetch(piece)


class WeftNoGate(Weft):
    """As `weft`, but of workers whose size the core does not know, so that it holds nobody."""

    name = "weft-no-gate"
    gated = False


class WeftNoEvict(Weft):
    """As `weft`, but dead KV goes first and the rest by LRU."""

    name = "weft-no-evict"
    obeyed = (Release, Prefetch)


class WeftNoRelease(Weft):
    """As `weft`, but nothing is ever said to be dead."""

    name = "weft-no-release"
    obeyed = (Retain, Prefetch)


class WeftNoPrefetch(Weft):
    """As `weft`, but nothing is loaded before it is asked for."""

    name = "weft-no-prefetch"
    obeyed = (Retain, Release)


class WeftAlone(Weft):
    """As `weft`, with clients that do not say whose sub-agent a session is: each is placed and let in by itself."""

    name = "weft-alone"

    def identity(self, turn: Turn) -> Identity:
        return replace(super().identity(turn), parent=None)


class WeftHinted(Weft):
    """As `weft`, with clients that say all they can.

    They name run and program, declare a template where they have one, say then which roles a call follows, and mark the
    end of each run.
    """

    name = "weft-hinted"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.declared: set[tuple[str, str]] = set()

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

    def ended(self, run: Run) -> None:
        self._handle(WorkflowFinished(run.tenant, run.id))


class _Seen(Residency):
    """What an engine with our plug-in reports, at once."""

    def __init__(self, weft: Weft, engine: Engine) -> None:
        super().__init__()
        self.reports = True
        self._weft, self._engine = weft, engine

    def tokens(self, owner: str) -> tuple[int, int]:
        return self._weft.resident(self._engine, owner)


def _step(turn: Turn) -> str:
    return f"{turn.run.id}#{turn.index}"


def _worker(index: int) -> str:
    return str(index)
