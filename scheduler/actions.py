"""What to do about it: the outputs of `Scheduler.handle`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a step goes and why. `terms` are the figures that decided, each with its unit in its name."""

    worker: str
    reason: str
    terms: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join([self.reason, *(f"{name}={value:g}" for name, value in self.terms.items())])


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the step to `decision.worker`, on the account of `owner`."""

    step: str
    workflow: str
    session: str
    owner: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the step with an HTTP status; `retry_after` is in seconds, None where trying again is no use."""

    step: str
    status: int
    reason: str
    retry_after: int | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the step's attempt on its worker: the worker is lost."""

    step: str
    reason: str


Action = Dispatch | Reject | Cancel
