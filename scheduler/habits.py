"""What workflows usually do at the gate: whether they come back after a stop, and what their sessions begin with."""

from __future__ import annotations

from collections import OrderedDict

from scheduler.estimates import END, kind
from scheduler.graph import Step

FEW, RARE = 12, 0.25  # stops of a kind from which on something is concluded, and the share that is few
HOPE = 3  # workflows that are taken to have come back after every kind of stop
MOST, RECENT = 10_000, 0.1  # of which something is known, the latest; the weight of a new sample

Standing = list[int]
"""How many workflows, or agents of theirs, stopped so, and how many of them came back."""


class Habits:
    """Learned from what has happened, by tenant and role. Soft and bounded, the oldest forgotten first."""

    def __init__(self) -> None:
        self._stops: OrderedDict[tuple[str, str, str], Standing] = OrderedDict()
        self._agents: OrderedDict[tuple[str, str, str], Standing] = OrderedDict()
        self._openings: OrderedDict[tuple[str, str], float] = OrderedDict()

    def stopped(self, step: Step) -> Standing:
        """A workflow is idle after this step. Whoever holds the result says `standing[1] += 1` when it is back."""
        standing = _of(self._stops, step)
        standing[0] += 1
        return standing

    def left(self, step: Step) -> Standing:
        """One of a workflow's sessions is idle after this step. Whoever holds the result counts how that ends."""
        return _of(self._agents, step)

    def counting(self, step: Step, left: Standing) -> float:
        """The share of its context that an agent which has so `left` counts for: all, unless few are called again.

        Who is asked once, in a run that goes on without it, holds nothing that will be needed. That the run goes on at
        all is another question, so the share is that of the agents over that of the workflows.
        """
        share = returning(left) / returning(_of(self._stops, step))
        return share if left[0] >= FEW and share < RARE else 1.0

    def answered(self, step: Step) -> bool:
        """Whether a sub-agent has answered, and of its kind few are called again."""
        return answers(step) and self.counting(step, self.left(step)) < 1.0

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


def _of(stops: OrderedDict[tuple[str, str, str], Standing], step: Step) -> Standing:
    key = step.session.workflow.tenant, step.role or "", kind(step.stop, step.tools)
    standing = stops.setdefault(key, [0, 0])
    stops.move_to_end(key)
    if len(stops) > MOST:
        stops.popitem(last=False)
    return standing


def returning(standing: Standing | None) -> float:
    """The share that came back after such a stop.

    A workflow that is still away counts as gone, so that an end is known from the first runs on, long before any has
    been given up; an agent that is counts for nothing yet, as many of a run may begin at once.
    """
    stopped, returned = standing or (0, 0)
    return (returned + HOPE) / (stopped + HOPE)
