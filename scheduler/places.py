"""Places in line inside engines: by arrival, and by how far a step stands back."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.actions import Reprioritise
from scheduler.graph import Step

PLACES = 10  # of a second
MOVED = 1.0  # seconds by which a place must have changed for its engine to be told


class Places:
    """The priorities of the steps that engines have; `back` says how many seconds a step stands back.

    The lowest goes first, and is preempted last. Until somebody stands back all have 0, and first come is first served.
    """

    def __init__(self, back: Callable[[Step], float]) -> None:
        self._back = back
        self._ordered, self._began = False, 0.0
        self._told: dict[str, tuple[Step, int]] = {}

    def __len__(self) -> int:
        return len(self._told)

    def given(self, step: Step) -> int:
        """The priority of a step that is sent to an engine now."""
        self._began = self._began or step.arrived
        self._ordered = self._ordered or self._back(step) > 0
        place = self._place(step)
        self._told[step.id] = step, place
        return place

    def left(self, step: Step) -> None:
        """The step has left its engine."""
        self._told.pop(step.id, None)

    def moved(self) -> list[Reprioritise]:
        """What engines are to be told of steps whose place is another one now. O(steps in engines)."""
        self._ordered = self._ordered or any(self._back(step) > 0 for step, _ in self._told.values())
        said = []
        for name, (step, told) in self._told.items() if self._ordered else ():
            place = self._place(step)
            if abs(place - told) >= MOVED * PLACES and step.decision is not None:
                self._told[name] = step, place
                said.append(Reprioritise(step.decision.worker, step.branch.id, place))
        return said

    def _place(self, step: Step) -> int:
        return int(PLACES * (step.arrived + self._back(step) - self._began)) if self._ordered else 0
