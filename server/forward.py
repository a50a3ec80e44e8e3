"""Passes on what is not a step: token counts, embeddings, stored responses. No scheduling, no accounting."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import aiohttp
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.call import forwarded
from server.core import Endpoint
from server.errors import ApiError
from server.relay import LOST, relayed


async def forward(
    request: Request, body: bytes, endpoints: Sequence[Endpoint], client: aiohttp.ClientSession
) -> Response:
    """Send the request to the first endpoint that answers, and return its answer as it comes.

    Raises ApiError 502 where none answers.
    """
    url = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    lost = "no worker is up"
    for endpoint in endpoints:
        headers = forwarded(request.headers)
        if endpoint.api_key:
            headers["authorization"] = f"Bearer {endpoint.api_key}"
        try:
            upstream = await client.request(request.method, endpoint.url + url, data=body or None, headers=headers)
        except LOST as error:
            lost = str(error) or type(error).__name__
            continue
        headers = relayed(upstream) | {"x-weft-worker": endpoint.worker}
        return StreamingResponse(_content(upstream), upstream.status, headers)
    raise ApiError(502, f"No worker answered: {lost}", retry_after=5)


async def _content(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with upstream:
        async for data in upstream.content.iter_any():
            yield data
