"""Transitions: which role comes next in a run, from the step that has just ended. Counted online, with back-off.

The probability of a role after a context is (n + 2 d p) / (N + 2 d), with n of the N steps after it of that role, d
different ones among them, and p the probability after the shorter context: from the whole context (role, tools called,
role before) over (role, tools) and (role) down to all steps and to equal shares. This is Witten and Bell's smoothing
(1991, method C) with twice the weight: a habit is trusted at once, a context in which anything may follow hardly.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

PRIOR = 2.0
MOST_CONTEXTS, MOST_OUTCOMES = 4096, 256
MEMORY = 512.0  # observations of a context, above which old ones count half

Role = str | None
Level = tuple[str | tuple[str, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """A step that has ended: its role, the tools that it called, and the role of the step before it."""

    role: str
    tools: frozenset[str] = frozenset()
    before: str | None = None

    def levels(self) -> tuple[Level, ...]:
        """From all steps to this context."""
        tools = tuple(sorted(self.tools))
        return (), (self.role,), (self.role, tools), (self.role, tools, self.before)


@dataclass(slots=True)
class _Counts:
    total: float = 0.0
    of: dict[Role, float] = field(default_factory=dict)

    def add(self, outcome: Role) -> None:
        self.total += 1.0
        self.of[outcome] = self.of.get(outcome, 0.0) + 1.0
        if self.total > MEMORY or len(self.of) > MOST_OUTCOMES:
            self.of = {role: n / 2 for role, n in self.of.items() if n > 1.0}
            self.total = sum(self.of.values())


class Transitions:
    """What has followed what. O(outcomes) a call; at most 4096 contexts, the longest unused forgotten."""

    def __init__(self) -> None:
        self._counts: OrderedDict[Level, _Counts] = OrderedDict()

    def observe(self, context: Context, role: Role) -> None:
        """After such a step came a step of `role`, or None: the run ended."""
        for level in reversed(context.levels()):  # the shorter outlive the longer
            self._counts.setdefault(level, _Counts()).add(role)
            self._counts.move_to_end(level)
        while len(self._counts) > MOST_CONTEXTS:
            self._counts.popitem(last=False)

    def predict(self, context: Context) -> dict[Role, float]:
        """The probability of each role seen so far, None for the end; what they lack to 1 is that of an unseen one."""
        known = self._counts.get((), _Counts())
        share = 1.0 / (len(known.of) + 1)
        predicted = dict.fromkeys(known.of, share)
        for level in context.levels():
            counts = self._counts.get(level)
            if counts and counts.of:
                prior = PRIOR * len(counts.of)
                predicted = {role: p * prior / (counts.total + prior) for role, p in predicted.items()}
                for role, n in counts.of.items():
                    predicted[role] = predicted.get(role, 0.0) + n / (counts.total + prior)
        return predicted

    def dump(self) -> list[Any]:
        """All of it as plain JSON values."""
        return [[list(level), list(counts.of.items())] for level, counts in self._counts.items()]

    @classmethod
    def load(cls, dumped: list[Any]) -> Transitions:
        """What `dump` gave."""
        transitions = cls()
        for level, outcomes in dumped:
            key = tuple(tuple(part) if isinstance(part, list) else part for part in level)
            of = {role: float(n) for role, n in outcomes}
            transitions._counts[key] = _Counts(sum(of.values()), of)
        return transitions
