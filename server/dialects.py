"""What the relay must understand of each API's answers: usage, stop, what was said, and how to speak up in a stream.

Once as much of the answer is kept as lineage needs, only events that carry one of the `marks` are parsed: a quote
inside a JSON string is escaped, so that a mark cannot occur in generated text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from scheduler.events import Usage
from scheduler.prompt import Answer, ToolCall
from server import errors

LONGEST_ANSWER = 16_384
"""Characters of an answer that are kept until the step ends."""
MOST_CALLS = 128


class Dialect:
    """Reads one answer. One object per call; `usage`, `stop`, `content`, `answer` and `error` fill as events pass.

    `prefilled`: the prompt is computed. vLLM's first event says it, which has the role alone; `content`, that there is
    some to see, may come much later, after tokens that are no text or that a parser holds back.
    """

    anthropic = False
    listens = False
    ping = b": keep-alive\n\n"
    marks: tuple[bytes, ...] = ()

    def __init__(self, drop_usage: bool = False) -> None:
        self.drop_usage = drop_usage
        self.usage = Usage()
        self.stop: str | None = None
        self.prefilled = self.content = False
        self.error: str | None = None
        self.response_id: str | None = None
        self._texts: list[str] = []
        self._calls: dict[int, list[str]] = {}
        self._room = LONGEST_ANSWER if self.listens else 0

    @property
    def answer(self) -> Answer:
        """What was said so far: of the first choice, without reasoning, its beginning if it is very long."""
        calls = (ToolCall(id, name, "".join(parts)) for id, name, *parts in self._calls.values())
        return Answer("".join(self._texts), tuple(calls))

    def feed(self, block: bytes) -> bytes:
        """Take whole events and return those to relay: all, less the usage chunk that the client did not ask for."""
        if self.content and self._room <= 0:
            for mark in self.marks:
                if mark in block:
                    break
            else:
                return block
        dropped = False
        kept = []
        for event in split(block):
            if self._read(event):
                kept.append(event)
            else:
                dropped = True
        return b"".join(kept) if dropped else block

    def forget(self) -> None:
        """The answer so far was none: another worker begins anew."""
        self.stop = self.error = None
        self._texts, self._calls = [], {}
        self._room = LONGEST_ANSWER if self.listens else 0

    def _say(self, text: object) -> None:
        if isinstance(text, str) and self._room > 0:
            self._texts.append(text)
            self._room -= len(text)

    def _call(self, index: object, id: object, name: object, arguments: object) -> None:
        """A tool call, or more of the arguments of the one at `index`."""
        if not isinstance(index, int) or (index not in self._calls and len(self._calls) >= MOST_CALLS):
            return
        call = self._calls.setdefault(index, [str(id or ""), str(name or "")])
        if isinstance(arguments, str) and self._room > 0:
            call.append(arguments)
            self._room -= len(arguments)

    def _read(self, event: bytes) -> bool:
        data = payload(event)
        if not isinstance(data, dict):
            return True
        if isinstance(failure := data.get("error"), dict):
            self.error = str(failure.get("message"))
        return self.read_event(data)

    def read_event(self, data: Mapping[str, Any]) -> bool:
        """Learn from one event; False drops it."""
        raise NotImplementedError

    def read_whole(self, data: Mapping[str, Any]) -> None:
        """Learn from an answer that was not streamed."""
        raise NotImplementedError

    def error_event(self, status: int, message: str) -> bytes:
        """The API's in-stream error, for a stream that has begun."""
        return b"data: " + errors.body(status, message) + b"\n\ndata: [DONE]\n\n"


class Completions(Dialect):
    """`/v1/completions`."""

    marks = (b'"usage":{', b'"finish_reason":"', b'"error":', b'"id":"chatcmpl-tool', b'"tool_calls":[{"id"')

    def read_event(self, data: Mapping[str, Any]) -> bool:
        choices = data.get("choices") or []
        self.prefilled = self.prefilled or bool(choices)
        for choice in choices:
            self.content = self.content or self.has_content(choice)
            self.stop = choice.get("finish_reason") or self.stop
            if not choice.get("index"):
                self.hear(choice.get("delta") or {})
        self._count(data)
        return not (self.drop_usage and not choices and isinstance(data.get("usage"), dict))

    def read_whole(self, data: Mapping[str, Any]) -> None:
        self.content = True
        choices = data.get("choices") or [{}]
        self.stop = choices[0].get("finish_reason")
        self.hear(choices[0].get("message") or {})
        self._count(data)

    def hear(self, message: Mapping[str, Any]) -> None:
        """Keep what a message, or a part of one, says."""

    def has_content(self, choice: Mapping[str, Any]) -> bool:
        """Whether a chunk's choice carries generated tokens."""
        return bool(choice.get("text"))

    def _count(self, data: Mapping[str, Any]) -> None:
        if isinstance(usage := data.get("usage"), dict):
            details = usage.get("prompt_tokens_details") or {}
            self.usage = Usage(
                prompt=usage.get("prompt_tokens") or 0,
                cached=details.get("cached_tokens") or 0,
                output=usage.get("completion_tokens") or 0,
            )


class Chat(Completions):
    """`/v1/chat/completions`."""

    listens = True

    def has_content(self, choice: Mapping[str, Any]) -> bool:
        delta = choice.get("delta") or {}
        return any(delta.get(part) for part in ("content", "reasoning", "reasoning_content", "tool_calls", "refusal"))

    def hear(self, message: Mapping[str, Any]) -> None:
        self._say(message.get("content"))
        for place, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") or {}
            self._call(call.get("index", place), call.get("id"), function.get("name"), function.get("arguments"))


class Responses(Dialect):
    """`/v1/responses`. A stream repeats the whole answer at its end, so that nothing need be kept on the way."""

    marks = (
        b"event: response.completed", b"event: response.incomplete", b"event: response.failed", b"event: error",
        b'"error":',
    )  # fmt: skip

    def read_event(self, data: Mapping[str, Any]) -> bool:
        kind = str(data.get("type"))
        self.content = self.prefilled = self.content or kind.endswith(".delta")
        if isinstance(response := data.get("response"), dict):
            self.read_whole(response)
        if kind == "error":
            self.error = str(data.get("message"))
        return True

    def read_whole(self, data: Mapping[str, Any]) -> None:
        self.response_id = data.get("id") or self.response_id
        status = data.get("status")
        self.stop = None if status in ("queued", "in_progress") else status
        if isinstance(usage := data.get("usage"), dict):
            details = usage.get("input_tokens_details") or {}
            self.usage = Usage(
                prompt=usage.get("input_tokens") or 0,
                cached=details.get("cached_tokens") or 0,
                output=usage.get("output_tokens") or 0,
            )
        if items := data.get("output"):
            self._hear(items)

    def _hear(self, items: list[Mapping[str, Any]]) -> None:
        self._texts, self._calls, self._room = [], {}, LONGEST_ANSWER
        for index, item in enumerate(items):
            if item.get("type") == "function_call":
                self._call(index, item.get("call_id"), item.get("name"), item.get("arguments"))
            for part in item.get("content") or () if item.get("type") == "message" else ():
                self._say(part.get("text"))
        self._room = 0

    def error_event(self, status: int, message: str) -> bytes:
        failure = {"type": "error", "code": str(status), "message": message, "param": None}
        # `error` repeats it where SDKs look for a failure of any stream.
        return b"event: error\ndata: " + orjson.dumps({**failure, "error": failure}) + b"\n\n"


class Messages(Dialect):
    """`/v1/messages`."""

    anthropic = True
    listens = True
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    marks = (b"event: message_delta", b"event: content_block_start", b"event: error", b'"error":')

    def read_event(self, data: Mapping[str, Any]) -> bool:
        kind = data.get("type")
        block, delta = data.get("content_block") or {}, data.get("delta") or {}
        self.prefilled = self.prefilled or kind == "message_start"
        self.content = self.content or kind == "content_block_delta" or block.get("type") == "tool_use"
        if block.get("type") == "tool_use":
            self._call(data.get("index"), block.get("id"), block.get("name"), None)
        elif kind == "content_block_delta":
            self._say(delta.get("text"))
            if delta.get("type") == "input_json_delta":
                self._call(data.get("index"), None, None, delta.get("partial_json"))
        if kind == "message_start":
            self._count(data.get("message") or {})
        elif kind == "message_delta":
            self.stop = delta.get("stop_reason") or self.stop
            self._count(data)
        return True

    def read_whole(self, data: Mapping[str, Any]) -> None:
        self.content = True
        self.stop = data.get("stop_reason")
        for index, block in enumerate(data.get("content") or ()):
            self._say(block.get("text"))
            if block.get("type") == "tool_use":
                self._call(index, block.get("id"), block.get("name"), orjson.dumps(block.get("input")).decode())
        self._count(data)

    def _count(self, data: Mapping[str, Any]) -> None:
        if isinstance(usage := data.get("usage"), dict):
            cached = usage.get("cache_read_input_tokens") or 0
            # Anthropic counts the parts of the prompt apart: fresh, read from the cache, written to it.
            prompt = (usage.get("input_tokens") or 0) + cached + (usage.get("cache_creation_input_tokens") or 0)
            self.usage = Usage(prompt, cached, usage.get("output_tokens") or 0)

    def error_event(self, status: int, message: str) -> bytes:
        return b"event: error\ndata: " + errors.body(status, message, anthropic=True) + b"\n\n"


def split(block: bytes) -> Iterator[bytes]:
    """The events of a block, each with its blank line."""
    start = 0
    while (end := block.find(b"\n\n", start)) >= 0:
        yield block[start : end + 2]
        start = end + 2
    if start < len(block):
        yield block[start:]


def payload(event: bytes) -> object:
    """The JSON of an event's data line, or None."""
    for line in event.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                return orjson.loads(line[6:])
            except orjson.JSONDecodeError:
                return None
    return None
