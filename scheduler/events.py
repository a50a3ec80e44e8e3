"""What happened: the inputs of `Scheduler.handle`. Token counts are in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.identity import Identity
from scheduler.prompt import Answer, Prompt


@dataclass(frozen=True, slots=True)
class StepArrived:
    """A client sent an LLM call. `pinned` names the worker that alone can serve it (a stored response).

    `prompt` is None where it cannot be read as messages, or is only the end of one. `size` is how much there is of it,
    in any unit that is the same for all steps of a model, such as the bytes of a body; 0: unknown. `flex` is offline
    work. `strict`: where the run cannot be done as was asked of it, the client wants to be refused.
    """

    step: str
    model: str
    identity: Identity
    pinned: str | None = None
    prompt: Prompt | None = None
    size: int = 0
    flex: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The worker's first event with content reached the relay."""

    step: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What the worker counted for one step, in tokens. `cached` is the part of `prompt` found in its prefix cache."""

    prompt: int = 0
    cached: int = 0
    output: int = 0

    @property
    def computed(self) -> int:
        """What was not found."""
        return max(0, self.prompt - self.cached) + self.output


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The worker answered in full; `stop` is the API's finish reason, or None where it gives none."""

    step: str
    usage: Usage
    stop: str | None = None
    answer: Answer | None = None

    @property
    def tools(self) -> tuple[str, ...]:
        """The tools that it called."""
        return tuple(call.name for call in self.answer.calls) if self.answer else ()


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The attempt ended without an answer. `retryable` is False once a byte of the answer has been seen."""

    step: str
    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class StepCancelled:
    """The client went away."""

    step: str


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker can serve, or changed what it serves. `kv_tokens` is its KV capacity in tokens, 0 if unknown.

    `incarnation` differs for each life of the worker: a restarted worker holds no KV. `host_tokens` is the capacity of
    its host tier; `advised` says that its engine takes advice, `fetches` that it can prefetch.
    """

    worker: str
    pool: str
    models: tuple[str, ...]
    incarnation: str
    kv_tokens: int = 0
    host_tokens: int = 0
    advised: bool = False
    fetches: bool = False


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """The worker takes no new session; the ones it has go on."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """The worker died or does not answer; what it held is lost. `failed` says that it will not come back."""

    worker: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ResidencyChanged:
    """The worker's engine reports tokens on device and host: of owners for which they changed, or `full` of all.

    `owners` None: it reports no more.
    """

    worker: str
    owners: Mapping[str, Sequence[int]] | None
    full: bool = False


@dataclass(frozen=True, slots=True)
class WorkflowFinished:
    """The client said that this workflow makes no further call."""

    tenant: str
    workflow: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent about once a second."""


@dataclass(frozen=True, slots=True)
class AdviceDue:
    """The engines can be told what has changed for them; sent about ten times a second."""


Event = (
    StepArrived
    | FirstToken
    | StepFinished
    | StepFailed
    | StepCancelled
    | WorkerUp
    | WorkerDraining
    | WorkerDown
    | ResidencyChanged
    | WorkflowFinished
    | Tick
    | AdviceDue
)
