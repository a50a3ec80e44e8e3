"""Positions: where a run stands in its template, kept up to date as its steps come and go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scheduler.template import ONE, Key, Template

MOST_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Position:
    """How many steps of each role run, and what those that finished are still to bring; all numbers are positive.

    `finished`: steps per role that no step follows yet. `open`: tokens per edge still expected of a fan-out of which
    some steps have come. `runs` and `rests`: seconds since the first of a role's steps that run began, and since the
    first of those that finished ended; empty where nobody asked.
    """

    running: Mapping[str, int] = field(default_factory=dict)
    finished: Mapping[str, int] = field(default_factory=dict)
    open: Mapping[Key, float] = field(default_factory=dict)
    runs: Mapping[str, float] = field(default_factory=dict)
    rests: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Step:
    """`at` it began or ended; `followers`: steps per role that follow it; `closed` where no more are expected."""

    role: str
    after: tuple[str, ...]
    at: float
    running: bool = True
    followers: dict[str, int] = field(default_factory=dict)
    closed: bool = False


class Progress:
    """The steps of one run that matter for what comes next: those that run, and those not all of whose followers came.

    Steps that follow the same one come together: when the first of them finishes, no more are expected. At most 1024
    steps are kept, the oldest forgotten.
    """

    def __init__(self) -> None:
        self._steps: OrderedDict[str, _Step] = OrderedDict()

    def came(self, step: str, role: str, after: Sequence[str], now: float = 0.0) -> tuple[list[str], list[set[str]]]:
        """A step has come that follows others. Returns those's roles, and the roles that followed each before it."""
        sources = [one for name in after if (one := self._steps.get(name))]
        roles = [one.role for one in sources]
        siblings = [set(one.followers) for one in sources]
        for one in sources:
            one.followers[role] = one.followers.get(role, 0) + 1
            for name in one.after:
                self._steps.pop(name, None)
        self._steps[step] = _Step(role, tuple(after), now)
        if len(self._steps) > MOST_STEPS:
            self._steps.popitem(last=False)
        return roles, siblings

    def finished(self, step: str, now: float = 0.0) -> None:
        """A step has ended well."""
        if one := self._steps.get(step):
            one.running, one.at = False, now
            for name in one.after:
                if source := self._steps.get(name):
                    source.closed = True

    def failed(self, step: str) -> None:
        """A step has failed: it counts for nothing, and the step that repeats it follows the same ones."""
        one = self._steps.pop(step, None)
        for name in one.after if one else ():
            if one and (source := self._steps.get(name)):
                source.followers[one.role] -= 1
                if not source.followers[one.role]:
                    del source.followers[one.role]

    def give(self, steps: set[str], other: Progress) -> None:
        """Some of the steps turned out to be another run's."""
        taken = Progress()
        for name in [name for name in self._steps if name in steps]:
            taken._steps[name] = self._steps.pop(name)
        other.absorb(taken)

    def absorb(self, other: Progress) -> None:
        """Another run turned out to be a part of this one."""
        self._steps.update(other._steps)
        while len(self._steps) > MOST_STEPS:
            self._steps.popitem(last=False)

    def leaves(self) -> list[str]:
        """The roles of the steps that nothing follows: where the lines of the run end, when the run does."""
        return [one.role for one in self._steps.values() if not one.followers]

    def position(self, template: Template, now: float | None = None) -> Position:
        """Where the run stands in this template, and since when if the time is given. O(steps kept)."""
        running: dict[str, int] = {}
        finished: dict[str, int] = {}
        opened: dict[Key, float] = {}
        runs: dict[str, float] = {}
        rests: dict[str, float] = {}
        for one in self._steps.values():
            if one.followers and not one.running:
                for key, tokens in _missing(one, template) if not one.closed else ():
                    opened[key] = opened.get(key, 0.0) + tokens
                continue
            steps, since = (running, runs) if one.running else (finished, rests)
            steps[one.role] = steps.get(one.role, 0) + 1
            if now is not None:
                since[one.role] = max(since.get(one.role, 0.0), now - one.at)
        return Position(running, finished, opened, runs, rests)


def _missing(step: _Step, template: Template) -> list[tuple[Key, float]]:
    """Tokens that a fan-out has not brought yet: of the edge taken where it is a choice, else of all its edges."""
    missing = []
    for edge in template.leaving(step.role):
        came = step.followers.get(edge.target, 0)
        tokens = edge.count - came if came else edge.probability * edge.count
        if tokens > 0 and (came or template.nodes[step.role].fork != ONE):
            missing.append(((edge.source, edge.target), tokens))
    return missing
