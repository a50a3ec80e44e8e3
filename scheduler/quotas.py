"""What a tenant may use: workflows at once, tokens a minute. Beyond that its steps are to come again later."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduler.events import Usage
from scheduler.graph import Step, Workflow

MINUTE = 60.0
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

    A workflow counts from its first step until it has finished, or nobody of it is expected back any more; one that has
    begun always goes on. Tokens are those that workers computed, prompt and output, what the prefix cache had not
    counted; a tenant may save up a minute's worth, and who has used more waits until that is paid back.
    """

    def __init__(self) -> None:
        self.of: dict[str, Quota] = {}
        self._live: dict[str, dict[Workflow, None]] = {}
        self._tokens: dict[str, tuple[float, float]] = {}  # what is left, and when that was

    def exceeded(self, step: Step, now: float) -> Exceeded | None:
        """Whether the tenant may have no more now; else the step counts. O(workflows allowed) for a new workflow."""
        workflow = step.session.workflow
        quota = self.of.get(workflow.tenant)
        if quota is None:
            return None
        if quota.tokens_per_minute is not None and (left := self._left(workflow.tenant, quota, now)) < 0:
            wait = math.ceil(-left * MINUTE / quota.tokens_per_minute)
            return Exceeded(f"{quota.tokens_per_minute} tokens a minute are used up", min(60, max(1, wait)))
        if quota.workflows is None:
            return None
        live = self._live.setdefault(workflow.tenant, {})
        if workflow not in live and not any(session.seats for session in workflow.sessions.values()):
            for other in [one for one in live if _over(one, now)]:
                del live[other]
            if len(live) >= quota.workflows:
                return Exceeded(f"{len(live)} workflows run, and no more may at once", SOON)
        live[workflow] = None
        return None

    def ended(self, step: Step, usage: Usage, now: float) -> None:
        """A step has ended; its worker counted so much for it."""
        workflow = step.session.workflow
        quota = self.of.get(workflow.tenant)
        if quota is not None and quota.tokens_per_minute is not None:
            self._tokens[workflow.tenant] = self._left(workflow.tenant, quota, now) - usage.computed, now

    def _left(self, tenant: str, quota: Quota, now: float) -> float:
        most = float(quota.tokens_per_minute or 0)
        left, at = self._tokens.get(tenant, (most, now))
        return min(most, left + most * (now - at) / MINUTE)


def _over(workflow: Workflow, now: float) -> bool:
    return workflow.finished or not any(one.running or one.due > now for one in workflow.sessions.values())
