"""A call in a modelled engine, and the steps of one batch that it takes at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.simulation.shelf import Held
from bench.simulation.system import Turn
from bench.workloads.runs import common


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

    @property
    def left(self) -> int:
        """Tokens that are to be prefilled yet."""
        return self.target - self.done

    def needs(self, block: int) -> int:
        """The blocks of `block` tokens that it needs beyond those of its prompt."""
        return math.ceil(self.target / block) - self.turn.call.prompt.end // block

    def growth(self, steps: int, block: int) -> int:
        """The blocks that it needs, while it decodes, for so many more tokens."""
        return max(0, math.ceil((self.size + self.generated + steps) / block) - self.size // block - self.private)


def dealt(prefilling: Iterable[Sequence], room: int, most: int) -> list[tuple[Sequence, int]]:
    """What each gets of `room` tokens of a step, in their order, of which one may take `most`."""
    chunks = []
    for one in prefilling:
        if room > 0:
            chunks.append((one, min(room, one.left, most)))
            room -= chunks[-1][1]
    return chunks


def fitting(steps: int, fits: Callable[[int], bool]) -> int:
    """The most steps, up to `steps`, that fit, where all fewer do, too."""
    if fits(steps):
        return steps
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def computed(newcomer: Sequence, there: int, batch: Iterable[Sequence]) -> int:
    """How many of the first `there` tokens of a prompt, all allocated, are computed, by whoever computes them."""
    prompt = newcomer.turn.call.prompt
    shared = [(one.done, common(prompt, one.turn.call.prompt)) for one in batch if one.left > 0]
    if all(done >= min(both, there) for done, both in shared):
        return there
    return max(min(done, both) for done, both in shared)


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
