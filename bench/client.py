"""A closed-loop load client for streamed chat completions. It prints one line of JSON: times in ms, rates per second.

    python -m bench.client --ports 8000 --concurrency 16 --streams 64 --chunks 50 --delay 0.02 --body-bytes 4096

Each slot is one session on one kept connection: it sends its next stream when the last one has ended. The window of
measurement opens when every slot has turned over once and closes when the supply ends; TTFT counts streams sent in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from bench.upstream import MODEL

TIMEOUT_SECONDS = 30.0
"""The longest a stream may take. A stream that fails counts as a TTFT of as much."""

_CONTENT = b'"delta":{"content":"'
_DONE = b"data: [DONE]\n\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_WORDS = 512
_WORD_CHARACTERS = 7


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: `streams` over `concurrency` slots, each of `chunks` tokens `delay` seconds apart."""

    host: str
    ports: tuple[int, ...]
    concurrency: int
    streams: int
    chunks: int
    delay: float
    body_bytes: int
    session: str
    seed: int

    def request(self, slot: int) -> bytes:
        """The slot's HTTP request: its own text, and a body of `body_bytes` bytes."""
        xargs = {"chunks": self.chunks, "delay": self.delay}
        fields: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": ""}], "stream": True}
        fields |= {"max_tokens": self.chunks, "vllm_xargs": xargs}
        empty = json.dumps(fields)
        fields["messages"][0]["content"] = _text(self.seed + slot, max(0, self.body_bytes - len(empty)))
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
            f"x-session-id: {self.session}-{slot}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def start_offset(self, slot: int) -> float:
        """Seconds that the slot waits before its first stream: slots are spread evenly over the length of one."""
        return self.chunks * self.delay * slot / self.concurrency


@dataclass(slots=True)
class Stream:
    """One answer as it came. Times are in seconds on the performance counter; `fault` says why it does not count."""

    sent: float
    first: float = 0.0
    ended: float = 0.0
    fault: str = "broken off"


@dataclass(slots=True)
class Record:
    """What all slots share: the supply, and what has been measured."""

    left: int
    turned: set[int] = field(default_factory=set)
    streams: list[Stream] = field(default_factory=list)
    opened: float = 0.0
    closed: float = 0.0

    def take(self) -> bool:
        """Whether there is another stream to send."""
        if self.left <= 0:
            return False
        self.left -= 1
        if self.left == 0:
            self.closed = time.perf_counter()
        return True


class Connection(asyncio.Protocol):
    """One kept connection. Bytes are only collected while a stream runs: they are read when it has ended."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._tail = b""
        self._stream: Stream | None = None
        self._ended: asyncio.Future[None] | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self.open = False
        self._end()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        stream = self._stream
        if stream is None:
            self.close()
            return
        self._parts.append(data)
        self._tail = data[-len(_LAST_CHUNK) :] if len(data) >= len(_LAST_CHUNK) else self._tail + data
        if not stream.first:
            now = time.perf_counter()
            status, body = self._read()
            if _CONTENT in body:
                stream.first = now
            elif status and status != 200:
                stream.fault = f"status {status}"
                self.close()  # its body may end in any way
        if self._tail.endswith(_LAST_CHUNK):
            self._end()

    async def run(self, request: bytes, chunks: int) -> Stream:
        """Send the request and wait for the end of its answer."""
        self._parts, self._tail = [], b""
        self._ended = asyncio.get_running_loop().create_future()
        self._stream = stream = Stream(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await self._ended
        except TimeoutError:
            stream.fault = "timeout"
            self.close()
        self._stream = None
        if self._tail.endswith(_LAST_CHUNK):
            stream.fault = self._check(chunks)
        return stream

    def close(self) -> None:
        """Give up the connection."""
        self.open = False
        self._transport.close()

    def _end(self) -> None:
        if self._stream and self._ended and not self._ended.done():
            self._stream.ended = time.perf_counter()
            self._ended.set_result(None)

    def _read(self) -> tuple[int, bytes]:
        """The status (0 until it is known) and the body so far, without the framing of HTTP chunks."""
        head, _, framed = b"".join(self._parts).partition(b"\r\n\r\n")
        status = int(head[9:12]) if len(head) >= 12 else 0
        # No event holds a CR: lines are sizes and data in turn.
        return status, b"".join(framed.split(b"\r\n")[1::2])

    def _check(self, chunks: int) -> str:
        status, body = self._read()
        if status != 200:
            return f"status {status}"
        if (found := body.count(_CONTENT)) != chunks:
            return f"{found} chunks of {chunks}"
        return "" if body.endswith(_DONE) else "no [DONE]"


async def drive(load: Load) -> dict[str, Any]:
    """Send the load and return what was measured. Connections are made before anything is timed."""
    record = Record(load.streams)
    made = [await _connect(load, slot) for slot in range(load.concurrency)]
    requests = [load.request(slot) for slot in range(load.concurrency)]
    began = time.perf_counter()
    await asyncio.gather(*(_slot(load, record, n, made[n], requests[n]) for n in range(load.concurrency)))
    return _summary(load, record, time.perf_counter() - began)


async def _connect(load: Load, slot: int) -> Connection:
    port = load.ports[slot % len(load.ports)]
    _, connection = await asyncio.get_running_loop().create_connection(Connection, load.host, port)
    return connection


async def _slot(load: Load, record: Record, slot: int, connection: Connection, request: bytes) -> None:
    await asyncio.sleep(load.start_offset(slot))
    while record.take():
        if not connection.open:
            connection = await _connect(load, slot)
        record.streams.append(await connection.run(request, load.chunks))
        record.turned.add(slot)
        if not record.opened and len(record.turned) == load.concurrency:
            record.opened = time.perf_counter()
    connection.close()


def _summary(load: Load, record: Record, seconds: float) -> dict[str, Any]:
    inside = [s for s in record.streams if s.sent >= record.opened]
    ttft = sorted(TIMEOUT_SECONDS if s.fault else s.first - s.sent for s in inside)
    ended = sum(1 for s in record.streams if not s.fault and record.opened < s.ended <= record.closed)
    window = record.closed - record.opened
    faults = Counter(s.fault for s in record.streams if s.fault)
    return {
        "streams": len(record.streams),
        "measured": len(ttft),
        "errors": faults.total(),
        "faults": dict(faults),
        "chunks": load.chunks * sum(1 for s in record.streams if not s.fault),
        "chunks_per_s": round(load.chunks * ended / window, 1) if window > 0 else None,
        "ttft_p50_ms": _ms(ttft, 0.50),
        "ttft_p99_ms": _ms(ttft, 0.99),
        "ttft_max_ms": _ms(ttft, 1.0),
        "seconds": round(seconds, 3),
        "window_seconds": round(window, 3),
        "client_cpu_seconds": round(time.process_time(), 3),
    }


def _ms(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile in ms; None where nothing was measured."""
    return round(1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3) if ordered else None


def _text(seed: int, length: int) -> str:
    """Random words of lower-case letters, `length` characters in all."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=_WORD_CHARACTERS)) for _ in range(_WORDS)]
    return " ".join(rng.choices(words, k=length // (_WORD_CHARACTERS + 1) + 1))[:length]


def main() -> None:
    """Run one load from the command line."""
    parser = argparse.ArgumentParser(prog="bench.client", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ports", required=True, help="comma-separated; slots take turns")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=50, help="tokens of a stream")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds between two tokens")
    parser.add_argument("--body-bytes", type=int, default=4096)
    parser.add_argument("--session", default="s", help="prefix of the slots' session ids")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    arguments["ports"] = tuple(int(port) for port in arguments["ports"].split(","))
    print(json.dumps(uvloop.run(drive(Load(**arguments)))))


if __name__ == "__main__":
    main()
