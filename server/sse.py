"""Cuts a byte stream at the ends of its server-sent events, so that a comment or an error can be put between two."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp

LARGEST_EVENT = 4 * 1024 * 1024


async def blocks(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield whole events, as many at once as have arrived. Bytes are never changed; what is left comes at the end.

    An event above `LARGEST_EVENT` bytes is passed on in parts: nothing is buffered without bound.
    """
    rest = b""
    while data := await content.readany():
        data = rest + data if rest else data
        end = data.rfind(b"\n\n") + 2
        if end == 1 and len(data) <= LARGEST_EVENT:
            rest = data
            continue
        end = end if end > 1 else len(data)
        rest = data[end:]
        yield data[:end]
    if rest:
        yield rest
