"""What a tenant may use: workflows at once, tokens a minute. Beyond that its steps are to come again later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.graph import Step, Workflow

MINUTE = 60.0
QUIET = 600.0  # seconds after its last step, when a session that has not come back counts no more
SOON = 5  # seconds until a workflow may have ended


@dataclass(frozen=True, slots=True)
class Quota:
    """None: without limit."""

    workflows: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Why a step cannot be taken now, and in how many seconds it is worth another try."""

    reason: str
    retry_after: int


class Quotas:
    """The quotas of tenants and what they have used. Those without one cost nothing.

    A workflow counts from its first step until it has finished, or nobody of it is expected back any more, at the
    latest `QUIET` seconds after its last step; one that is known always goes on. Tokens are those that workers
    compute, prompt and output, not what the prefix cache has: an estimate when a step comes, the true number when it
    has ended; of one that broke off the estimate stays. A tenant may save up a minute's worth, and who has used more
    waits until that is paid back.
    """

    def __init__(self) -> None:
        self.of: dict[str, Quota] = {}
        self._live: dict[str, dict[Workflow, None]] = {}
        self._tokens: dict[str, tuple[float, float]] = {}  # what is left, and when that was
        self._charged: dict[str, int] = {}  # for steps that have come

    def exceeded(self, tenant: str, knows: Callable[[], bool], now: float) -> Exceeded | None:
        """Whether the tenant may have no more now. `knows`: whether the step goes on with a workflow.

        O(workflows allowed) for a new workflow of a tenant with a quota.
        """
        quota = self.of.get(tenant)
        if quota is None:
            return None
        if quota.tokens_per_minute is not None and (left := self._left(tenant, quota, now)) < 0:
            wait = math.ceil(-left * MINUTE / quota.tokens_per_minute)
            return Exceeded(f"{quota.tokens_per_minute} tokens a minute are used up", min(60, max(1, wait)))
        if quota.workflows is not None and not knows():
            self._prune(tenant, now)
            if (live := len(self._live.get(tenant, ()))) >= quota.workflows:
                return Exceeded(f"{live} workflows run, and no more may at once", SOON)
        return None

    def came(self, step: Step, tokens: int, now: float) -> None:
        """A step has come that will have about so many tokens computed."""
        workflow = step.session.workflow
        if (quota := self.of.get(workflow.tenant)) is not None:
            if quota.workflows is not None:
                self._live.setdefault(workflow.tenant, {})[workflow] = None
            if quota.tokens_per_minute is not None:
                self._charged[step.id] = max(0, tokens)
                self._charge(workflow.tenant, quota, max(0, tokens), now)

    def ended(self, step: Step, now: float) -> None:
        """A step is over; `step.usage` is what its worker counted, if it ended well."""
        charged = self._charged.pop(step.id, None)
        tenant = step.session.workflow.tenant
        if charged is not None and step.usage.prompt and (quota := self.of.get(tenant)) is not None:
            self._charge(tenant, quota, step.usage.computed - charged, now)

    def passed(self, now: float) -> None:
        """Time has passed: forget workflows that count no more."""
        for tenant in list(self._live):
            self._prune(tenant, now)

    def _prune(self, tenant: str, now: float) -> None:
        live = self._live.get(tenant, {})
        for workflow in [one for one in live if _over(one, now)]:
            del live[workflow]
        if not live:
            self._live.pop(tenant, None)

    def _charge(self, tenant: str, quota: Quota, tokens: int, now: float) -> None:
        self._tokens[tenant] = self._left(tenant, quota, now) - tokens, now

    def _left(self, tenant: str, quota: Quota, now: float) -> float:
        most = float(quota.tokens_per_minute or 0)
        left, at = self._tokens.get(tenant, (most, now))
        return min(most, left + most * (now - at) / MINUTE)


def _over(workflow: Workflow, now: float) -> bool:
    """Also one that turned out to be a part of another: its sessions are that one's."""
    mine = (one for one in workflow.sessions.values() if one.workflow is workflow)
    return workflow.finished or not any(one.running or min(one.due, one.touched + QUIET) > now for one in mine)
