"""Stored responses of `/v1/responses`: which worker made which, since only that worker can return to it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from server.core import Attempt

KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Made:
    """Who made a stored response."""

    worker: str
    workflow: str
    session: str


class ResponseIndex:
    """Which worker holds which stored response, per tenant. Bounded; what it forgot is asked for everywhere."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[str, str], Made] = OrderedDict()

    def watch(self, attempt: Attempt) -> None:
        """Remember the response of a step that ended."""
        made, dispatch = attempt.call.dialect.response_id, attempt.dispatch
        if made and dispatch:
            key = (attempt.call.tenant.name, made)
            self._made[key] = Made(dispatch.decision.worker, dispatch.workflow, dispatch.session)
            if len(self._made) > KEPT:
                self._made.popitem(last=False)

    def get(self, tenant: str, response: object) -> Made | None:
        """Who made the tenant's response, if that is known."""
        return self._made.get((tenant, response)) if isinstance(response, str) else None
