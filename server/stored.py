"""Stored responses of `/v1/responses`: which worker made which, since only that worker can return to it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import aiohttp

from server.core import Attempt, bearer
from server.relay import LOST

if TYPE_CHECKING:
    from server.state import State

KEPT = 100_000
ASK = aiohttp.ClientTimeout(total=5)


@dataclass(frozen=True, slots=True)
class Made:
    """Who made a stored response, for whom; without a session where that is forgotten."""

    worker: str
    tenant: str
    workflow: str | None = None
    session: str | None = None


class ResponseIndex:
    """Which worker holds which stored response. Bounded; soft, like all the front end knows."""

    def __init__(self) -> None:
        self._made: OrderedDict[str, Made] = OrderedDict()

    def watch(self, attempt: Attempt) -> None:
        """Remember the response of a step that ended."""
        made, dispatch = attempt.call.dialect.response_id, attempt.dispatch
        if made and dispatch:
            tenant = attempt.call.tenant.name
            self._made[made] = Made(dispatch.decision.worker, tenant, dispatch.workflow, dispatch.session)
            if len(self._made) > KEPT:
                self._made.popitem(last=False)

    async def find(self, response: str, tenant: str, state: State) -> Made | None:
        """Who made the tenant's response; the workers are asked where that is forgotten.

        With several tenants nobody is asked: what is not known to be the tenant's own might be another's.
        """
        if made := self._made.get(response):
            return made if made.tenant == tenant else None
        if state.keys.several:
            return None
        for endpoint in list(state.core.endpoints.values()):
            url = f"{endpoint.url}/v1/responses/{quote(response, safe='')}"
            try:
                async with state.client.get(url, headers=bearer(endpoint.api_key), timeout=ASK) as answer:
                    if answer.status == 200:
                        return Made(endpoint.worker, tenant)
            except LOST:
                continue
        return None
