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
    """Where one life of a worker's server is reached."""

    url: str
    api_key: str | None
    incarnation: str


class Fleet(Protocol):
    """Names its workers and says where each is now."""

    async def watch(self, core: Core, client: aiohttp.ClientSession) -> None:
        """Report workers to the core until cancelled."""
        ...


class Attached:
    """vLLM servers that somebody else runs."""

    def __init__(self, urls: tuple[str, ...], api_key: str | None) -> None:
        self._urls: Mapping[str, str] = {f"w{index}": url for index, url in enumerate(urls)}
        self._api_key = api_key

    async def watch(self, core: Core, client: aiohttp.ClientSession) -> None:
        """Report the servers to the core until cancelled."""
        await follow_all(self, tuple(self._urls), core, client)

    async def locate(self, worker: str) -> Location | None:
        """The server's address. Its restarts are seen only as an outage: the incarnation is then counted up."""
        return Location(self._urls[worker], self._api_key, "")


class Locator(Protocol):
    """Finds a worker's server."""

    async def locate(self, worker: str) -> Location | None:
        """The server's address, or None while it cannot serve."""
        ...


async def follow_all(fleet: Locator, workers: tuple[str, ...], core: Core, client: aiohttp.ClientSession) -> None:
    """Follow each worker until cancelled. All are declared first: a model not seen yet may be one of theirs."""
    for worker in workers:
        core.worker_down(worker)
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(_follow(fleet, worker, core, client))


async def _follow(fleet: Locator, worker: str, core: Core, client: aiohttp.ClientSession) -> None:
    outages = polls = silent = 0
    while True:
        try:
            endpoint = core.endpoints.get(worker)
            if endpoint is None or polls % REFRESH_POLLS == 0:
                await _refresh(fleet, worker, core, client, outages)
            elif (well := await alive(client, endpoint)) is not True:
                silent += 1
                if well is False or silent >= SILENT_POLLS:
                    log.warning("worker down", worker=worker)
                    core.worker_down(worker)
                    outages += 1
            else:
                silent = 0
        except Exception:  # whatever it was, the worker must be looked at again
            log.exception("watching a worker failed", worker=worker)
        polls += 1
        await asyncio.sleep(POLL_SECONDS)


async def _refresh(fleet: Locator, worker: str, core: Core, client: aiohttp.ClientSession, outages: int) -> None:
    """Learn where the worker is and what it serves; tell the core where that is news."""
    location = await fleet.locate(worker)
    described = await describe(client, location.url, location.api_key) if location else None
    if location is None or described is None:
        return
    incarnation = location.incarnation or str(outages)
    endpoint = Endpoint(
        worker, location.url, described.cards, location.api_key, incarnation, described.version
    )  # fmt: skip
    known = core.endpoints.get(worker)
    if known is None or (known.models, known.incarnation) != (endpoint.models, incarnation):
        log.info("worker up", worker=worker, models=endpoint.models, kv_tokens=described.kv_tokens)
        core.worker_up(endpoint, described.pool, described.kv_tokens)
