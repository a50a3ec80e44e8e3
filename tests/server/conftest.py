"""Weft as users meet it, on a real port, in front of fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
import uvicorn
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from server import fleet
from server.app import build
from server.auth import Keys
from server.core import Core
from server.fleet import Attached
from server.trace import Trace
from tests.fake_worker import FakeWorker

URL = "/v1/chat/completions"


@dataclass
class Weft:
    """A running front end."""

    core: Core
    url: str
    http: aiohttp.ClientSession
    workers: list[FakeWorker]
    sdks: list[AsyncOpenAI | AsyncAnthropic] = field(default_factory=list)

    def chat(self, told: dict | None = None, headers: dict | None = None, path: str = URL, **fields: object):
        """POST a chat call; `told` is for the fake worker."""
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "fake": told or {}, **fields}
        return self.http.post(self.url + path, json=body, headers=headers)

    def openai(self, key: str = "none", retries: int = 0) -> AsyncOpenAI:
        """The OpenAI SDK's client, closed when the test is over."""
        self.sdks.append(made := AsyncOpenAI(base_url=self.url + "/v1", api_key=key, max_retries=retries))
        return made

    def anthropic(self, key: str = "none", retries: int = 0) -> AsyncAnthropic:
        """The Anthropic SDK's client, closed when the test is over."""
        self.sdks.append(made := AsyncAnthropic(base_url=self.url, auth_token=key, max_retries=retries))
        return made

    async def hang_up(self) -> None:
        """Close the SDKs' clients."""
        for client in self.sdks:
            await client.close()

    async def idle(self, seconds: float = 10.0) -> None:
        """Wait until nothing is counted as running, anywhere."""
        async with asyncio.timeout(seconds):
            while self.core.attempts or any(worker.running for worker in self.workers):
                await asyncio.sleep(0.01)
        self.core.scheduler.check()
        assert not self.core.scheduler.running
        assert not any(self.core.in_flight.values())


Start = Callable[..., Awaitable[Weft]]


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Start a front end over some fake workers."""
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.05)
    async with AsyncExitStack() as stack:

        async def begin(
            *workers: FakeWorker, keys: Path | None = None, trace: Trace | None = None, api_key: str | None = None
        ) -> Weft:
            fakes = list(workers) or [FakeWorker(), FakeWorker()]
            for fake in fakes:
                await fake.start()
                stack.push_async_callback(fake.stop)
            core = Core()
            app = build(core, Keys.read(keys), Attached(tuple(f.url for f in fakes), api_key), trace)
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
            serving = asyncio.create_task(server.serve())

            async def end() -> None:
                server.should_exit = True
                await serving

            stack.push_async_callback(end)
            async with asyncio.timeout(10):
                while not server.started or len(core.endpoints) < len(fakes):
                    await asyncio.sleep(0.01)
            http = await stack.enter_async_context(aiohttp.ClientSession())
            port = server.servers[0].sockets[0].getsockname()[1]
            weft = Weft(core, f"http://127.0.0.1:{port}", http, fakes)
            stack.push_async_callback(weft.hang_up)
            return weft

        yield begin


@pytest.fixture
async def weft(start: Start) -> Weft:
    """A front end over two workers of one model."""
    return await start()
