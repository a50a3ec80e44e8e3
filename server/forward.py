"""Passes on what is not a step: token counts, embeddings, stored responses. No scheduling, no accounting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence

import aiohttp
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from scheduler.scheduler import TRIES
from server.call import forwarded, plain_headers
from server.core import Endpoint, bearer
from server.errors import ApiError
from server.relay import LOST, STALL_SECONDS, relayed


async def forward(
    request: Request, body: bytes, endpoints: Sequence[Endpoint], client: aiohttp.ClientSession
) -> Response:
    """Send the request to the first endpoint, to the second if the first is lost; return the answer as it comes.

    Raises ApiError 502 where neither answers, 504 where one is silent for too long.
    """
    query = request.scope["query_string"].decode("latin-1")
    path = request.scope["path"] + (f"?{query}" if query else "")
    lost = "no worker is up"
    for endpoint in endpoints[:TRIES]:
        headers = forwarded(plain_headers(request)) | bearer(endpoint.api_key)
        asking = client.request(request.method, endpoint.url + path, data=body or None, headers=headers)
        try:
            upstream = await _unless_gone(request, asking)
        except aiohttp.SocketTimeoutError:
            raise ApiError(504, f"The worker sent nothing for {STALL_SECONDS:g} s.") from None
        except LOST as error:
            lost = str(error) or type(error).__name__
            continue
        headers = relayed(upstream) | {"x-weft-worker": endpoint.worker}
        return StreamingResponse(_content(upstream), upstream.status, headers)
    raise ApiError(502, f"No worker answered: {lost}", retry_after=5)


async def _unless_gone(request: Request, asking: Awaitable[aiohttp.ClientResponse]) -> aiohttp.ClientResponse:
    """Wait for the worker's answer; give it up when the client leaves."""
    answer, gone = asyncio.ensure_future(asking), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client went away.")
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _content(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with upstream:
        async for data in upstream.content.iter_any():
            yield data
