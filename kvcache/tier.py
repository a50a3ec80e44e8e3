"""The blocks of one tier that can be evicted, in the order in which they go."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from kvcache.ledger import Key, Ledger, Span
from kvcache.order import Order
from kvcache.policy import Policy

Name = TypeVar("Name", bound=Hashable)
"""What names a block in its tier."""


class Stack(Generic[Name]):
    """Free blocks of a span that were freed together, each with its place; the first to go is the last of `blocks`."""

    __slots__ = ("_tier", "blocks", "freed", "span")

    def __init__(self, tier: Tier[Name], span: Span, freed: float, blocks: dict[Name, tuple[Key, int]]) -> None:
        self._tier, self.span, self.freed, self.blocks = tier, span, freed, blocks
        span.free[self] = None

    @property
    def owners(self) -> Collection[str]:
        """The owners that count; none: dead."""
        return self.span.ranked_by

    @property
    def tokens(self) -> int:
        """What it holds."""
        return len(self.blocks) * self._tier.block

    def changed(self, now: float) -> None:
        """The owners have changed: it has another place in the order."""
        self._tier.order.add(self, now)

    def parted(self, keys: Collection[Key], span: Span, now: float) -> None:
        """Those of the blocks that have these keys are another span's now."""
        mine = {name: block for name, block in self.blocks.items() if block[0] in keys}
        if not mine:
            return
        if len(mine) == len(self.blocks):
            del self.span.free[self]
            self.span = span
            span.free[self] = None
            self.changed(now)
            return
        for name in mine:
            del self.blocks[name]
        self._tier.add(self, now)
        self._tier.add(Stack(self._tier, span, self.freed, mine), now)


class Tier(Generic[Name]):
    """Evictable blocks of `block` tokens, ranked by their owners under a policy. Times in seconds.

    Whoever calls tells the policy of an owner's event, then `order.changed`. O(log stacks) for each stack put or taken
    and O(1) for each block.
    """

    def __init__(self, policy: Policy, ledger: Ledger, block: int) -> None:
        self.block = block
        self.order: Order[Stack[Name]] = Order(policy)
        self._ledger = ledger
        self._stacks: dict[Name, Stack[Name]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._stacks)

    def __contains__(self, name: Name) -> bool:
        return name in self._stacks

    def __iter__(self) -> Iterator[Name]:
        """All blocks, the first to go first, by the ranks as they are."""
        for stack in self.order:
            yield from reversed(stack.blocks)

    def put(self, blocks: Iterable[tuple[Name, Key]], now: float) -> None:
        """These blocks can be evicted from now on, of each owner the first named first. Their keys are known."""
        run: list[tuple[Name, tuple[Key, int]]] = []
        span: Span | None = None
        for name, key in blocks:
            its = self._ledger.span(key)
            assert its is not None, "a block that the ledger does not know"
            if its is not span:
                self._stack(span, run, now)
                run, span = [], its
            self._count += 1
            run.append((name, (key, self._count)))
        self._stack(span, run, now)

    def take(self, count: int, now: float) -> list[tuple[Name, Key]]:
        """Take the next blocks to evict, as many as asked for; there must be as many."""
        taken: list[tuple[Name, Key]] = []
        while len(taken) < count:
            stack = self.order.first(now)
            assert stack is not None, "more blocks than can be evicted"
            for _ in range(min(count - len(taken), len(stack.blocks))):
                name, (key, _) = stack.blocks.popitem()
                del self._stacks[name]
                taken.append((name, key))
            if not stack.blocks:
                self._drop(stack)
        return taken

    def remove(self, name: Name) -> None:
        """The block is in use again, or gone. KeyError where it is not here."""
        stack = self._stacks.pop(name)
        del stack.blocks[name]
        if not stack.blocks:
            self._drop(stack)

    def clear(self) -> None:
        """Nothing can be evicted."""
        for stack in list(self.order):
            self._drop(stack)
        self._stacks.clear()

    def add(self, stack: Stack[Name], now: float) -> None:
        """Let a stack join the order."""
        for name in stack.blocks:
            self._stacks[name] = stack
        self.order.add(stack, now, next(reversed(stack.blocks.values()))[1])

    def _stack(self, span: Span | None, run: list[tuple[Name, tuple[Key, int]]], now: float) -> None:
        if span is not None:
            self.add(Stack(self, span, now, dict(reversed(run))), now)

    def _drop(self, stack: Stack[Name]) -> None:
        self.order.discard(stack)
        del stack.span.free[stack]
