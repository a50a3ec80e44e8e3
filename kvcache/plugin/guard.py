"""Middleware for vLLM's API server: every route needs the worker's key, also the internal one of Weft's messages.

vLLM's own `--api-key` guards `/v1` and a few more, but not `/invocations`, `/pooling` or `/tokenize`; on a cluster
whoever reaches the node could generate past Weft. Health and metrics stay open for probes and scrapers.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kvcache.plugin import route

OPEN = frozenset({"/health", "/metrics", "/ping"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware: 401 without `Authorization: Bearer $VLLM_API_KEY`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, answer it where it is a message of the core, or refuse it."""
        kind, path = scope["type"], scope.get("path")
        if kind not in ("http", "websocket") or path in OPEN or self._knows(scope):
            ours = kind == "http" and path == route.PATH
            await (route.control if ours else self._app)(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error":"Unauthorized"}'})

    def _knows(self, scope: Message) -> bool:
        sent = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        return hmac.compare_digest(sent, self._expected)
