"""What the routes share."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from starlette.requests import Request

from server.auth import Keys, Tenant
from server.core import Core
from server.errors import ApiError
from server.memory import Memory, save
from server.stored import ResponseIndex


@dataclass(slots=True)
class State:
    """One per front end."""

    core: Core
    keys: Keys
    client: aiohttp.ClientSession
    responses: ResponseIndex
    memory: Memory | None = None

    async def save(self) -> None:
        """Keep what is known over a restart, at once."""
        if self.memory is not None:
            await save(self.core, self.memory)


def state_of(request: Request) -> State:
    """The front end's state."""
    state: State = request.app.state.weft
    return state


def authenticate(request: Request) -> Tenant:
    """The tenant of the request's key. Raises ApiError 401 without one that is known."""
    tenant = state_of(request).keys.tenant(request.headers)
    if tenant is None:
        sent = "authorization" in request.headers or "x-api-key" in request.headers
        raise ApiError(401, "The API key is not known." if sent else "This endpoint needs an API key.")
    return tenant
