"""A vLLM server that does as it is told: real HTTP, no engine. Not for speed (`bench.upstream` is)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

COMMENT = b": thinking\n\n"


@dataclass
class Received:
    """One request as the worker saw it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> Any:
        return json.loads(self.body)


@dataclass
class FakeWorker:
    """Answers by the `fake` object in a request's body: {chunks, delay, silence, die_after, status, comment,
    prompt_tokens}."""

    model: str = "m"
    api_key: str | None = None
    adapters: tuple[str, ...] = ()
    received: list[Received] = field(default_factory=list)
    stored: dict[str, Any] = field(default_factory=dict)
    running: int = 0
    cancelled: int = 0
    healthy: bool = True
    hung: bool = False
    version: str = "0.32.0"
    blocks: int = 101
    url: str = ""
    plugin: Callable[[Any], dict[str, Any]] | None = None
    speak: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: {"role": "assistant", "content": "hello"}

    async def start(self, port: int = 0) -> FakeWorker:
        """Listen on loopback."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/responses/{id}", self._stored)
        app.router.add_post("/weft/control", self._control)
        app.router.add_post("/{path:.*}", self._post)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def stop(self) -> None:
        """Close everything, as a process that was killed."""
        await self.runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        if self.hung:
            await asyncio.sleep(60)
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        if self.hung:
            await asyncio.sleep(60)
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        cards = [{"id": self.model, "object": "model", "parent": None, "max_model_len": 100}]
        cards += [{"id": name, "object": "model", "parent": self.model} for name in self.adapters]
        return web.json_response({"object": "list", "data": cards})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{self.blocks}"}} 1.0\n')

    async def _stored(self, request: web.Request) -> web.Response:
        made = self.stored.get(request.match_info["id"])
        return web.json_response(made or {"error": {"message": "no"}}, status=200 if made else 404)

    async def _control(self, request: web.Request) -> web.Response:
        if self.plugin is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response(self.plugin(await request.json()))

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path, headers, body))
        try:
            fields = json.loads(body)
        except ValueError:
            return web.json_response({"raw": len(body)})
        told = fields.get("fake", {})
        self.running += 1
        try:
            return await self._answer(request, fields, told)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, fields: dict[str, Any], told: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(told.get("silence", 0))
        if told.get("die_after") == 0:
            request.transport.abort()  # type: ignore[union-attr]
        if "status" in told:
            error = {"error": {"message": "as told", "type": "BadRequestError", "param": None, "code": told["status"]}}
            return web.json_response(error, status=told["status"], headers={"x-should-retry": "false"})
        if request.path == "/v1/responses":
            return self._response(fields)
        if not fields.get("stream"):
            message = {"message": self.speak(fields), "finish_reason": "stop"}
            return web.json_response({"id": "c", "choices": [message], "usage": usage(told)})
        return await self._stream(request, fields, told)

    def _response(self, fields: dict[str, Any]) -> web.Response:
        made = {"id": f"resp_{len(self.stored)}_{self.port}", "status": "completed", "output": []}
        self.stored[str(made["id"])] = made
        return web.json_response({**made, "usage": {"input_tokens": 7, "output_tokens": 2}})

    async def _stream(self, request: web.Request, fields: dict[str, Any], told: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", "x-from": "fake"})
        await response.prepare(request)
        await asyncio.sleep(told.get("pause", 0))
        events = chat_events(
            told.get("chunks", 3), (fields.get("stream_options") or {}).get("include_usage", False), told
        )
        for index, event in enumerate(events):
            if told.get("die_after") == index:
                request.transport.abort()  # type: ignore[union-attr]
                await asyncio.sleep(1)
            if told.get("comment") == index:
                await response.write(COMMENT)
            half = len(event) // 2  # events come in pieces
            await response.write(event[:half])
            await asyncio.sleep(0)
            await response.write(event[half:])
            await asyncio.sleep(told.get("delay", 0))
        return response


def usage(told: dict[str, Any] | None = None) -> dict[str, Any]:
    """What vLLM counts, with `--enable-prompt-tokens-details`; `prompt_tokens` as told, none of them cached then."""
    if told and "prompt_tokens" in told:
        tokens = told["prompt_tokens"]
        return {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": tokens + 3}
    return {
        "prompt_tokens": 20,
        "completion_tokens": 3,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


def chat_events(chunks: int, with_usage: bool, told: dict[str, Any] | None = None) -> list[bytes]:
    """A chat stream as vLLM writes it."""
    parts: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    for index in range(chunks):
        text = '"usage":{ "choices":[] data: [DONE]' if index == 1 else f"tok{index} é"
        parts.append({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
    parts.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if with_usage:
        parts.append({"choices": [], "usage": usage(told)})
    dumped = [json.dumps({"id": "chatcmpl-1", **part}, separators=(",", ":"), ensure_ascii=False) for part in parts]
    return [f"data: {text}\n\n".encode() for text in dumped] + [b"data: [DONE]\n\n"]
