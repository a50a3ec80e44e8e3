"""What stands in front of the engines: the interface of every system on real engines, and those a client makes itself.

A client of the stock systems talks to the engines directly and picks one for each call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.rivals.engines import Build, Engines
from bench.simulation.system import Seats
from bench.simulation.systems.stock import Ring
from bench.workloads.runs import Call, Piece, Run, Workload

SESSION_HEADER, PARENT_HEADER = "x-session-id", "x-parent-session-id"


@dataclass(frozen=True, slots=True)
class Turn:
    """A call in play. `last` where its session makes no later one."""

    run: Run
    index: int

    @property
    def call(self) -> Call:
        """The call itself."""
        return self.run.calls[self.index]

    @property
    def owner(self) -> str:
        """Its session, as no other run has it."""
        return owner(self.run, self.call.session)

    @property
    def headers(self) -> dict[str, str]:
        """What every client says of a call: its session, and the one that made that."""
        said = {SESSION_HEADER: self.owner}
        if self.call.parent is not None:
            said[PARENT_HEADER] = owner(self.run, self.call.parent)
        return said

    @property
    def step(self) -> int:
        """How many calls its session made before it."""
        return sum(call.session == self.call.session for call in self.run.calls[: self.index])

    @property
    def last(self) -> bool:
        """Whether its session makes no further call."""
        return self.run.ends_session(self.index)


def owner(run: Run, session: str) -> str:
    """A session's name as no other run has it."""
    return f"{run.id}.{session}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call goes: the server, which worker that is ("" where the server decides), headers and body fields."""

    url: str
    worker: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


class Front:
    """A system. It is started afresh for each cell."""

    pid: int | None = None
    """The root of its own processes, None where it has none."""

    holds_seen = True
    """Whether a call is held by `place` alone; a server's holds cannot be seen from outside."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Be ready to be asked."""

    async def stop(self) -> None:
        """End what `start` started, also where that failed half-way."""

    def build(self, runs: Sequence[Run], asked: int, tier: float) -> Build:
        """How the engines shall be for these runs; all others have the `asked` KV tokens, and `tier` times that on the
        host."""
        return Build(asked, tier)

    async def place(self, turn: Turn) -> Place:
        """Where the call goes; may wait."""
        raise NotImplementedError

    def ended(self, turn: Turn) -> None:
        """A call that was placed has ended, well or not."""

    def over(self, run: Run) -> None:
        """The run makes no further call: it has ended or was cut off."""


class Direct(Front):
    """Picks an engine for each call."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Know the engines."""
        self.urls = engines.urls

    async def place(self, turn: Turn) -> Place:
        """The engine picked."""
        index = self.pick(turn)
        return Place(self.urls[index], f"w{index}", turn.headers)

    def pick(self, turn: Turn) -> int:
        """The index of the engine."""
        raise NotImplementedError


class Stock(Direct):
    """Sticky: a run stays on the engine that had the fewest live ones when it came."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Nobody is seated."""
        await super().start(engines, workload)
        self.seats = Seats([0] * len(self.urls))

    def pick(self, turn: Turn) -> int:
        """The run's seat."""
        if turn.run.id not in self.seats.of:
            self.seats.take(turn.run.id, self.seats.fewest())
        return self.seats.of[turn.run.id]

    def over(self, run: Run) -> None:
        """It leaves."""
        self.seats.leave(run.id)


class Unlimited(Stock):
    """Stock on engines whose KV memory holds everything that is played: the upper bound."""

    def build(self, runs: Sequence[Run], asked: int, tier: float) -> Build:
        """Enough if one engine got all of texts somewhat too long; a power of two, so that seeds share engines."""
        total = sum(map(distinct_tokens, runs)) * 5 // 4
        return Build(max(asked, 1 << (total - 1).bit_length()))


class RoundRobin(Direct):
    """Each call goes to the next engine."""

    def __init__(self) -> None:
        self.count = -1

    def pick(self, turn: Turn) -> int:
        """The next."""
        self.count += 1
        return self.count % len(self.urls)


class LeastLoaded(Direct):
    """Each call goes to an engine with the fewest calls in flight, equals in turn."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Nothing is in flight."""
        await super().start(engines, workload)
        self.flying = [0] * len(self.urls)
        self.at: dict[tuple[str, int], int] = {}
        self.next = 0

    def pick(self, turn: Turn) -> int:
        """The least loaded, searched from the one after the last pick."""
        count = len(self.urls)
        index = min(((self.next + i) % count for i in range(count)), key=self.flying.__getitem__)
        self.next = index + 1
        self.flying[index] += 1
        self.at[turn.run.id, turn.index] = index
        return index

    def ended(self, turn: Turn) -> None:
        """One fewer in flight."""
        self.flying[self.at.pop((turn.run.id, turn.index))] -= 1


class Hash(Direct):
    """Consistent hashing of the run on a ring: of numbers, not of ports, so that it is the same at every play."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Lay the ring."""
        await super().start(engines, workload)
        self.ring = Ring(len(self.urls))

    def pick(self, turn: Turn) -> int:
        """The run's place on it."""
        return self.ring.worker(turn.run.id)


class Semaphore(Stock):
    """Stock, but only so many runs at once as have room: total KV memory over a call's mean context. First come first
    served; a run keeps its place until it is over."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """All places are free."""
        await super().start(engines, workload)
        self.free = max(1, int(engines.kv_tokens * len(engines.urls) / workload.mean_context))
        self.inside: set[str] = set()
        self.waiting: dict[str, asyncio.Future[None]] = {}

    async def place(self, turn: Turn) -> Place:
        """Wait until the run is inside."""
        run = turn.run.id
        if run not in self.inside:
            if run not in self.waiting:
                self.waiting[run] = asyncio.get_running_loop().create_future()
                self._let_in()
            if run in self.waiting:
                await asyncio.shield(self.waiting[run])
        return await super().place(turn)

    def over(self, run: Run) -> None:
        """Its place is free for the next."""
        super().over(run)
        self.waiting.pop(run.id, None)
        if run.id in self.inside:
            self.inside.remove(run.id)
            self.free += 1
            self._let_in()

    def _let_in(self) -> None:
        while self.free and self.waiting:
            run = next(iter(self.waiting))
            self.free -= 1
            self.inside.add(run)
            self.waiting.pop(run).set_result(None)


def distinct_tokens(run: Run) -> int:
    """The tokens that a run ever has in KV memory, each once."""
    pieces: set[Piece] = {piece for call in run.calls for piece in call.prompt.path()}
    return sum(piece.tokens for piece in pieces) + sum(call.output for call in run.calls)
