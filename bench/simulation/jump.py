"""A call in a modelled engine, and the steps of one batch that it takes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.simulation.shelf import Held
from bench.simulation.system import Turn


@dataclass(slots=True, eq=False)
class Sequence:
    """A call in the engine. `target` tokens are to be prefilled, `done` are; `private` blocks are its own."""

    turn: Turn
    size: int
    target: int
    done: int = 0
    generated: int = 0
    private: int = 0
    line: Held | None = None
    seen: bool = False
    tries: int = 0


@dataclass(slots=True)
class Jump:
    """`steps` steps of one batch from `start` on: step i takes `base + slope i` seconds; each prefills `chunks`."""

    start: float
    steps: int
    base: float
    slope: float
    chunks: list[tuple[Sequence, int]]

    def seconds(self, steps: int) -> float:
        """The time of the first steps."""
        return self.base * steps + self.slope * steps * (steps - 1) / 2

    def covering(self, seconds: float) -> int:
        """The fewest steps that take at least so long."""
        if seconds <= 0:
            return 0
        if self.slope:
            half = self.base - self.slope / 2
            steps = math.ceil((math.sqrt(half * half + 2 * self.slope * seconds) - half) / self.slope - 1e-9)
        else:
            steps = math.ceil(seconds / self.base - 1e-9)
        return max(1, steps)
