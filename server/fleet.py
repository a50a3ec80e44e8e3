"""The workers as processes somewhere: finds them, and keeps the core's view of each true."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import structlog

from server.core import Core, Endpoint
from server.probe import alive, describe

log = structlog.get_logger("weft")

POLL_SECONDS = 1.0
REFRESH_POLLS = 30  # adapters come and go
SILENT_POLLS = 3  # a busy server may miss a probe


@dataclass(frozen=True, slots=True)
class Location:
    """Where one life of a worker's server is reached; `note`: what an operator should know of how it was started."""

    url: str
    api_key: str | None
    incarnation: str
    note: str = ""


class Fleet(Protocol):
    """Names its workers and says where each is now."""

    states: dict[str, str]
    """Each worker's state, for people."""
    failed: dict[str, str]
    """The workers that cannot start, and why."""

    async def locate(self, worker: str) -> Location | None:
        """The address of the worker's server, or None while it cannot serve."""
        ...


class Attached:
    """vLLM servers that somebody else runs."""

    def __init__(self, urls: tuple[str, ...], api_key: str | None) -> None:
        self._urls: Mapping[str, str] = {f"w{index}": url for index, url in enumerate(urls)}
        self._api_key = api_key
        self.states = dict.fromkeys(self._urls, "asked")
        self.failed: dict[str, str] = {}

    async def locate(self, worker: str) -> Location | None:
        """The server's address. Its restarts are seen only as an outage: the incarnation is then counted up."""
        return Location(self._urls[worker], self._api_key, "")


async def follow(fleet: Fleet, core: Core, client: aiohttp.ClientSession) -> None:
    """Keep the core's view of the workers true until cancelled.

    All are declared first: a model not seen yet may be one of theirs.
    """
    for worker in fleet.states:
        core.worker_down(worker)
    async with asyncio.TaskGroup() as group:
        for worker in fleet.states:
            group.create_task(_Follower(fleet, worker, core, client).run())


class _Follower:
    """Looks at one worker, again and again."""

    def __init__(self, fleet: Fleet, worker: str, core: Core, client: aiohttp.ClientSession) -> None:
        self.fleet, self.worker, self.core, self.client = fleet, worker, core, client
        self.outages = self.silent = 0
        self.said = ""

    async def run(self) -> None:
        polls = 0
        while True:
            try:
                endpoint = self.core.endpoints.get(self.worker)
                if endpoint is None or polls % REFRESH_POLLS == 0:
                    await self._refresh()
                else:
                    await self._check(endpoint)
            except Exception:  # whatever it was, the worker must be looked at again
                log.exception("watching a worker failed", worker=self.worker)
            polls += 1
            await asyncio.sleep(POLL_SECONDS)

    async def _check(self, endpoint: Endpoint) -> None:
        well = await alive(self.client, endpoint)
        self.silent = self.silent + 1 if well is None else 0
        if well is False or self.silent >= SILENT_POLLS:
            log.warning("worker down", worker=self.worker)
            self.core.worker_down(self.worker)
            self.outages += 1
            self.silent = 0

    async def _refresh(self) -> None:
        """Learn where the worker is and what it serves; tell the core where that is news."""
        location = await self.fleet.locate(self.worker)
        if location is None:
            if reason := self.fleet.failed.get(self.worker):
                self._say("worker cannot start", reason)
                self.core.worker_down(self.worker, failed=True)
            return
        described = await describe(self.client, location.url, location.api_key)
        if isinstance(described, str):
            self._say("worker does not answer as vLLM does", described)
            return
        self.said = ""
        incarnation = location.incarnation or str(self.outages)
        cards, version = described.cards, described.version
        abilities = described.abilities
        if abilities and location.note:
            abilities = {**abilities, "why": [*abilities.get("why", ()), location.note]}
        endpoint = Endpoint(self.worker, location.url, cards, location.api_key, incarnation, version, abilities)
        known = self.core.endpoints.get(self.worker)
        if known is None or _news(known) != _news(endpoint):
            if reasons := abilities.get("why"):
                log.warning("the engine does as stock vLLM where it must", worker=self.worker, why=reasons)
            log.info("worker up", worker=self.worker, models=endpoint.models, kv_tokens=described.kv_tokens)
            self.core.worker_up(endpoint, described.pool, described.kv_tokens)

    def _say(self, event: str, reason: str) -> None:
        """Log what is wrong, once."""
        if reason != self.said:
            self.said = reason
            log.warning(event, worker=self.worker, reason=reason[-1000:])


def _news(endpoint: Endpoint) -> tuple[object, ...]:
    return endpoint.models, endpoint.incarnation, endpoint.abilities
