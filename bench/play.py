"""Plays runs of agents against real servers, as their clients would, and writes down what these saw."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Container, Iterable, Sequence
from time import perf_counter

import aiohttp

from bench.records import CallRecord, Played, RunRecord
from bench.rivals import ideal
from bench.rivals.chat import Exchange, request, within
from bench.rivals.front import Front, Place, Turn, owner
from bench.rivals.texts import Texts
from bench.simulation.profile import PROFILES
from bench.workloads.runs import Call, Run

STAGGER_SECONDS = 0.15
DEEPEST_START = 0.75
WARM_SHARE = 0.2
"""Of the runs of an open loop, those that come first and are not counted."""

TIMEOUT = 600.0


class Player:
    """One cell. `timeout` is how many seconds a client waits for one call; an error is never retried."""

    def __init__(
        self, http: aiohttp.ClientSession, front: Front, texts: Texts, model: str, block: int, timeout: float = TIMEOUT
    ) -> None:
        self._http, self._front, self._texts, self._model = http, front, texts, model
        self._block, self._timeout = block, timeout
        self._sent: list[tuple[Call, CallRecord]] = []
        self._runs: list[RunRecord] = []
        self._began = 0.0

    async def closed(self, supply: Sequence[Run], slots: int, seed: int) -> Played:
        """As many runs at a time as there are slots, until a slot finds none left; what then runs may end, for at most
        `timeout` seconds.

        A slot's first run starts part-way, so that the slots are as spread as they will be later, and is not counted:
        every system is measured on the same runs. One that outlasts the supply is counted all the same, and the window
        begins without it: a run that starves must not hide.
        """
        first, later = supply[:slots], iter(supply[slots:])
        rng = random.Random(f"{seed} starts")
        depths = [rng.uniform(0, DEEPEST_START) for _ in first]
        turned: dict[str, float] = {}
        idle: list[float] = []

        async def slot(number: int) -> None:
            await asyncio.sleep(number * STAGGER_SECONDS)
            run = first[number]
            await self.run(run, int(depths[number] * len(run.calls)))
            if not idle:
                turned[run.id] = self._now()
            for run in later:
                await self.run(run)
            idle.append(self._now())

        self._began = perf_counter()
        playing = [asyncio.create_task(slot(number)) for number in range(len(first))]
        try:
            await _finished(playing, None, asyncio.FIRST_COMPLETED)
            await _finished(playing, self._timeout)
        finally:
            await _cancel(playing)
        starved = {run.id for run in first} - turned.keys()
        return self._played(max(turned.values(), default=idle[0]), idle[0], turned.keys(), len(starved))

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
        return self._played(arrivals[warm], arrivals[-1], {run.id for run in runs[:warm]})

    async def run(self, run: Run, skipped: int = 0) -> None:
        """Play a run without its first calls, which count as ended when it starts. Cut off where this is cancelled."""
        record = RunRecord(run.id, run.tenant, self._now(), PROFILES["cpu"].unloaded(run), warm=False)
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
        await asyncio.sleep(call.gap)
        await self._call(turn)
        ended[call].set()

    async def _call(self, turn: Turn) -> None:
        run, call = turn.run, turn.call
        record = CallRecord(
            run.id, turn.index, owner(run, call.session), run.tenant, "", self._now(), call.prompt.end, call.output
        )
        self._sent.append((call, record))
        body, exchange = request(self._model, self._texts.messages(run, call), call.output), Exchange()
        try:
            await within(self._timeout, exchange, self._exchange(turn, record, body, exchange))
        finally:  # also where it is cut off
            record.worker = record.worker or exchange.worker
            if exchange.times and exchange.error is None:
                record.first_token = exchange.times[0] - self._began
        record.error = exchange.error
        if exchange.error is not None or exchange.ended is None:
            return
        record.finished = exchange.ended - self._began
        record.first_token = record.finished if record.first_token is None else record.first_token
        record.prompt, record.output = exchange.usage["prompt_tokens"], exchange.usage["completion_tokens"]
        record.cached = exchange.cached

    async def _exchange(self, turn: Turn, record: CallRecord, body: dict[str, object], exchange: Exchange) -> None:
        place: Place = await self._front.place(turn)
        record.held, record.worker = self._now() - record.sent, place.worker
        try:
            await exchange.send(self._http, place.url, {**body, **place.fields}, place.headers)
        finally:
            self._front.ended(turn)

    def _now(self) -> float:
        return perf_counter() - self._began

    def _played(self, begin: float, end: float, warm: Container[str], starved: int = 0) -> Played:
        for run in self._runs:
            run.warm = run.run in warm
        ideal.fill(self._sent, self._block, self._texts.tail, self._texts.shared)
        return Played(
            [record for _, record in self._sent],
            self._runs,
            (begin, end),
            {"timeout": self._timeout, "starved": starved},
        )


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """The times, in seconds, of `count` arrivals at `rate` an hour."""
    rng, now, times = random.Random(f"{seed} arrivals"), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate / 3600)
        times.append(now)
    return times


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
