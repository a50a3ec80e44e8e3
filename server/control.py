"""Tells each worker's engine what the core says of its KV, and the core what the engine holds.

Messages are `kv_hints` envelopes (`kvcache.envelope`) to the plug-in's own route, batched; they are advice, so that one
that is lost is not sent again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from typing import Any

import aiohttp
from msgspec import json

from kvcache.envelope import VERSION
from kvcache.plugin.route import PATH
from scheduler.actions import Advice, Prefetch, Release, Reprioritise, Retain
from scheduler.events import ResidencyChanged
from server.advice import actions
from server.core import Core, Endpoint, bearer
from server.relay import LOST

PERIOD_SECONDS = 0.1
IDLE_SECONDS = 1.0  # between questions to an engine on which nothing happens
TIMEOUT = aiohttp.ClientTimeout(total=10)
MOST_AT_ONCE = 256  # actions in a message: the engine carries them out between two of its steps
MOST_PENDING = 20_000
MOST_A_SECOND = 500.0
"""Messages that are not urgent, to all workers together: each takes the front end a third of a millisecond."""


class Control:
    """The messages to all workers that take advice. `run` sends them until cancelled."""

    def __init__(self, core: Core, client: aiohttp.ClientSession) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """Actions by worker and what became of them: the engine's answers, `unsent` and `dropped`."""
        self.gauges: dict[str, Mapping[str, float]] = {}
        """What each worker's engine told of itself lately."""
        self._core, self._client = core, client
        self._lines: dict[str, _Line] = {}
        core.advisors.append(self.take)

    def take(self, advice: Advice) -> None:
        """Send this soon; what was to be said of the same owner before is not said any more."""
        self.counts[advice.worker, "dropped"] += self._line(advice.worker).take(advice)

    @property
    def period(self) -> float:
        """Seconds between two messages to a worker that are not urgent."""
        return max(PERIOD_SECONDS, len(self._core.endpoints) / MOST_A_SECOND)

    async def run(self) -> None:
        """Talk to the workers as they come, at most one message to each at a time."""
        try:
            while True:
                for worker in [*self._core.endpoints]:
                    self._line(worker)
                await asyncio.sleep(PERIOD_SECONDS)
        finally:
            for line in self._lines.values():
                line.task.cancel()

    def _line(self, worker: str) -> _Line:
        if worker not in self._lines:
            self._lines[worker] = _Line(self, self._core, self._client, worker)
        return self._lines[worker]


class _Line:
    """One worker: what waits to be said, and how far its residency is known."""

    def __init__(self, control: Control, core: Core, client: aiohttp.ClientSession, worker: str) -> None:
        self._control, self._core, self._client, self._worker = control, core, client, worker
        self._pressing: OrderedDict[tuple[type, str], Advice] = OrderedDict()  # comes too late if it waits
        self._pending: OrderedDict[tuple[type, str], Advice] = OrderedDict()
        self._urgent = asyncio.Event()
        self._numbers = count()
        self._incarnation, self._seen = "", -1
        self._asked = 0.0
        self.task = asyncio.create_task(self.run())

    def take(self, advice: Advice) -> int:
        """Returns how many others were dropped for it."""
        if isinstance(advice, Release):
            self._pending.pop((Retain, advice.owner), None)
        elif isinstance(advice, Retain):
            self._pending.pop((Release, advice.owner), None)
        pending = self._pressing if isinstance(advice, Prefetch | Reprioritise) else self._pending
        key = type(advice), advice.owner
        pending.pop(key, None)
        pending[key] = advice
        if pending is self._pressing:
            self._urgent.set()
        if self._waiting <= MOST_PENDING:
            return 0
        (self._pending or self._pressing).popitem(last=False)
        return 1

    @property
    def _waiting(self) -> int:
        return len(self._pressing) + len(self._pending)

    async def run(self) -> None:
        """Send what there is, again and again."""
        while True:
            if self._waiting < MOST_AT_ONCE:
                await self._pause()
            endpoint = self._core.endpoints.get(self._worker)
            if endpoint is None or not endpoint.advised:
                self._pressing.clear()
                self._pending.clear()
                self._seen = -1  # the core has forgotten what it held
                await asyncio.sleep(PERIOD_SECONDS)
                continue
            if endpoint.incarnation != self._incarnation:
                self._incarnation, self._seen = endpoint.incarnation, -1
            if self._waiting or self._due():
                try:
                    await self._talk(endpoint)
                except Exception as error:  # whatever it was, the next message must be sent
                    self._core.failed_to_learn(error)

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._control.period):
                await self._urgent.wait()
        self._urgent.clear()

    def _due(self) -> bool:
        """Whether the engine may have something new to tell."""
        pause = 0.0 if self._core.in_flight[self._worker] else IDLE_SECONDS
        return self._core.now() - self._asked >= pause

    async def _talk(self, endpoint: Endpoint) -> None:
        most = min(MOST_AT_ONCE, self._waiting)
        batch = [(self._pressing or self._pending).popitem(last=False)[1] for _ in range(most)]
        now = self._asked = self._core.now()
        number = next(self._numbers)
        message: dict[str, Any] = {
            "protocol_version": VERSION,
            "message_id": f"{self._core.id}-{self._worker}-{number}"[-128:],
            "actions": actions(f"{number}.", batch, now),
        }
        if endpoint.abilities.get("residency"):
            message["residency"] = {"seen": self._seen}
        answer = await self._send(endpoint, message)
        counts = self._control.counts
        if answer is None:
            counts[self._worker, "unsent"] += len(batch)
            self._seen = -1
            return
        for status, number in answer.get("counts", {}).items():
            counts[self._worker, status] += number
        self._control.gauges[self._worker] = answer.get("gauges", {})
        told = answer.get("residency")
        if told is None and "residency" in message:
            self._core.tell(ResidencyChanged(self._worker, None))  # our part of the engine is off
        self._learn(told)

    async def _send(self, endpoint: Endpoint, message: dict[str, Any]) -> dict[str, Any] | None:
        try:
            headers = {"content-type": "application/json", **bearer(endpoint.api_key)}
            async with self._client.post(
                endpoint.url + PATH, data=json.encode(message), headers=headers, timeout=TIMEOUT
            ) as answer:
                found = await answer.json(content_type=None) if answer.status == 200 else None
        except (*LOST, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _learn(self, told: Any) -> None:
        """Pass on what has changed; after a gap all is asked for."""
        if not isinstance(told, dict):
            return
        if told["full"] or told["number"] == self._seen + 1:
            self._seen = told["number"]
            if told["owners"] or told["full"]:
                self._core.tell(ResidencyChanged(self._worker, told["owners"], told["full"]))
        else:
            self._seen = -1
