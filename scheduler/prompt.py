"""What a request's prompt says about its descent: one digest a message, in a form that survives what clients rewrite.

The form leaves out what clients drop or rename between two turns: reasoning, tool-call ids, the order and spelling
of JSON fields, white space at the ends. Chat, Messages and Responses bodies come to the same form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

LONGEST_CHAIN = 10_000
SHORTEST_ID = 9  # characters of a tool call's id that look random
MINTED = "chatcmpl-tool-"  # how vLLM's ids of tool calls begin
_MINTED = re.compile(MINTED + "[0-9a-f]{16,32}")
ASSISTANT = "assistant"

_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_CALENDAR = frozenset(
    (form + comma).encode() for name in f"{_MONTHS} {_DAYS}".split() for form in (name, name[:3]) for comma in ("", ",")
)
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call as the worker minted it; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker generated: the text without reasoning, and the tool calls."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a prompt. `calls` are the keys of the tool calls it makes or answers; `text` is as it came."""

    speaker: str
    digest: int
    text: str
    calls: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, read once. Digests are 64 bits and differ between tenants.

    `head` digests system prompt and tools exactly; `role` names them with dates, numbers and ids masked;
    `links[i]` names messages 0 to i without the head, so that equal links mean an equal history.
    """

    tenant: str
    head: int
    role: str
    messages: Sequence[Message]
    links: Sequence[int]

    def exchanges(self) -> Iterator[tuple[int, int]]:
        """(position of its last message, key) of each assistant turn with what answered it, the latest first."""
        end = len(self.messages)
        for i in range(len(self.messages) - 1, -1, -1):
            starts = self.messages[i].speaker == ASSISTANT and (i == 0 or self.messages[i - 1].speaker != ASSISTANT)
            if starts:
                yield end - 1, _digest(self.tenant, *(str(m.digest) for m in self.messages[i:end]))
                end = i


def read(tenant: str, body: Mapping[str, Any]) -> Prompt | None:
    """Read a chat, Messages or Responses body; None where there are no messages in it. Linear in its bytes.

    At most the first `LONGEST_CHAIN` messages count.
    """
    items = body.get("messages")
    if items is None:
        told = body.get("input")
        items = [{"role": "user", "content": told}] if isinstance(told, str) else told
    if not isinstance(items, list):
        return None
    system = [_text(body[name]) for name in ("system", "instructions") if body.get(name)]
    messages: list[Message] = []
    for item in items[:LONGEST_CHAIN]:
        if not isinstance(item, Mapping):
            return None
        if not messages and item.get("role") in _SYSTEM:
            system.append(_text(item.get("content")))
        else:
            messages += _messages(tenant, item)
    if not messages:
        return None
    links: list[int] = []
    link = b"%d" % _digest(tenant)
    for message in messages:
        link = blake2b(link + b"%d" % message.digest, digest_size=8).digest()
        links.append(int.from_bytes(link, "little"))
    tools = body.get("tools")
    head, role = _head(tenant, "\n".join(system), tools if isinstance(tools, list) else [])
    return Prompt(tenant, head, role, messages, links)


def said(tenant: str, answer: Answer) -> int:
    """The digest that the answer has as a message of a later prompt, with text and calls in one message."""
    return _digest(tenant, ASSISTANT, _stripped(answer.text), *_canonical_calls(answer.calls))


def call_key(tenant: str, id: str) -> int:
    """Names a tool call; 0 where its id is such that others may have it too (`functions.look:0`, `call_1`)."""
    last = id.rpartition("-")[2].rpartition("_")[2]
    if len(last) < SHORTEST_ID or not last.isalnum() or last.isalpha():
        return 0
    return _digest(tenant, "call", id)


def shorten(text: str) -> str:
    """A role or owner as 16 hexadecimal digits."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _head(tenant: str, system: str, tools: list[Any]) -> tuple[int, str]:
    names = sorted(filter(None, map(_tool_name, tools)))
    exact = _digest(tenant, system, orjson.dumps(tools, option=orjson.OPT_SORT_KEYS) if tools else "")
    return exact, "r-" + blake2b(_masked(system) + "\0".join(["", *names]).encode(), digest_size=6).hexdigest()


def _masked(system: str) -> bytes:
    """Without what differs from run to run: words with a digit in them (dates, ids, numbered paths), months, days."""
    words = system.encode("utf-8", "surrogatepass").translate(_DIGITS).split()
    return b" ".join([word for word in words if b"0" not in word and word not in _CALENDAR])


def _tool_name(tool: object) -> str:
    if not isinstance(tool, Mapping):
        return ""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else tool.get("name")
    return str(name or tool.get("type") or "")


def _messages(tenant: str, item: Mapping[str, Any]) -> list[Message]:
    """The messages of one item: several where an Anthropic message answers tool calls, none where it only thinks."""
    kind = item.get("type")
    if kind == "reasoning":
        return []
    if kind == "function_call":
        call = ToolCall(str(item.get("call_id")), str(item.get("name")), _json_text(item.get("arguments")))
        return [_said(tenant, "", (call,))]
    if kind == "function_call_output":
        return [_answered(tenant, str(item.get("call_id")), _text(item.get("output")))]
    role, content = str(item.get("role")), item.get("content")
    if role == ASSISTANT:
        calls = (*_chat_calls(item.get("tool_calls")), *_blocks_calls(content))
        return [_said(tenant, _text(content), calls)]
    if role == "tool":
        return [_answered(tenant, str(item.get("tool_call_id")), _text(content))]
    made = [
        _answered(tenant, str(block.get("tool_use_id")), _text(block.get("content")))
        for block in _blocks(content, "tool_result")
    ]
    if (text := _text(content)) or not made:
        made.append(Message(role, _digest(tenant, role, _stripped(text)), text))
    return made


def _said(tenant: str, text: str, calls: Sequence[ToolCall]) -> Message:
    ids = [call.id for call in calls]
    if MINTED in text:  # some clients write their calls down as text
        ids += _MINTED.findall(text)
    keys = tuple(filter(None, (call_key(tenant, id) for id in ids)))
    return Message(ASSISTANT, _digest(tenant, ASSISTANT, _stripped(text), *_canonical_calls(calls)), text, keys)


def _answered(tenant: str, id: str, text: str) -> Message:
    key = call_key(tenant, id)
    return Message("tool", _digest(tenant, "tool", _stripped(text)), text, (key,) if key else ())


def _chat_calls(calls: object) -> Iterator[ToolCall]:
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield ToolCall(str(call.get("id")), str(function.get("name")), _json_text(function.get("arguments")))


def _blocks_calls(content: object) -> Iterator[ToolCall]:
    for block in _blocks(content, "tool_use"):
        yield ToolCall(str(block.get("id")), str(block.get("name")), _json_text(block.get("input")))


def _blocks(content: object, kind: str) -> Iterator[Mapping[str, Any]]:
    for block in content if isinstance(content, list) else ():
        if isinstance(block, Mapping) and block.get("type") == kind:
            yield block


def _canonical_calls(calls: Iterable[ToolCall]) -> Iterator[str | bytes]:
    for call in calls:
        yield call.name
        try:
            yield orjson.dumps(orjson.loads(call.arguments), option=orjson.OPT_SORT_KEYS)
        except (orjson.JSONDecodeError, TypeError):
            yield call.arguments.strip()


def _json_text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # reads deeper than it writes
        return ""


_OMITTED = ("thinking", "redacted_thinking", "reasoning", "tool_use", "tool_result")


def _text(content: object) -> str:
    """The text of a content: a string, or its parts; what is no text (an image) as its JSON."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return "" if content is None else _json_text(content)
    parts: list[str] = []
    for part in content:
        if not isinstance(part, Mapping):
            parts.append(part if isinstance(part, str) else _json_text(part))
        elif isinstance(text := part.get("text"), str):
            parts.append(text)
        elif part.get("type") not in _OMITTED:
            parts.append(_json_text(part))
    return "\n".join(parts)


def _stripped(text: str) -> str:
    """Without white space at its ends and without the reasoning that some models put before their answer."""
    if "</think>" in text and text.lstrip().startswith("<think>"):
        text = text.partition("</think>")[2]
    return text.strip()


def _digest(*parts: str | bytes) -> int:
    """64 bits of parts of any content: their lengths come first."""
    data = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    lengths = b"%s:" % repr([len(d) for d in data]).encode()
    return int.from_bytes(blake2b(b"".join((lengths, *data)), digest_size=8).digest(), "little")
