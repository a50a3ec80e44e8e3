"""One streamed chat completion, timed as a client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp
import orjson

CONTENT = ("content", "reasoning", "reasoning_content", "tool_calls")
ERROR_CHARACTERS = 300


@dataclass(slots=True)
class Exchange:
    """Fills as the answer comes, so that one that is cut off is known as far as it came. Times by `perf_counter`.

    `times`: of each generated chunk. The chunk with the role alone does not count; later ones do even when their
    tokens are no text. `text`: when the first came that is some. `error` is why it failed, None where it did not.
    """

    times: list[float] = field(default_factory=list)
    text: float | None = None
    ended: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    worker: str = ""
    error: str | None = None
    _chunks: int = 0

    async def send(self, http: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str]) -> None:
        """POST it and read the answer to its end. Never raises for what the server or the network did."""
        try:
            async with http.post(
                url + "/v1/chat/completions",
                data=body,
                headers={"content-type": "application/json", **headers},
            ) as answer:
                self.worker = answer.headers.get("x-weft-worker", "")
                if answer.status != 200:
                    self.error = f"{answer.status} {(await answer.text())[:ERROR_CHARACTERS]}"
                    return
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        self._event(line)
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as failure:
            self.error = repr(failure)[:ERROR_CHARACTERS]
        if self.error is None and not self.usage:
            self.error = "the stream ended early"
        self.ended = perf_counter()

    def _event(self, line: bytes) -> None:
        # In a JSON string the quotes would be escaped, so that these bytes are the fields themselves.
        if self.text is not None and b'"usage"' not in line and b'"error"' not in line:
            self.times.append(perf_counter())
            return
        data = orjson.loads(line[6:])
        if data.get("error"):
            self.error = str(data["error"])[:ERROR_CHARACTERS]
        if choices := data.get("choices"):
            self._chunks += 1
            delta = choices[0].get("delta") or {}
            said = any(delta.get(name) for name in CONTENT)
            if self._chunks > 1 or said:
                self.times.append(perf_counter())
            if said and self.text is None:
                self.text = self.times[-1]
        if data.get("usage"):
            self.usage = data["usage"]

    @property
    def cached(self) -> int:
        """Prompt tokens that the engine did not compute."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def request(model: str, messages: list[dict[str, str]], output: int) -> bytes:
    """The body of a call that generates exactly `output` tokens, streamed, with usage at its end."""
    fields = {
        "model": model, "messages": messages, "max_tokens": output, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return orjson.dumps(fields)


def extended(body: bytes, fields: Mapping[str, Any]) -> bytes:
    """A body with more fields; what it has is not serialised again."""
    return body[:-1] + b"," + orjson.dumps(fields)[1:] if fields else body


async def within(seconds: float, exchange: Exchange, doing: Any) -> None:
    """Await `doing`, for at most so many seconds; after that the exchange has failed."""
    try:
        async with asyncio.timeout(seconds):
            await doing
    except TimeoutError:
        exchange.error, exchange.ended = f"no answer within {seconds:g} s", perf_counter()
