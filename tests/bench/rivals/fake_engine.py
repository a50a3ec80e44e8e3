"""A vLLM server whose tokens are words and whose prefix cache has no limit. No engine, real HTTP."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from bench.rivals.costs import Costs
from bench.rivals.engines import Build
from kvcache.plugin.control import stock
from server.engine import free_port

MODEL = "fake"
BLOCK = 4
KV_TOKENS = 400
ANSWER = "assistant"
COSTS = Costs(0.01, 0.1, 0.01, 0.2, 0.01, 0.001, 1e-6)


@dataclass
class FakeEngine:
    """`seconds` pass before the first token; calls whose prompt contains `poison` fail."""

    seconds: float = 0.0
    poison: str = "poison"
    silent: str = "silent"
    received: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    cache: set[tuple[str, ...]] = field(default_factory=set)
    flying: int = 0
    most: int = 0
    resets: int = 0
    plugin: bool = False
    advice: list[dict[str, Any]] = field(default_factory=list)

    async def start(self) -> FakeEngine:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._well)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/reset_prefix_cache", self._reset)
        app.router.add_post("/weft/control", self._control)
        app.router.add_post("/v1/chat/completions", self._chat)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        port = free_port("127.0.0.1")
        await web.TCPSite(self.runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def stop(self) -> None:
        await self.runner.cleanup()

    @property
    def sessions(self) -> list[str]:
        """The session of each call, in the order they came."""
        return [headers.get("x-session-id", "") for headers, _ in self.received]

    async def _well(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "parent": None}]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _metrics(self, request: web.Request) -> web.Response:
        blocks = KV_TOKENS // BLOCK + 1
        return web.Response(
            text=f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="{blocks}"}} 1.0\n'
            f'vllm:prompt_tokens_total{{engine="0"}} {len(self.received)}.0\n'
        )

    async def _reset(self, request: web.Request) -> web.Response:
        self.resets += 1
        self.cache.clear()
        return web.Response()

    async def _tokenize(self, request: web.Request) -> web.Response:
        fields = await request.json()
        return web.json_response({"count": len(words(fields["messages"], fields.get("add_generation_prompt", True)))})

    async def _control(self, request: web.Request) -> web.Response:
        if not self.plugin:
            return web.Response(status=404)
        message = await request.json()
        if "ask" in message:
            return web.json_response({"plugin": True, "control": True, "eviction": True})
        self.advice += message["actions"]
        return web.json_response(stock(message))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        fields = await request.json()
        self.received.append(({name.lower(): value for name, value in request.headers.items()}, fields))
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            return await self._answer(request, fields)
        except ConnectionResetError:  # the client has left
            return web.Response()
        finally:
            self.flying -= 1

    async def _answer(self, request: web.Request, fields: dict[str, Any]) -> web.StreamResponse:
        prompt = words(fields["messages"])
        if self.poison in prompt:
            return web.json_response({"error": {"message": "poisoned"}}, status=500)
        blocks = [tuple(prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK)]
        cached = next((n for n, block in enumerate(blocks) if block not in self.cache), len(blocks)) * BLOCK
        cached = min(cached, (len(prompt) - 1) // BLOCK * BLOCK)
        self.cache.update(blocks)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]))
        await asyncio.sleep(60 if self.silent in prompt else self.seconds)
        for _ in range(fields["max_tokens"]):
            await response.write(event(choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": None}]))
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": fields["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        await response.write(event(choices=[], usage=usage) + b"data: [DONE]\n\n")
        return response


def words(messages: list[dict[str, str]], answer: bool = True) -> list[str]:
    """The tokens of a prompt: each message's speaker and words, and what starts the answer."""
    tokens = [token for message in messages for token in (message["role"], *message["content"].split())]
    return [*tokens, ANSWER] if answer else tokens


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"id": "c", **fields}).encode() + b"\n\n"


@dataclass
class FakeEngines:
    """What a front and a player need of `bench.rivals.engines.Engines`."""

    engines: list[FakeEngine]
    http: Any
    model: str = MODEL
    block: int = BLOCK
    max_len: int = 100_000
    kv_tokens: int = KV_TOKENS
    asked: int = KV_TOKENS
    costs: Costs | None = None
    limits: tuple[int, int] = (1024, 16)
    key: str = "inner"
    pids: Sequence[int] = (os.getpid(),)

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    @property
    def count(self) -> int:
        return len(self.engines)

    async def fit(self, build: Build) -> None:
        self.kv_tokens = build.kv_tokens
        for engine in self.engines:
            engine.plugin = build.policy is not None

    async def reset(self) -> None:
        for engine in self.engines:
            async with self.http.post(engine.url + "/reset_prefix_cache") as answer:
                assert answer.status == 200

    def about(self) -> dict[str, Any]:
        return {"model": self.model}

    async def counters(self) -> dict[str, float]:
        return {"prompt_tokens": float(sum(len(engine.received) for engine in self.engines))}
