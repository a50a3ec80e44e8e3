"""Placement: which worker gets a step that has no seat yet. A policy is a class with one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler.actions import Decision
from scheduler.admission import Gate
from scheduler.graph import Step
from scheduler.keeping import role_owner
from scheduler.sizes import Sizes
from scheduler.workers import Worker

ALIKE = 30.0  # seconds that make no difference: a session stays for many steps, a queue does not


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


class SoonestDone:
    """To the worker where the step is predicted to be done soonest; of those alike to the one with the fewest live.

    The terms, in seconds: what must be prefilled before it (`queue`), its own prompt less what its role shares and the
    worker holds (`prefill`), and its share of the waits where all that live there do not fit (`pressure`): what exceeds
    the capacity, over that, times what computing all of them once more takes.
    """

    def __init__(self, gate: Gate, sizes: Sizes) -> None:
        self._gate, self._sizes, self._fewest = gate, sizes, FewestLive()

    def place(self, step: Step, workers: Sequence[Worker]) -> Decision:
        """Return the worker and the seconds that decided. O(workers)."""
        tokens = self._sizes.expected(step)
        owner = role_owner(step.session.workflow.tenant, step.role)
        terms = {worker.id: self._terms(worker, owner, tokens) for worker in workers}
        least = min(sum(one.values()) for one in terms.values())
        alike = [worker for worker in workers if sum(terms[worker.id].values()) <= least + ALIKE]
        chosen = self._fewest.place(step, alike)
        if len(alike) == len(workers):
            return chosen
        return Decision(chosen.worker, "soonest-done", {n: round(s, 3) for n, s in terms[chosen.worker].items()})

    def _terms(self, worker: Worker, owner: str, tokens: int) -> dict[str, float]:
        book, rates = self._gate.book(worker), worker.rates
        over = book.demand + tokens - book.capacity if book.capacity else 0
        return {
            "queue_seconds": sum(book.prefills.values()),
            "prefill_seconds": rates.seconds(sum(worker.residency.tokens(owner)), tokens),
            "pressure_seconds": max(0, over) / book.capacity * book.cost if book.capacity else 0.0,
        }
