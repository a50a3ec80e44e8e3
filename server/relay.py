"""Relays one step: to its worker over HTTP and back, bytes untouched, cancelled when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

import aiohttp
import orjson
import structlog
from starlette.responses import Response

from scheduler.actions import Dispatch, Hold, Reject
from server import errors, sse
from server.call import Call, owned_body, owned_headers
from server.core import Attempt, Core, Endpoint, bearer
from server.dialects import split
from server.errors import ApiError

log = structlog.get_logger("weft")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

CONNECT_SECONDS = 5.0
STALL_SECONDS = 900.0  # a worker that sends nothing for so long
KEEP_ALIVE_SECONDS = 15.0
SLOW_READER_SECONDS = 60.0
WATCH_SECONDS = 5.0
INFINITY = float("inf")
LOST = (aiohttp.ClientError, ConnectionError, TimeoutError)

_NOT_RELAYED = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "te", "trailer", "transfer-encoding", "upgrade",
    "content-length", "server", "date", "x-request-id",
})  # fmt: skip


def upstream_client() -> aiohttp.ClientSession:
    """The HTTP client for workers. vLLM closes idle connections after 5 s; we must be first."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS),
        auto_decompress=False,
        skip_auto_headers=("user-agent",),
    )


class WorkerLost(Exception):
    """The worker broke off, or cannot be reached."""


class Exchange(Response):
    """The answer to one step, as an ASGI response that schedules, relays, retries and gives everything back."""

    def __init__(self, call: Call, core: Core, client: aiohttp.ClientSession, pinned: str | None = None) -> None:
        self.call, self.core, self.client, self.pinned = call, core, client, pinned
        self.started = False  # the client has status and headers
        self.began = False  # the worker's answer has begun: no retry
        self.gone = False  # the client has left, or reads nothing
        self.done = False  # the client has everything
        self.cut_off: str | None = None
        self.sending_since: float | None = None
        self.clock = asyncio.get_running_loop().time
        self.last_sent = self.opened = self.clock()
        self.background = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve the step; every counter it raised is given back in the one `finally`."""
        self.send = send
        task = asyncio.current_task()
        assert task is not None
        self.attempt, action = self.core.arrive(self.call, self.pinned)
        guard = asyncio.create_task(self._guard(receive, task))
        state = "failed"
        try:
            state = await self._serve(action)
        except asyncio.CancelledError:
            state = "finished" if self.call.dialect.stop else "cancelled"  # some leave before the stream's own end
            if not self.gone:
                raise
            task.uncancel()
        finally:
            guard.cancel()
            self.core.end(self.attempt, state)

    async def _serve(self, action: Dispatch | Hold | Reject | None) -> str:
        """Wait at the gate, try workers until one has answered; return how it ended."""
        if isinstance(action, Hold):
            action = await self._held(action)
        while isinstance(action, Dispatch):
            try:
                return await self._attempt(self.attempt, action)
            except WorkerLost as lost:
                reason = str(lost)
                log.warning("worker lost a step", worker=action.decision.worker, step=self.call.id, reason=reason)
                action = self.core.failed(self.attempt, reason, retryable=not self.began)
                if action is None:
                    await self._fail(ApiError(502, f"The worker failed while it answered: {reason}"))
        if isinstance(action, Reject):
            await self._fail(ApiError(action.status, action.reason, retry_after=action.retry_after))
        return "rejected" if isinstance(action, Reject) else "failed"

    async def _held(self, hold: Hold) -> Dispatch | Reject:
        """Wait until the step may go. A client that has its headers already learns in a comment where it went."""
        patience = INFINITY if self.call.stream else self.core.hold_unary_seconds
        action = await self.core.admitted(self.attempt, hold, patience)
        if self.started and isinstance(action, Dispatch):
            said = "".join(f": {name}: {value}\n" for name, value in self._own_headers().items())
            await self._write(said.encode("utf-8", "replace") + b"\n")
        return action

    async def _attempt(self, attempt: Attempt, action: Dispatch) -> str:
        endpoint = self.core.endpoints.get(action.decision.worker)
        if endpoint is None:
            raise WorkerLost("the worker is down")
        priority = action.priority if endpoint.orders else 0
        headers = owned_headers(self.call, action.owner, priority) | bearer(endpoint.api_key)
        url = endpoint.url + self.call.path
        body = self.call.body if endpoint.reads_session_header else owned_body(self.call, action.owner)
        try:
            async with asyncio.timeout(None) as limit:
                attempt.cut = partial(self._cut, limit)
                async with self.client.post(url, data=body, headers=headers) as upstream:
                    attempt.status = upstream.status
                    if upstream.content_type == "text/event-stream":
                        return await self._stream(upstream, endpoint)
                    return await self._whole(upstream, endpoint)
        except aiohttp.SocketTimeoutError:
            if self.call.stream and not self.began:
                raise WorkerLost(f"silent for {STALL_SECONDS:g} s") from None
            self.core.failed(attempt, "stalled", retryable=False)
            await self._fail(ApiError(504, f"The worker sent nothing for {STALL_SECONDS:g} s."))
            return "failed"
        except LOST as error:
            raise WorkerLost(self.cut_off or str(error) or type(error).__name__) from None

    def _cut(self, limit: asyncio.Timeout, reason: str) -> None:
        self.cut_off = reason
        if not limit.expired():
            limit.reschedule(0)

    async def _stream(self, upstream: aiohttp.ClientResponse, endpoint: Endpoint) -> str:
        dialect = self.call.dialect
        async for block in sse.blocks(upstream.content):
            try:
                kept = dialect.feed(block)
            except Exception as error:
                kept = block
                self.core.failed_to_learn(error)
            if not self.began:
                if dialect.error and not await self._healthy(endpoint):  # the engine's last word, not an answer
                    reason = dialect.error
                    dialect.forget()
                    raise WorkerLost(reason)
                self.began = any(not event.startswith(b":") for event in split(block))
            if dialect.prefilled and self.attempt.first_token is None:
                self.core.first_token(self.attempt)
            if kept:
                if not self.started:
                    await self._start(upstream.status, relayed(upstream))
                await self._write(kept)
        if not self.started:
            await self._start(upstream.status, relayed(upstream))
        await self._write(b"", more=False)
        return "failed" if dialect.error else "finished"

    async def _whole(self, upstream: aiohttp.ClientResponse, endpoint: Endpoint) -> str:
        """An answer in one piece, or the worker's own error, unmodified."""
        if upstream.status >= 500 and not await self._healthy(endpoint):
            raise WorkerLost(f"the worker answered {upstream.status} and is not healthy")
        self.began = True
        body = await upstream.read()
        ok = upstream.status < 400
        if ok:
            with self.core.counting():
                self._learn(body)
        if self.started:  # a stream that was kept alive before the worker refused it
            ok, status = False, 502 if ok else upstream.status
            await self._fail(ApiError(status, "The worker did not stream." if status == 502 else _message(body)))
        else:
            await self._start(upstream.status, relayed(upstream), len(body))
            await self._write(body, more=False)
        return "finished" if ok else "failed"

    def _learn(self, body: bytes) -> None:
        self.core.first_token(self.attempt)
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return
        if isinstance(answer, dict):
            self.call.dialect.read_whole(answer)

    async def _healthy(self, endpoint: Endpoint) -> bool:
        """Whether a worker that answered with a server error still lives."""
        try:
            async with self.client.get(endpoint.url + "/health", timeout=aiohttp.ClientTimeout(total=2)) as health:
                return health.status == 200
        except LOST:
            return False

    async def _fail(self, error: ApiError) -> None:
        """Tell the client in the API's own shape: as the response, or in the stream that has begun."""
        dialect = self.call.dialect
        if self.started:
            await self._write(dialect.error_event(error.status, error.message), more=False)
            return
        self.started = self.done = True
        self.attempt.status = error.status
        refusal = errors.response(error, anthropic=dialect.anthropic, headers=self._own_headers())
        await refusal({"type": "http"}, _never, self.send)

    async def _start(self, status: int, headers: dict[str, str], length: int | None = None) -> None:
        self.started = True
        self.attempt.status = status
        headers |= self._own_headers()
        if length is not None:
            headers["content-length"] = str(length)
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, data: bytes, more: bool = True) -> None:
        self.sending_since = self.last_sent = self.clock()
        await self.send({"type": "http.response.body", "body": data, "more_body": more})
        self.sending_since, self.done = None, self.done or not more

    def _own_headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.call.request_id}
        if dispatch := self.attempt.dispatch:
            headers["x-weft-workflow"] = dispatch.workflow
            headers["x-weft-session"] = dispatch.session
            headers["x-weft-worker"] = dispatch.decision.worker
            headers["x-weft-decision"] = str(dispatch.decision)
        elif hold := self.attempt.hold:
            headers |= {"x-weft-workflow": hold.workflow, "x-weft-session": hold.session}
            headers["x-weft-decision"] = f"held: {hold.reason}"
        return headers

    async def _guard(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        """Watch the client: end the task when it leaves or reads nothing, keep its stream alive in silence."""
        while True:
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    message = await receive()
            except TimeoutError:
                if self.sending_since is None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(SLOW_READER_SECONDS):
                            await self._keep_alive(self.clock())
                if self.sending_since is None or self.clock() - self.sending_since < SLOW_READER_SECONDS:
                    continue
                log.warning("cut off a client that reads nothing", step=self.call.id)
                break
            if message["type"] == "http.disconnect":
                break
        if self.done:
            return
        self.gone = True
        task.cancel()

    async def _keep_alive(self, now: float) -> None:
        """Between two events only: events are relayed whole, and nothing is being sent."""
        if not self.call.stream or self.attempt.finished is not None:
            return
        if not self.started and now - self.opened >= self.core.hold_commit_seconds:
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
            await self._write(self.call.dialect.ping)
        elif self.started and now - self.last_sent >= KEEP_ALIVE_SECONDS:
            await self._write(self.call.dialect.ping)


async def _never() -> Message:
    raise RuntimeError("a refusal reads nothing")


def relayed(upstream: aiohttp.ClientResponse) -> dict[str, str]:
    """The worker's headers that go on to the client."""
    return {name: value for n, value in upstream.headers.items() if (name := n.lower()) not in _NOT_RELAYED}


def _message(body: bytes) -> str:
    """The text of a worker's error body."""
    try:
        error = orjson.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:1000]
