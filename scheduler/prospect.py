"""How a run may go on: draws of what is left of it, by playing it to its end many times (as MCPP estimates, by
simulation).

A run whose template has several roles plays that template's game of tokens. One of a single role goes on as sessions of
that role do: so many more steps, each after a gap.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from scheduler.gaps import Gap
from scheduler.lengths import StepsLeft
from scheduler.position import Position
from scheduler.template import ALL, ANY, ONE, Edge, Template

MOST = 200  # events of one draw: what would come later is left out
DRAWN = 4  # steps of a session that are drawn one by one; more take as long as these did
SPREAD = 0.6  # of a duration whose mean alone is known, as the sigma of a log-normal
LONGEST = 2_000  # steps of a session
CERTAIN = 0.999
_BELL, _MASK = NormalDist(), (1 << 64) - 1


class Dice:
    """Uniform numbers in [0, 1), the same ones for the same seed (SplitMix64: Steele et al., 2014)."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def __call__(self) -> float:
        """The next one."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = (self._state ^ (self._state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
        return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Rest:
    """One way in which a run may go on: seconds to its end, and tokens, prompts and outputs, until then."""

    seconds: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Line:
    """A session of a run: how many steps are `left` since the end of its last one, the one that runs among them.

    `tokens` are those of a step, its prompt and its output.
    """

    running: bool
    left: StepsLeft
    gap: Gap
    seconds: float
    tokens: float

    def draw(self, dice: Dice) -> Rest:
        """One way in which it may go on."""
        steps = max(int(self.running), min(LONGEST, self.left.quantile(min(CERTAIN, dice()))))
        gaps = [self.gap.spread.quantile(dice()) for _ in range(min(steps - self.running, DRAWN))]
        work = [_about(self.seconds, dice) for _ in range(min(steps, DRAWN))]
        seconds = _mean(gaps) * (steps - self.running) + _mean(work) * steps
        return Rest(seconds, steps * self.tokens)


def side_by_side(lines: Iterable[Line], dice: Dice) -> Rest:
    """One way in which sessions that run beside each other may go on."""
    drawn = [line.draw(dice) for line in lines]
    return Rest(max((one.seconds for one in drawn), default=0.0), sum(one.tokens for one in drawn))


class Game:
    """A template's game of tokens. An "all" waits for as many tokens as it takes, or for all that can still come."""

    def __init__(self, template: Template) -> None:
        self.template = template
        place = {role: i for i, role in enumerate(template.order)}
        ahead = [edge for edge in template.edges if place[edge.source] < place[edge.target]]
        self._needs = {
            role: 1.0 if node.join == ANY else float(node.join) if node.join != ALL
            else node.takes or float(max(1, sum(edge.target == role for edge in ahead)))
            for role, node in template.nodes.items()
        }  # fmt: skip

    def draw(self, position: Position, dice: Dice) -> Rest:
        """One way in which a run that stands there may go on."""
        return _Draw(self.template, self._needs, dice).played(position)


class _Draw:
    """`_events` are ends of steps, where there is no edge, and arrivals of tokens."""

    def __init__(self, template: Template, needs: dict[str, float], dice: Dice) -> None:
        self._template, self._needs, self._dice = template, needs, dice
        self._events: list[tuple[float, int, str, Edge | None]] = []
        self._have: dict[str, float] = {}
        self._number = 0
        self._tokens = 0.0

    def played(self, position: Position) -> Rest:
        nodes, now = self._template.nodes, 0.0
        for role, steps in position.running.items():
            for _ in range(steps if role in nodes else 0):
                self._start(role, -position.runs.get(role, 0.0))
        for role, steps in position.finished.items():
            for _ in range(steps):
                self._end(role, -position.rests.get(role, 0.0))
        for edge in self._template.edges:
            self._send(edge, position.open.get((edge.source, edge.target), 0.0), 0.0)
        while self._number < MOST:
            if not self._events:
                late = next((role for role in self._template.order if self._waits(role)), None)
                if late is None:
                    break
                self._have.pop(late)
                self._start(late, now)
                continue
            at, _, role, along = heapq.heappop(self._events)
            now = max(now, at)
            if along is None:
                self._end(role, now)
            else:
                self._arrive(role, now)
        return Rest(now, self._tokens)

    def _waits(self, role: str) -> bool:
        return role in self._have and self._template.nodes[role].join == ALL

    def _start(self, role: str, at: float) -> None:
        node = self._template.nodes[role]
        self._tokens += (node.prompt_tokens or 0.0) + (node.output_tokens or 0.0)
        self._push(max(0.0, at + _about(node.seconds or 0.0, self._dice)), role, None)

    def _end(self, role: str, at: float) -> None:
        ways = self._template.leaving(role)
        if ways and self._template.nodes[role].fork == ONE:
            chance = self._dice()
            for edge in ways:
                chance -= edge.probability
                if chance < 0:
                    self._send(edge, edge.count, at)
                    return
            return
        for edge in ways:
            if self._dice() < edge.probability:
                self._send(edge, edge.count, at)

    def _send(self, edge: Edge, tokens: float, at: float) -> None:
        whole = int(tokens) + (self._dice() < tokens % 1.0)
        for _ in range(min(whole, MOST - self._number)):
            self._push(max(0.0, at + _about(edge.gap_seconds or 0.0, self._dice)), edge.target, edge)

    def _arrive(self, role: str, now: float) -> None:
        have = self._have.pop(role, 0.0) + 1.0
        need = self._needs[role]
        if have >= need - 1e-9:
            have -= need
            self._start(role, now)
        if have > 1e-9:
            self._have[role] = have

    def _push(self, at: float, role: str, edge: Edge | None) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, role, edge))


def _about(mean: float, dice: Dice) -> float:
    """A duration of this mean."""
    return mean * math.exp(SPREAD * (_BELL.inv_cdf(dice() or 0.5) - SPREAD / 2)) if mean else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
