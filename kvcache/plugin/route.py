"""The internal route by which messages of the core reach vLLM's scheduler: POST /weft/control, JSON both ways."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from msgspec import Raw, ValidationError, json

from kvcache.envelope import BROKEN, packed

PATH = "/weft/control"
LONGEST = 8 << 20  # bytes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def control(scope: Message, receive: Receive, send: Send) -> None:
    """Answer a request for `PATH`: what the scheduler says to the message, or why it was not asked.

    405, 413 and 400 for what is no message; 501 where the engine's scheduler is not ours; 500 where it failed.
    """
    if scope["method"] != "POST":
        await _answer(send, 405, {"error": "POST only"})
        return
    body = await _body(receive)
    if body is None:
        await _answer(send, 413, {"error": f"more than {LONGEST} bytes"})
        return
    try:
        message = _read(body)
    except ValidationError:
        await _answer(send, 400, {"error": "no object"})
        return
    except BROKEN:
        await _answer(send, 400, {"error": "no JSON"})
        return
    try:
        found = await scope["app"].state.engine_client.engine_core.call_utility_async("scheduler", message)
    except Exception as why:
        # vLLM raises what the engine's thread raised, as text: a stock scheduler cannot be called.
        await _answer(send, 501 if "not callable" in str(why) else 500, {"error": str(why)[:300]})
        return
    await _answer(send, 200, found)


def _read(body: bytes) -> dict[str, Any]:
    """The message. Its actions stay bytes, as the engine's process reads them fastest."""
    parts = json.decode(body, type=dict[str, Raw])
    return {name: packed(bytes(part)) if name == "actions" else json.decode(part) for name, part in parts.items()}


async def _body(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        part = await receive()
        if part["type"] == "http.disconnect":
            break
        parts.append(part.get("body", b""))
        size, more = size + len(parts[-1]), part.get("more_body", False)
        if size > LONGEST:
            return None
    return b"".join(parts)


async def _answer(send: Send, status: int, document: object) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.encode(document)})
