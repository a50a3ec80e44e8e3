"""What to do about it: the outputs of `Scheduler.handle`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcache.policy import Hint


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
    """Send the step to `decision.worker`, on the account of `owner`; of those that wait there the lowest `priority`
    goes first."""

    step: str
    workflow: str
    session: str
    owner: str
    decision: Decision
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Hold:
    """Let the step wait; a `Dispatch` or a `Reject` of it comes with a later event, at the latest by `deadline`.

    `deadline` is on the clock of `now`; `reason` says why, with the figures that decided.
    """

    step: str
    workflow: str
    session: str
    worker: str
    deadline: float
    reason: str


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


@dataclass(frozen=True, slots=True)
class Retain:
    """Tell the worker's engine what is foretold of an owner of its KV. Advice."""

    worker: str
    owner: str
    hint: Hint


@dataclass(frozen=True, slots=True)
class Release:
    """Tell the worker's engine that the owner's KV is dead."""

    worker: str
    owner: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Let the worker's engine bring the owner's KV to the device within so many seconds. Advice."""

    worker: str
    owner: str
    within: float


@dataclass(frozen=True, slots=True)
class Reprioritise:
    """The owner's steps at the worker have another priority from now on."""

    worker: str
    owner: str
    priority: int


Advice = Retain | Release | Prefetch | Reprioritise
"""What engines are told, where they can be: nothing depends on it."""

Action = Dispatch | Hold | Reject | Cancel | Advice
