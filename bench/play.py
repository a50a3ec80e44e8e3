"""Plays runs of agents against real servers, as their clients would, and writes down what these saw."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable, Sequence
from time import perf_counter

import aiohttp

from bench.metrics import TIMEOUT
from bench.records import CallRecord, Played, RunRecord
from bench.rivals import ideal
from bench.rivals.chat import Exchange, extended, request, within
from bench.rivals.front import Front, Place, Turn
from bench.rivals.texts import Texts
from bench.schedule import WARM_SHARE, Turnover
from bench.simulation.profile import Profile
from bench.workloads.runs import Call, Run


class Player:
    """One cell. `timeout` is how many seconds a client waits for one call; an error is never retried. `profile`: what
    these engines cost, None where nobody knows."""

    def __init__(
        self, http: aiohttp.ClientSession, front: Front, texts: Texts, model: str, block: int,
        timeout: float = TIMEOUT, profile: Profile | None = None,
    ) -> None:  # fmt: skip
        self._http, self._front, self._texts, self._model = http, front, texts, model
        self._block, self._timeout, self._profile = block, timeout, profile
        self._alone: dict[str, float] = {}
        self._sent: list[tuple[Call, CallRecord]] = []
        self._runs: list[RunRecord] = []
        self._began = 0.0

    def reckon(self, runs: Iterable[Run]) -> None:
        """Know how long each of these runs takes alone. To be done before they are played: it takes time."""
        if self._profile:
            self._alone |= {run.id: self._profile.unloaded(run, answers=False) for run in runs}

    async def closed(self, supply: Sequence[Run], begins: Sequence[tuple[float, float]]) -> Played:
        """A run at a time in each slot, until a slot finds none left; what then runs may end, for at most `timeout`
        seconds. `begins` says of each slot when its first run begins, and after what share of its calls.

        First runs that have ended before the window opens are not counted: every system is measured on the same runs.
        """
        first, later = supply[: len(begins)], iter(supply[len(begins) :])
        turnover = Turnover({run.id for run in first}, len(supply) - len(first))

        async def slot(run: Run, delay: float, depth: float) -> None:
            await asyncio.sleep(delay)
            await self.run(run, int(depth * len(run.calls)))
            turnover.ended(run.id, self._now())
            for run in later:
                turnover.began(self._now())
                await self.run(run)
            turnover.ran_out(self._now())

        self._began = perf_counter()
        playing = [asyncio.create_task(slot(run, *begin)) for run, begin in zip(first, begins, strict=True)]
        try:
            await _finished(playing, None, asyncio.FIRST_COMPLETED)
            await _finished(playing, self._timeout)
        finally:
            await _cancel(playing)
        return self._played(turnover.window, turnover.turned, turnover.starved)

    async def open(self, runs: Sequence[Run], times: Iterable[float]) -> Played:
        """Each run at its time, in seconds, ascending. What runs `timeout` seconds after the last is cut off."""
        arrivals = list(times)
        playing: list[asyncio.Task[None]] = []
        self._began = perf_counter()
        try:
            for run, at in zip(runs, arrivals, strict=True):
                await asyncio.sleep(at - self._now())
                playing.append(asyncio.create_task(self.run(run)))
            await _finished(playing, self._timeout)
        finally:
            await _cancel(playing)
        warm = int(WARM_SHARE * len(runs))
        return self._played((arrivals[warm], arrivals[-1]), {run.id for run in runs[:warm]})

    async def run(self, run: Run, skipped: int = 0) -> None:
        """Play a run without its first calls, which count as ended when it starts. Cut off where this is cancelled."""
        record = RunRecord(run.id, run.tenant, self._now(), self._alone.get(run.id), warm=False)
        self._runs.append(record)
        ended = {call: asyncio.Event() for call in run.calls}
        for call in run.calls[:skipped]:
            ended[call].set()
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(skipped, len(run.calls)):
                    group.create_task(self._step(Turn(run, index), ended))
            record.finished = self._now()
        finally:
            if record.finished is None:
                record.until = self._now()
            self._front.over(run)

    async def _step(self, turn: Turn, ended: dict[Call, asyncio.Event]) -> None:
        call = turn.call
        await _some([ended[one] for one in call.after], call.need)
        due = self._now() + call.gap
        body = request(self._model, self._texts.messages(turn.run, call), call.output)
        await asyncio.sleep(due - self._now())
        await self._call(turn, body)
        ended[call].set()

    async def _call(self, turn: Turn, body: bytes) -> None:
        run, call, exchange = turn.run, turn.call, Exchange()
        record = CallRecord(
            run.id, turn.index, turn.owner, run.tenant, "", self._now(), call.prompt.end, call.output, held=None
        )
        self._sent.append((call, record))
        try:
            await within(self._timeout, exchange, self._exchange(turn, record, body, exchange))
        finally:  # also where it is cut off
            record.worker = record.worker or exchange.worker
            if exchange.times and exchange.error is None:
                record.first_token = exchange.times[0] - self._began
                record.first_text = exchange.text and exchange.text - self._began
        record.error = exchange.error
        if exchange.error is not None or exchange.ended is None:
            return
        record.finished = exchange.ended - self._began
        record.first_token = record.finished if record.first_token is None else record.first_token
        record.prompt, record.output = exchange.usage["prompt_tokens"], exchange.usage["completion_tokens"]
        record.cached = exchange.cached

    async def _exchange(self, turn: Turn, record: CallRecord, body: bytes, exchange: Exchange) -> None:
        try:
            place: Place = await self._front.place(turn)
        finally:
            if self._front.holds_seen:
                record.held = self._now() - record.sent
        record.worker = place.worker
        try:
            await exchange.send(self._http, place.url, extended(body, place.fields), place.headers)
        finally:
            self._front.ended(turn)

    def _now(self) -> float:
        return perf_counter() - self._began

    def _played(self, window: tuple[float, float], warm: Container[str], starved: int = 0) -> Played:
        for run in self._runs:
            run.warm = run.run in warm
        ideal.fill(self._sent, self._block, self._texts.tail, self._texts.shared)
        return Played(
            [record for _, record in self._sent],
            self._runs,
            window,
            {"timeout": self._timeout, "starved": starved},
        )


async def _some(events: Sequence[asyncio.Event], need: int | None) -> None:
    """Wait until `need` of the events are set (None: all)."""
    waiting = {asyncio.ensure_future(event.wait()) for event in events}
    left = len(waiting) - (len(waiting) if need is None else need)
    try:
        while len(waiting) > left:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()


async def _finished(
    tasks: Sequence[asyncio.Task[None]], timeout: float | None, when: str = asyncio.ALL_COMPLETED
) -> None:
    """Wait for the tasks, at most so long. Raises what one of them did."""
    done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=when)
    for task in done:
        task.result()


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
