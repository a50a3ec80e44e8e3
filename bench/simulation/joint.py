"""Device and host memory that are ranked as one, as our plug-in does it: a block counts where the device has it.

What the host has of that takes no room there, as it goes first in the real tier (`kvcache/joint.py`). What the device
gives up stays in the host, in place of what is worth least there, perhaps of itself.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.simulation.shelf import Held, Shelf
from bench.workloads.runs import Piece
from kvcache.policy import Policy


class Upper(Shelf):
    """The device over a `lower` tier."""

    def __init__(self, blocks: int, block: int, policy: Policy, lower: Lower) -> None:
        super().__init__(blocks, block, policy)
        self.lower = lower
        lower.upper = self

    def _resize(self, held: Held, by: int) -> None:
        before = held.blocks
        super()._resize(held, by)
        self.lower.mirrored(held.piece, before, held.blocks)


class Lower(Shelf):
    """The host under an `upper` tier: what both hold counts as free here."""

    upper: Shelf

    def __init__(self, blocks: int, block: int, policy: Policy, clock: Callable[[], float]) -> None:
        super().__init__(blocks, block, policy)
        self.shared, self._clock = 0, clock

    def store(self, piece: Piece, now: float) -> int:
        """Take a line over that the device has whole. Returns the blocks added."""
        held = self.pin(piece, now)
        added = self._lacks(piece)
        self.free -= added
        self._grow(held, added)
        self.unpin(held, now)
        self._trim(now)
        return added

    def mirrored(self, piece: Piece, before: int, after: int) -> None:
        """The device has another number of a piece's blocks."""
        if (held := self.held.get(piece)) is not None:
            self._share(min(after, held.blocks) - min(before, held.blocks))
            self._trim(self._clock())

    def check(self) -> None:
        """Raise AssertionError where a counter and what it counts disagree."""
        total = sum(held.blocks for held in self.held.values())
        assert self.shared == sum(self._above(held) for held in self.held.values()), "shared blocks are miscounted"
        assert 0 <= self.free == self.blocks - self.private - total + self.shared, "blocks are lost or doubled"

    def _resize(self, held: Held, by: int) -> None:
        before = self._above(held)
        super()._resize(held, by)
        self._share(self._above(held) - before)

    def _share(self, more: int) -> None:
        self.shared += more
        self.free += more

    def _above(self, held: Held) -> int:
        """How many of its blocks the device has, too."""
        other = self.upper.held.get(held.piece)
        return min(held.blocks, other.blocks) if other is not None else 0

    def _trim(self, now: float) -> None:
        """Give up what is worth least of that which only the host has, as much as is too much."""
        aside = []
        while self.free < 0:
            stack = self.order.first(now)
            assert stack is not None, "what only the host has ends in a tip"
            taken = min(-self.free, stack.blocks - self._above(stack))
            if taken:
                self.free += taken
                self._resize(stack, -taken)
            if self.free < 0 or not stack.blocks:
                self.order.discard(stack)
            if stack.blocks:
                aside.append(stack)
            else:
                self._settle(stack, now)
        for stack in aside:
            self.order.add(stack, now)
