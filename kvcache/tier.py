"""The blocks of one tier that can be evicted, in the order in which they go."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from itertools import groupby
from typing import Generic, TypeVar

from kvcache.ledger import Ledger
from kvcache.order import Order
from kvcache.policy import Policy
from kvcache.span import MOST_OWNERS, Key, Span

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
        owners = self.span.owners
        return owners if len(owners) <= MOST_OWNERS else self.span.ranked_by

    @property
    def tokens(self) -> int:
        """What it holds."""
        return len(self.blocks) * self._tier.block

    @property
    def place(self) -> int:
        """That of the block that goes first."""
        return next(reversed(self.blocks.values()))[1]

    def move(self, span: Span) -> None:
        """All its blocks are this span's now."""
        del self.span.free[self]
        self.span = span
        span.free[self] = None

    def changed(self, now: float) -> None:
        """The owners have changed: it has another place in the order."""
        self._tier.order.add(self, now)


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
        self._names: dict[Key, Name] = {}  # of the first free copy of a block
        self._doubles: dict[Key, list[Name]] = {}  # of the others
        self._count = 0
        ledger.tiers.append(self)

    def __len__(self) -> int:
        return len(self._stacks)

    def __contains__(self, name: Name) -> bool:
        return name in self._stacks

    def __iter__(self) -> Iterator[Name]:
        """All blocks, the first to go first, by the ranks as they are."""
        for stack in self.order:
            yield from reversed(stack.blocks)

    def stack(self, name: Name) -> Stack[Name] | None:
        """The stack that a block is in; None where it cannot be evicted."""
        return self._stacks.get(name)

    def put(self, blocks: Iterable[tuple[Name, Key]], now: float) -> None:
        """These blocks can be evicted from now on, of each owner the first named first. Their keys are known."""
        run: list[tuple[Name, tuple[Key, int]]] = []
        span: Span | None = None
        for name, key in blocks:
            its = self._ledger.span(key)
            assert its is not None, "a block that the ledger does not know"
            if its is not span:
                self._push(span, run, now)
                run, span = [], its
            self._count += 1
            if self._names.setdefault(key, name) != name:
                self._doubles.setdefault(key, []).append(name)
            run.append((name, (key, self._count)))
        self._push(span, run, now)

    def take(self, count: int, now: float) -> list[tuple[Name, Key]]:
        """Take the next blocks to evict, as many as asked for; there must be as many."""
        taken: list[tuple[Name, Key]] = []
        while len(taken) < count:
            stack = self.order.first(now)
            assert stack is not None, "more blocks than can be evicted"
            taken += self.pop(stack, min(count - len(taken), len(stack.blocks)))
        return taken

    def pop(self, stack: Stack[Name], count: int) -> list[tuple[Name, Key]]:
        """Take the next blocks of a stack, which has as many."""
        taken: list[tuple[Name, Key]] = []
        blocks, stacks, names, doubles = stack.blocks, self._stacks, self._names, self._doubles
        for _ in range(count):
            name, (key, _) = blocks.popitem()
            del stacks[name]
            if key in doubles:
                self._unname(name, key)
            else:
                del names[key]
            taken.append((name, key))
        if not blocks:
            self._drop(stack)
        return taken

    def remove(self, name: Name) -> None:
        """The block is in use again, or gone. KeyError where it is not here."""
        stack = self._stacks.pop(name)
        key, _ = stack.blocks.pop(name)
        self._unname(name, key)
        if not stack.blocks:
            self._drop(stack)

    def clear(self) -> None:
        """Nothing can be evicted."""
        for stack in list(self.order):
            self._drop(stack)
        self._stacks.clear()
        self._names.clear()
        self._doubles.clear()

    def parted(self, keys: Collection[Key], span: Span, now: float) -> None:
        """Those of the free blocks that have these keys are this span's now, which still has the same owners.

        O(blocks of the stacks touched).
        """
        moved: dict[Stack[Name], list[Name]] = {}
        for key in keys:
            if key in self._names:
                for name in (self._names[key], *self._doubles.get(key, ())):
                    moved.setdefault(self._stacks[name], []).append(name)
        for stack, names in moved.items():
            if len(names) == len(stack.blocks):
                stack.move(span)
                continue
            self._split(stack, frozenset(names), span, now)

    def _split(self, stack: Stack[Name], names: Collection[Name], span: Span, now: float) -> None:
        """These blocks of a stack are another span's: what lies between others is a stack of its own, so that all go in
        the order in which they would have gone together."""
        runs = [dict(run) for _, run in groupby(stack.blocks.items(), lambda item: item[0] in names)]
        rest = None
        for run in runs:
            if next(iter(run)) in names:
                self._add(Stack(self, span, stack.freed, run), now)
            elif rest is None:
                rest = run
            else:
                self._add(Stack(self, stack.span, stack.freed, run), now)
        assert rest is not None
        stack.blocks = rest
        self.order.add(stack, now, stack.place)

    def _add(self, stack: Stack[Name], now: float) -> None:
        for name in stack.blocks:
            self._stacks[name] = stack
        self.order.add(stack, now, stack.place)

    def _push(self, span: Span | None, run: list[tuple[Name, tuple[Key, int]]], now: float) -> None:
        if span is not None:
            self._add(Stack(self, span, now, dict(reversed(run))), now)

    def _unname(self, name: Name, key: Key) -> None:
        first = self._names.pop(key)
        if (others := self._doubles.pop(key, None)) is not None:
            others = [one for one in (first, *others) if one != name]
            self._names[key] = others[0]
            if others[1:]:
                self._doubles[key] = others[1:]

    def _drop(self, stack: Stack[Name]) -> None:
        self.order.discard(stack)
        del stack.span.free[stack]
