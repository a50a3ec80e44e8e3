"""A fake vLLM server that costs next to nothing: what is measured in front of it is the proxy.

    python -m bench.upstream --host 127.0.0.1 --port 8101

The request body says how to answer: `"vllm_xargs": {"chunks": N, "delay": S}` gives N tokens, S seconds apart.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any, cast

import uvloop

MODEL = "fake"
DEFAULT_CHUNKS = 8
BACKLOG = 4096

_ID = "chatcmpl-0123456789abcdef0123456789abcdef"
_CREATED = 1_790_000_000
_CARD = {
    "id": MODEL,
    "object": "model",
    "created": _CREATED,
    "owned_by": "vllm",
    "root": MODEL,
    "parent": None,
    "max_model_len": 131072,
}
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_TRUE = re.compile(rb"\s*:\s*true")
_CHUNKS = re.compile(rb'"chunks"\s*:\s*(\d+)')
_DELAY = re.compile(rb'"delay"\s*:\s*(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)')
_XARGS_BYTES = 256
"""How far behind the name `vllm_xargs` its values are looked for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to answer a completion: `chunks` tokens, `delay` seconds apart. `prompt` counts the prompt's tokens."""

    chunks: int
    delay: float
    stream: bool
    usage: bool
    prompt: int

    @classmethod
    def read(cls, body: bytes) -> Plan:
        """Find the plan by the names of its fields: none can occur in a JSON string, where quotes are escaped."""
        at = body.rfind(b'"vllm_xargs"')
        xargs = body[at : at + _XARGS_BYTES] if at >= 0 else b""
        chunks, delay = _CHUNKS.search(xargs), _DELAY.search(xargs)
        return cls(
            chunks=max(1, int(chunks[1])) if chunks else DEFAULT_CHUNKS,
            delay=float(delay[1]) if delay else 0.0,
            stream=_is_true(body, b'"stream"'),
            usage=_is_true(body, b'"include_usage"'),
            prompt=len(body) // 4,
        )


def _is_true(body: bytes, name: bytes) -> bool:
    # The last one counts: a proxy may add the field behind the client's own.
    at = body.rfind(name)
    return at >= 0 and _TRUE.match(body, at + len(name)) is not None


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    """One SSE event in one HTTP chunk."""
    chunk = {"id": _ID, "object": "chat.completion.chunk", "created": _CREATED, "model": MODEL, "choices": choices}
    return _framed(b"data: " + _compact(chunk | more) + b"\n\n")


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _choice(delta: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]


def _response(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (status, kind, len(body))
    return head + body


def _error(status: int, reason: str) -> bytes:
    fault = {"message": reason, "type": "invalid_request_error", "param": None, "code": status}
    return _response(_compact({"error": fault}), f"{status} {reason}".encode())


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    + _event(_choice({"role": "assistant", "content": ""}))
)
_TOKEN = _event(_choice({"content": " token"}))
_FINISH = _event(_choice({}, "stop"))
_DONE = _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_NOT_FOUND = _error(404, "Not Found")
_FIXED = {
    b"GET /health": _response(b"", kind=b"text/plain"),
    b"GET /v1/models": _response(_compact({"object": "list", "data": [_CARD]})),
    b"GET /version": _response(_compact({"version": "0.32.0"})),
}
_CHAT = b"POST /v1/chat/completions"
_METRICS = b"GET /metrics"


def _usage(plan: Plan) -> dict[str, int]:
    return {
        "prompt_tokens": plan.prompt,
        "total_tokens": plan.prompt + plan.chunks,
        "completion_tokens": plan.chunks,
    }


def _stream_end(plan: Plan) -> bytes:
    return _FINISH + (_event([], usage=_usage(plan)) if plan.usage else b"") + _DONE


def _whole(plan: Plan) -> bytes:
    message = {"role": "assistant", "content": " token" * plan.chunks}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    answer = {"id": _ID, "object": "chat.completion", "created": _CREATED, "model": MODEL}
    return _response(_compact({**answer, "choices": [choice], "usage": _usage(plan)}))


@dataclass(slots=True)
class Load:
    """What `/metrics` tells of a server."""

    running: int = 0

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return (
            b'vllm:cache_config_info{block_size="16",num_gpu_blocks="1001"} 1.0\n'
            b'vllm:num_requests_running{engine="0",model_name="%b"} %d.0\n' % (MODEL.encode(), self.running)
        )


class Connection(asyncio.Protocol):
    """One keep-alive connection. Requests are answered one after the other."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._buffer = bytearray()
        self._body_at = self._end = 0  # of the request that is being received; 0 until its head is here
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop: the client has left, so the answer stops as vLLM's would."""
        if self._timer:
            self._timer.cancel()
        if self._busy:
            self._release()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._buffer += data
        self._advance()

    def _advance(self) -> None:
        while not self._busy and self._complete():
            line = bytes(self._buffer[: self._buffer.find(b" HTTP/1.")]).partition(b"?")[0]
            body = bytes(self._buffer[self._body_at : self._end])
            del self._buffer[: self._end]
            self._body_at = self._end = 0
            self._answer(line, body)

    def _complete(self) -> bool:
        """Whether a whole request is in the buffer."""
        if not self._end:
            at = self._buffer.find(b"\r\n\r\n")
            if at < 0:
                return False
            head = bytes(self._buffer[:at]).lower()
            if b"\r\ntransfer-encoding:" in head:
                self._transport.write(_error(411, "Length Required"))
                self._transport.close()
                return False
            if b"\r\nexpect: 100-continue" in head:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = _LENGTH.search(head)
            self._body_at = at + 4
            self._end = self._body_at + (int(length[1]) if length else 0)
        return len(self._buffer) >= self._end

    def _answer(self, line: bytes, body: bytes) -> None:
        if line == _CHAT:
            self._complete_chat(Plan.read(body))
        elif line == _METRICS:
            self._transport.write(_response(self._load.text(), kind=b"text/plain; version=0.0.4"))
        else:
            self._transport.write(_FIXED.get(line, _NOT_FOUND))

    def _complete_chat(self, plan: Plan) -> None:
        self._busy = True
        self._load.running += 1
        self._began = asyncio.get_running_loop().time()
        if not plan.stream:
            self._later(plan.delay * (plan.chunks - 1), plan, plan.chunks)
        elif plan.delay:
            self._transport.write(_STREAM_HEAD)
            self._next(plan, 0)
        else:
            self._finish(_STREAM_HEAD + _TOKEN * plan.chunks + _stream_end(plan))

    def _later(self, seconds: float, plan: Plan, sent: int) -> None:
        # Counted from the beginning: a late timer does not lower the load that is offered.
        self._timer = asyncio.get_running_loop().call_at(self._began + seconds, self._next, plan, sent)

    def _next(self, plan: Plan, sent: int) -> None:
        if not plan.stream:
            self._finish(_whole(plan))
        elif sent + 1 < plan.chunks:
            self._transport.write(_TOKEN)
            self._later(plan.delay * (sent + 1), plan, sent + 1)
        else:
            self._finish(_TOKEN + _stream_end(plan))

    def _finish(self, rest: bytes) -> None:
        self._transport.write(rest)
        self._release()
        self._advance()

    def _release(self) -> None:
        self._busy = False
        self._timer = None
        self._load.running -= 1


async def start(host: str, port: int) -> asyncio.Server:
    """Listen on `host`:`port` (0: any free one) in the running event loop."""
    load = Load()
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(load), host, port, backlog=BACKLOG, reuse_address=True)


async def _serve(host: str, port: int) -> None:
    server = await start(host, port)
    await server.serve_forever()


def main() -> None:
    """Serve until ended by a signal."""
    parser = argparse.ArgumentParser(prog="bench.upstream", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(arguments.host, arguments.port))


if __name__ == "__main__":
    main()
