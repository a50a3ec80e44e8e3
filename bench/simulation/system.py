"""What stands in front of the modelled engines, and what ranks inside them: the interface of every simulated system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.records import CallRecord
from bench.workloads.runs import Call, Run
from kvcache.policy import Policy

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster
    from bench.simulation.engine import Engine


@dataclass(slots=True, eq=False)
class Turn:
    """A call in play. `owner` names its session in all of the simulation; `worker` is an index into `engines`."""

    run: Run
    index: int
    call: Call
    owner: str
    record: CallRecord
    worker: int | None = None

    @property
    def last(self) -> bool:
        """Whether its session makes no further call."""
        return self.run.ends_session(self.index)

    @property
    def sent(self) -> float:
        """When the client sent it, in seconds."""
        return self.record.sent


class System:
    """Stock vLLM behind a front that does nothing by itself. A system overrides what it does otherwise.

    It acts by `self.cluster.send(turn, worker)` at once or later; a turn that it does not send is held.
    """

    name = "system"
    tick: float | None = None
    """Seconds between calls of `ticked`, None for never."""
    unlimited = False
    """Whether its engines have memory without limit."""
    ours = False
    """Whether its engines have our plug-in, but for its policy: they rank device and host tier as one, and so on."""

    threshold = 1.0
    """Of a step's tokens, what one prefill may take where there are two calls: vLLM's long_prefill_token_threshold."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def policy(self) -> Policy:
        """The eviction policy of one engine's device memory, or of its host tier; asked once for each."""
        return Policy()

    def key(self, turn: Turn) -> float | None:
        """The place of a turn in its engine's waiting queue, lowest first; None, then of all: in order of arrival."""
        return None

    def began(self, run: Run) -> None:
        """A client begins a run; its first calls follow."""

    def arrived(self, turn: Turn) -> None:
        """A client sent a call."""
        raise NotImplementedError

    def first_token(self, turn: Turn) -> None:
        """The first token of the answer was generated."""

    def finished(self, turn: Turn) -> None:
        """The call has ended."""

    def ended(self, run: Run) -> None:
        """The run makes no further call. Only a system whose clients say so may use this."""

    def ticked(self) -> None:
        """`tick` seconds have passed."""

    def lost(self, worker: int, turns: Sequence[Turn]) -> None:
        """A worker has died with these turns. They come again, or are sent elsewhere."""
        raise NotImplementedError

    def restored(self, worker: int) -> None:
        """The worker is up again, and holds nothing."""
        raise NotImplementedError

    def drained(self, worker: int) -> None:
        """The worker is to take no new sessions. Most fronts have no such thing."""


def session_of(run: Run, session: str) -> str:
    """The name of a run's session in all of the simulation."""
    return f"{run.id}/{session}"


def role_of(tenant: str, role: str) -> str:
    """The owner on whose account the common prefix of a tenant's role is kept."""
    return f"role:{tenant}/{role}"


class Holdings:
    """Which engines hold KV of each run's sessions, so that it can be released when the run is over."""

    def __init__(self) -> None:
        self._held: dict[str, dict[tuple[str, int], None]] = {}

    def add(self, turn: Turn) -> None:
        """A call has ended on its worker."""
        assert turn.worker is not None
        self._held.setdefault(turn.run.id, {})[turn.owner, turn.worker] = None

    def owners(self, run: Run) -> list[str]:
        """The sessions of a run that are held anywhere, once for each worker."""
        return [owner for owner, _ in self._held.get(run.id, {})]

    def release(self, run: Run, engines: Sequence[Engine]) -> None:
        """The run is over: all that it holds is dead."""
        for owner, worker in self._held.pop(run.id, {}):
            engines[worker].release(owner)


@dataclass(slots=True)
class Seats:
    """Which worker each owner sits on, and how many live owners each worker has."""

    live: list[int]
    of: dict[str, int] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)

    def take(self, owner: str, worker: int) -> None:
        """Seat the owner there; it leaves where it was."""
        self.leave(owner)
        self.of[owner] = worker
        self.live[worker] += 1

    def leave(self, owner: str) -> None:
        """The owner is over."""
        if (worker := self.of.pop(owner, None)) is not None:
            self.live[worker] -= 1

    def fewest(self) -> int:
        """The open worker with the fewest live owners, the first of equals."""
        return min((one for one in range(len(self.live)) if one not in self.closed), key=self.live.__getitem__)

    def close(self, worker: int) -> None:
        """The worker is down: who sat there has no seat."""
        self.closed.add(worker)
        for owner in [owner for owner, seat in self.of.items() if seat == worker]:
            self.leave(owner)

    def open(self, worker: int) -> None:
        """The worker is up again."""
        self.closed.discard(worker)
