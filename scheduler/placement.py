"""Placement: which worker gets a step that has no seat yet. A policy is a class with one method."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from itertools import chain, islice
from typing import Protocol

from scheduler.actions import Decision
from scheduler.admission import Gate
from scheduler.graph import Step
from scheduler.keeping import role_owner
from scheduler.sizes import Sizes
from scheduler.workers import Worker

RELATIVES, CANDIDATES = 8, 32  # sessions, and workers, that are looked at
TERMS = ("queue", "prefill", "pressure")
Terms = tuple[float, float, float]
ALIKE = 30.0  # seconds that make no difference: a session stays for many steps, a queue does not


class Placement(Protocol):
    """Chooses among workers that can serve the step now; `workers` is never empty."""

    def place(self, step: Step, workers: Sequence[Worker]) -> Decision:
        """Return the worker and the terms that decided."""
        ...


class SoonestDone:
    """To the worker where the step is predicted to be done soonest; of those alike to its workflow's, else to the one
    with the fewest workflows that are likely to call again, then the fewest live sessions, running steps and steps
    placed so far. A restarted worker has none of any, so that the next new workflows go to it.

    The terms, in seconds: what must be prefilled before it (`queue`), its own prompt less what it shares with others
    there (`prefill`), and its share of the waits where all that live there do not fit (`pressure`): what exceeds the
    capacity, over that, times what computing all of them once more takes. So siblings go where their common prefix is,
    until that worker is the bottleneck. Of many workers those are compared whose memory is asked for least, and its
    workflow's.
    """

    def __init__(self, gate: Gate, sizes: Sizes) -> None:
        self._gate, self._sizes = gate, sizes

    def place(self, step: Step, workers: Sequence[Worker]) -> Decision:
        """Return the worker and the seconds that decided. O(workers)."""
        tokens = self._sizes.expected(step)
        home, shared = _home(step, workers), self._gate.habits.shares(step, tokens)
        if len(workers) > CANDIDATES:
            least = nsmallest(CANDIDATES, workers, key=self._load)
            workers = least if home is None or home in least else [home, *least]
        role = role_owner(step.session.workflow.tenant, step.role)
        terms = {}
        for worker in workers:
            had = max(sum(worker.residency.tokens(role)), shared if worker is home else 0)
            terms[worker.id] = self._terms(worker, tokens, had, step.arrived)
        most = min(map(sum, terms.values())) + ALIKE
        alike = [worker for worker in workers if sum(terms[worker.id]) <= most]
        if home is not None and home in alike:
            return Decision(home.id, "with-workflow", _told(terms[home.id]))
        chosen = min(alike, key=self._live)
        if len(alike) == len(workers):
            told = {"live_sessions": float(len(chosen.sessions)), "running_steps": float(len(chosen.running))}
            return Decision(chosen.id, "fewest-live", told)
        return Decision(chosen.id, "soonest-done", _told(terms[chosen.id]))

    def _live(self, worker: Worker) -> tuple[int, int, int, int, str]:
        present = min(self._gate.book(worker).present, worker.sessions.workflows)
        return present, len(worker.sessions), len(worker.running), worker.placed, worker.id

    def _load(self, worker: Worker) -> tuple[float, tuple[int, int, int, int, str]]:
        book = self._gate.book(worker)
        return book.demand / book.capacity if book.capacity else 0.0, self._live(worker)

    def _terms(self, worker: Worker, tokens: int, had: int, now: float) -> Terms:
        book = self._gate.book(worker)
        capacity, pressure = book.capacity, 0.0
        if capacity and (over := book.demand + tokens - had - capacity) > 0:
            pressure = over / capacity * book.cost
        return book.pending(now), worker.rates.seconds(had, tokens), pressure


def _home(step: Step, workers: Sequence[Worker]) -> Worker | None:
    """Where the session's parent sits, or else the session of its workflow that came last."""
    workflow = step.session.workflow
    parent = workflow.sessions.get(step.session.parent or "")
    relatives = islice(chain([parent] if parent else [], reversed(workflow.sessions.values())), RELATIVES)
    seats = [seat for session in relatives for seat in session.seats.values()]
    at = {worker.seat: worker for worker in workers} if seats else {}
    return next((at[seat] for seat in seats if seat in at), None)


def _told(terms: Terms) -> dict[str, float]:
    return {f"{name}_seconds": round(seconds, 3) for name, seconds in zip(TERMS, terms, strict=True)}
