"""What workflows usually do at the gate: whether they come back after a stop, and what their sessions begin with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from scheduler.estimates import END, kind
from scheduler.graph import Step

K = TypeVar("K")
V = TypeVar("V")

FEW, RARE = 12, 0.25  # stops of a kind from which on something is concluded, and the share that is few
HOPE = 3  # workflows that are taken to have come back after every kind of stop
FOLLOWED = 0.5  # of the usual share, when another run has begun since: one workflow is taken to have shown it
WINDOW = 16  # stops before a beginning, the latest
FORESEEN = 8  # stops, for which growth is foreseen
MOST_STOPS = 1000  # of a kind of which that is learned, before they count half
MOST, RECENT = 10_000, 0.1  # of which something is known, the latest; the weight of a new sample


@dataclass(slots=True, eq=False)
class Stops:
    """How many workflows, or agents of theirs, `stopped` so, and how many of them `returned`.

    `followed` are two such numbers, of the latest after which another run of their program began while they were the
    last to have stopped: each is counted once it is back, or its usual gap has passed.
    """

    stopped: int = 0
    returned: int = 0
    followed: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def share(self) -> float:
        """The share that came back.

        A workflow that is still away counts as gone, so that an end is known from the first runs on, long before any
        has been given up; an agent that is counts for nothing yet, as many of a run may begin at once.
        """
        return (self.returned + HOPE) / (self.stopped + HOPE)

    @property
    def share_of_followed(self) -> float:
        """That of those after which another run began; half of the share, as long as nothing is known."""
        number, returned = self.followed
        return min(1.0, (returned + FOLLOWED * self.share) / (number + 1))

    def resolved(self, back: bool) -> None:
        """One more of those that were followed was back in its usual time, or was not."""
        if self.followed[0] >= WINDOW:
            self.followed = [number // 2 for number in self.followed]
        self.followed[0] += 1
        self.followed[1] += back


@dataclass(slots=True, eq=False)
class Course:
    """How workflows go on after a step of theirs: how often they `stopped` then, how often one was back after that, and
    the tokens by which they `grow` from one stop to the next, the mean of the latest."""

    stopped: int = 0
    returned: int = 0
    grow: float | None = None

    @property
    def grown(self) -> float:
        """Tokens by which one is larger at its next stop; 0 where they shrink."""
        return max(0.0, self.grow or 0.0)

    @property
    def ends(self) -> float:
        """The chance that one ends at a stop. Who is away counts as gone."""
        return max(1 / FORESEEN, (self.stopped - self.returned + 1) / (self.stopped + 1 + HOPE))

    def stop(self, grown: int | None) -> None:
        """One more has stopped, larger by so many tokens than at its stop before, if there was one."""
        self.stopped += 1
        if grown is not None:
            self.grow = grown if self.grow is None else self.grow + RECENT * (grown - self.grow)
        if self.stopped > MOST_STOPS:  # the past cannot outweigh the present
            self.stopped, self.returned = self.stopped // 2, self.returned // 2


class Habits:
    """Learned from what has happened, by tenant and role. Soft and bounded, the oldest forgotten first."""

    def __init__(self) -> None:
        self._stops: OrderedDict[tuple[str, str, str], Stops] = OrderedDict()
        self._agents: OrderedDict[tuple[str, str, str], Stops] = OrderedDict()
        self._openings: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._courses: OrderedDict[tuple[str, str], Course] = OrderedDict()

    def stopped(self, step: Step) -> Stops:
        """A workflow is idle after this step. Whoever holds the result counts how that ends."""
        stops = _of(self._stops, step)
        stops.stopped += 1
        return stops

    def course(self, step: Step) -> Course:
        """How workflows go on that make such a step. Whoever holds the result counts how it does."""
        return _latest(self._courses, (step.session.workflow.tenant, step.role or ""), Course)

    def left(self, step: Step) -> Stops:
        """One of a workflow's sessions is idle after this step. Whoever holds the result counts how that ends."""
        return _of(self._agents, step)

    def counting(self, step: Step, left: Stops) -> float:
        """The share of its context that an agent which has so `left` counts for: the chance that it is called again.

        Who is asked once, in a run that goes on without it, holds nothing that will be needed. That the run goes on at
        all is another question, so the share is that of the agents over that of the workflows.
        """
        return min(1.0, left.share / _of(self._stops, step).share)

    def answered(self, step: Step) -> bool:
        """Whether a sub-agent has answered, and of its kind few are called again."""
        left = self.left(step)
        return answers(step) and left.stopped >= FEW and self.counting(step, left) < RARE

    def shares(self, step: Step, tokens: int) -> int:
        """The tokens of the first prompt of a session that others there are expected to hold already."""
        return int(tokens * self._openings.get((step.session.workflow.tenant, step.role or ""), 0.0))

    def opened(self, step: Step) -> None:
        """A session's first step has ended: how much of its prompt others there held is known."""
        key = step.session.workflow.tenant, step.role or ""
        known = self._openings.pop(key, None)
        share = step.usage.cached / step.usage.prompt
        self._openings[key] = share if known is None else known + RECENT * (share - known)
        if len(self._openings) > MOST:
            self._openings.popitem(last=False)


def answers(step: Step) -> bool:
    """Whether a sub-agent has ended its turn with this step."""
    return bool(step.session.parent) and kind(step.stop, step.tools) == END


def _of(stops: OrderedDict[tuple[str, str, str], Stops], step: Step) -> Stops:
    key = step.session.workflow.tenant, step.role or "", kind(step.stop, step.tools)
    return _latest(stops, key, Stops)


def _latest(known: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is known under the key, the latest now; made where there is nothing. The oldest is forgotten."""
    found = known.setdefault(key, make())
    known.move_to_end(key)
    if len(known) > MOST:
        known.popitem(last=False)
    return found
