"""The workers as the core sees them: what they serve, whom they hold, what runs on them now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler.actions import Decision, Reject
from scheduler.graph import Session, Step, Workflow
from scheduler.rates import Rates
from scheduler.residency import Residency

RETRY_AFTER_SECONDS = 5


class Seated:
    """The live sessions on a worker, and how many workflows they were of when they came. All O(1)."""

    def __init__(self) -> None:
        self._of: dict[Session, Workflow] = {}
        self._sessions: dict[Workflow, int] = {}

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._of)

    @property
    def workflows(self) -> int:
        """How many they are of."""
        return len(self._sessions)

    def add(self, session: Session) -> None:
        """One more, if it is not here."""
        if session not in self._of:
            workflow = self._of[session] = session.workflow
            self._sessions[workflow] = self._sessions.get(workflow, 0) + 1

    def discard(self, session: Session) -> None:
        """One less, if it is here."""
        if (workflow := self._of.pop(session, None)) is not None:
            self._sessions[workflow] -= 1
            if not self._sessions[workflow]:
                del self._sessions[workflow]

    def clear(self) -> None:
        """None any more."""
        self._of.clear()
        self._sessions.clear()


@dataclass(slots=True, eq=False)
class Worker:
    """One vLLM engine. `models` is empty until it was up once; `sessions` are the live ones seated on it.

    `placed` counts the steps that were placed here, not continued, in this life. `host_tokens` is its host tier's
    capacity; it takes advice where it is `advised`, prefetches where it `fetches`. `served` is when its latest first
    token came.
    """

    id: str
    pool: str = ""
    models: frozenset[str] = frozenset()
    incarnation: str = ""
    kv_tokens: int = 0
    host_tokens: int = 0
    advised: bool = False
    fetches: bool = False
    up: bool = False
    draining: bool = False
    failed: bool = False
    placed: int = 0
    running: dict[str, Step] = field(default_factory=dict)
    sessions: Seated = field(default_factory=Seated)
    residency: Residency = field(default_factory=Residency)
    rates: Rates = field(default_factory=Rates)
    served: float = 0.0
    continues: Decision = field(init=False)

    def __post_init__(self) -> None:
        self.continues = Decision(self.id, "continues")

    @property
    def state(self) -> str:
        """`starting` before it was first up, then `up`, `draining` or `down`; `failed` where it cannot start."""
        if not self.up:
            return "failed" if self.failed else "down" if self.models else "starting"
        return "draining" if self.draining else "up"

    def serves(self, model: str) -> bool:
        """Whether it is up and serves the model."""
        return self.up and model in self.models

    @property
    def seat(self) -> tuple[str, str]:
        """Names this life of the worker; a seat of an earlier life holds no KV."""
        return (self.id, self.incarnation)


class Workers(dict[str, Worker]):
    """All that were ever named, by their ids, in the order in which they were."""

    def named(self, worker: str) -> Worker:
        """That of this id, made where there is none."""
        return self.setdefault(worker, Worker(worker))

    def know(self, model: str) -> bool:
        """Whether any has ever served the model."""
        return any(model in one.models for one in self.values())

    def serving(self, model: str) -> list[Worker]:
        """Those that are up and serve the model."""
        return [one for one in self.values() if one.serves(model)]

    def refusal(self, step: str, model: str) -> Reject:
        """Why none can serve the model now: not up (503), still starting (503), or never heard of (404)."""
        if self.know(model):
            return Reject(step, 503, f"no worker of {model!r} is up", RETRY_AFTER_SECONDS)
        if not self or any(one.state == "starting" for one in self.values()):
            return Reject(step, 503, "the workers are starting", RETRY_AFTER_SECONDS)
        return Reject(step, 404, f"The model `{model}` does not exist.")
