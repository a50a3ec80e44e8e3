"""Placement: which worker gets a step that has no seat yet. A policy is a class with one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler.actions import Decision
from scheduler.graph import Step
from scheduler.workers import Worker


class Placement(Protocol):
    """Chooses among workers that can serve the step now; `workers` is never empty."""

    def place(self, step: Step, workers: Sequence[Worker]) -> Decision:
        """Return the worker and the terms that decided."""
        ...


class FewestLive:
    """To the worker with the fewest live sessions, then the fewest running steps, then the fewest placed so far.

    A restarted worker has none of any, so that the next new workflows go to it.
    """

    def place(self, step: Step, workers: Sequence[Worker]) -> Decision:
        """Return the worker with the smallest (live sessions, running steps, placed, name). O(workers)."""
        chosen = min(workers, key=lambda w: (len(w.sessions), len(w.running), w.placed, w.id))
        terms = {"live_sessions": float(len(chosen.sessions)), "running_steps": float(len(chosen.running))}
        return Decision(chosen.id, "fewest-live", terms)
