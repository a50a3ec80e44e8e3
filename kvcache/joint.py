"""Device and host as one tier: of all distinct blocks the device keeps the top by rank, and the host the next.

So the host gives up dead blocks first, then copies of what the device will keep, then the lowest. A copy of what the
device keeps is room lost: a full host takes what the device gives up just when it does, before the step begins for
which it went, and beforehand only the `margin` of what goes next, for which no step has to wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, merge
from itertools import groupby, islice
from typing import Protocol, TypeVar

from kvcache.keeper import Keeper
from kvcache.ledger import Key, Span
from kvcache.order import Order
from kvcache.policy import DEAD, INFINITY, LEASED, Rank
from kvcache.policy import Stack as Ranked

S = TypeVar("S", bound=Ranked)

SWEPT = 256
"""Chunks that the device has, too, of which the best to give up are found at once."""

TIED = 64
"""Stacks of equal rank on the host of which the deepest chunk is found at once."""

HOLDS = 0.1
"""Seconds for which it holds that there is nothing to move, unless something changes."""

WORTHLESS: Rank = (DEAD, INFINITY)
PRICELESS: Rank = (LEASED + 1, 0.0)
"""No live block ranks as low as the one, none at all as high as the other."""


class Contents(Protocol):
    """What lies where, as the engine itself sees it. The host names chunks as the keeper's host tier does."""

    def block(self, name: Key) -> int | None:
        """The device block that holds what the chunk of this name does; None: none."""
        ...

    def name(self, number: int) -> Key | None:
        """The name that a device block's content has, or would have, on the host; None: it holds nothing."""
        ...

    def stored(self, name: Key) -> bool:
        """Whether the host has this chunk or is being given it."""
        ...

    def depth(self, name: Key) -> int:
        """Where in its prompt it ends, of what is here or there."""
        ...

    @property
    def idle(self) -> int:
        """Free device blocks that hold nothing."""
        ...

    @property
    def vacant(self) -> int:
        """Host chunks that hold nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Move:
    """A device block to be copied to the host, and the chunk that goes for it, if any.

    Where in its prompt it ends in tokens; `freed` as in the block's stack, in seconds.
    """

    number: int
    name: Key
    depth: int
    freed: float
    instead: Key | None


@dataclass(frozen=True, slots=True)
class Leaving:
    """A block that the device has given up for a step that has not begun: what it held is still there.

    Where in its prompt it ends in tokens; `freed` as in its stack. The ledger knows the key.
    """

    number: int
    name: Key
    key: Key
    depth: int
    freed: float


@dataclass(slots=True)
class Wanted:
    """Blocks of a span as if they had been freed at `freed`."""

    owners: Collection[str]
    freed: float
    tokens: int = 0


def upcoming(order: Order[S], now: float) -> Iterator[S]:
    """The stacks of an order, the first to go first, O(log stacks) for each that is looked at.

    The order may not change meanwhile.
    """
    if order.first(now) is None:
        return
    heap, entries = order._heap, order._entries
    front = [(heap[0], 0)]
    while front:
        entry, place = heappop(front)
        for child in (2 * place + 1, 2 * place + 2):
            if child < len(heap):
                heappush(front, (heap[child], child))
        if entries.get(entry[3]) is entry:
            yield entry[3]


class _Chunks:
    """What the host gives up for blocks that come, one by one."""

    def __init__(
        self, contents: Contents, costless: Iterator[tuple[Key, Rank]], lowest: Iterator[tuple[Key, Rank]]
    ) -> None:
        self._contents, self._free, self._costless, self._lowest = contents, contents.vacant, costless, lowest
        self._given: set[Key] = set()
        self._copy: tuple[Key, Rank] | None = None
        self._low: tuple[Key, Rank] | None = None

    def take(self, rank: Rank, depth: int, most: int) -> list[Key | None]:
        """Places for blocks of this rank, at most so many: the chunk that goes for each, None where none must.

        Of an equal rank go those that lie deeper in their prompt than `depth`.
        """
        places: list[Key | None] = [None] * min(self._free, most)
        self._free -= len(places)
        while len(places) < most and (name := self._next(rank, depth)) is not None:
            self._given.add(name)
            places.append(name)
        return places

    def _next(self, rank: Rank, depth: int) -> Key | None:
        while (copy := self._copy or next(self._costless, None)) is not None:
            self._copy = copy
            if copy[1] <= rank:
                break
            self._copy = None
            if copy[0] not in self._given:
                return copy[0]
        while True:
            self._low = self._low or next(self._lowest, None)
            if self._low is None or not self._lower(*self._low, rank, depth):
                break
            name, self._low = self._low[0], None
            if name not in self._given:
                return name
        return None

    def _lower(self, name: Key, its: Rank, rank: Rank, depth: int) -> bool:
        return its < rank or (its == rank and self._contents.depth(name) > depth)


class Joint:
    """Says which host chunks go, which device blocks are copied to the host, and what there is room for.

    Times in seconds. Nothing is changed here but the notes on copies.
    """

    def __init__(self, keeper: Keeper, contents: Contents, margin: int) -> None:
        self._keeper, self._contents, self.margin = keeper, contents, margin
        self._copies: OrderedDict[Key, None] = OrderedDict()
        self._changes = 0
        self._idle: tuple[Hashable, float] | None = None  # for what, and since when there has been nothing to move

    def copied(self, names: Iterable[Key]) -> None:
        """The device has what these host chunks hold, as far as is known."""
        self._changes += 1
        for name in names:
            self._copies[name] = None

    def gone(self, name: Key) -> None:
        """The host has given this chunk up."""
        self._changes += 1
        self._copies.pop(name, None)

    def freed(self, name: Key) -> float | None:
        """When the device's copy of a chunk was freed; None where there is none, or it is in use."""
        number = self._contents.block(name)
        stack = None if number is None else self._keeper.device.stack(number)
        return None if stack is None else stack.freed

    def spare(self, count: int, protected: Collection[Key], now: float) -> list[Key] | None:
        """So many host chunks to give up, the first to go first; None where there are not so many."""
        going = (name for name in self._going(count + len(protected), now) if name not in protected)
        names = list(islice(going, count))
        return names if len(names) == count else None

    def vacant(self, most: int, now: float) -> int:
        """How many chunks the host can take and lose nothing, at most so many."""
        free = self._contents.vacant
        if free < most:
            free += sum(1 for _ in islice(self._dead(now), most - free))
        return min(free, most)

    def moves(self, most: int, now: float) -> list[Move]:
        """What the device gives up soon, the host has not, and is worth more than what the host gives up for it.

        That is a chunk without content, a dead one, a copy of what the device gives up later, or one of a lower rank.
        Of blocks freed together for which there are too few places, the first of their prompt are saved: the others are
        of no use without them. O(margin and its stacks) whatever the host holds, and O(1) where nothing has changed
        since there was nothing to move.
        """
        state = self._state(most)
        if self._idle is not None and self._idle[0] == state and now < self._idle[1] + HOLDS:
            return []
        found = self._found(most, now)
        self._idle = None if found else (self._state(most), now)
        return found

    def _found(self, most: int, now: float) -> list[Move]:
        found: list[Move] = []
        chunks = _Chunks(self._contents, self._costless(most, now), self._lowest(now))
        left = self.margin - self._contents.idle
        for stack in upcoming(self._keeper.device.order, now):
            if left <= 0 or len(found) == most:
                break
            if (rank := self._rank(stack, now))[0] > DEAD:
                going = list(self._unsaved(islice(reversed(stack.blocks), left)))
                deepest = max((depth for _, _, depth in going), default=0)
                places = chunks.take(rank, deepest, min(len(going), most - len(found)))
                if len(places) < len(going):
                    going = list(islice(self._unsaved(stack.blocks), len(places)))
                found += (Move(*one, stack.freed, instead) for one, instead in zip(going, places, strict=False))
            left -= len(stack.blocks)
        return found

    def late(self, leaving: Sequence[Leaving], most: int, now: float) -> list[Move]:
        """What of the blocks given up, the first that went first, is to be saved yet, at most so many.

        The latest that went, which are worth most, come first.
        """
        found: dict[Key, Move] = {}
        # What the device still has it keeps longer than what it gave up.
        costless = ((name, PRICELESS) for name, _ in self._costless(most, now))
        chunks = _Chunks(self._contents, costless, self._lowest(now))
        for one in reversed(leaving):
            if len(found) == most:
                break
            if one.name not in found and self._contents.block(one.name) is None and not self._contents.stored(one.name):
                span = self._keeper.ledger.span(one.key)
                assert span is not None
                rank = self._keeper.policy.rank(Wanted(span.ranked_by, one.freed), now)
                if rank[0] > DEAD and (places := chunks.take(rank, one.depth, 1)):
                    found[one.name] = Move(one.number, one.name, one.depth, one.freed, *places)
        return list(found.values())

    def room(self, span: Span, most: int, now: float) -> int:
        """How many blocks the device can give for blocks of this span, at most so many: none that is needed sooner."""
        count = min(self._contents.idle, most)
        wanted = self._keeper.policy.rank(Wanted(span.ranked_by, now), now)
        for stack in upcoming(self._keeper.device.order, now):
            rank = self._rank(stack, now)
            if rank >= wanted or count >= most or not span.owners.keys().isdisjoint(stack.span.owners):
                break
            count += len(stack.blocks)
        return min(count, most)

    def _going(self, sought: int, now: float) -> Iterator[Key]:
        """Host chunks, the first to go first."""
        gone: set[Key] = set()
        mark = self._mark(now)
        for name, rank in self._costless(sought, now):
            if rank > mark:
                gone.add(name)
                yield name
        yield from (name for name, _ in self._lowest(now) if name not in gone)

    def _costless(self, sought: int, now: float) -> Iterator[tuple[Key, Rank]]:
        """Chunks that are dead, or that the device has, too, with its rank of them: what it gives up last first."""
        yield from ((name, PRICELESS) for name in self._dead(now))
        yield from self._held(sought, now)

    def _lowest(self, now: float) -> Iterator[tuple[Key, Rank]]:
        """Chunks by rank, the lowest first; of equals the deepest first, since a chunk is of no use without the others
        before it, and what of a prompt comes to the host comes in any order. O(log stacks) for each.
        """
        stacks = upcoming(self._keeper.host.order, now)
        for rank, equals in groupby(stacks, lambda stack: self._rank(stack, now)):
            while some := [reversed(stack.blocks) for stack in islice(equals, TIED)]:
                yield from ((name, rank) for name in merge(*some, key=self._contents.depth, reverse=True))

    def _dead(self, now: float) -> Iterator[Key]:
        for stack in upcoming(self._keeper.host.order, now):
            if self._rank(stack, now)[0] > DEAD:
                return
            yield from reversed(stack.blocks)

    def _held(self, sought: int, now: float) -> list[tuple[Key, Rank]]:
        """Some of the chunks that the device has, too; those looked at come up again last."""
        host, device, found = self._keeper.host, self._keeper.device, []
        for name in list(islice(self._copies, SWEPT + sought)):
            number = self._contents.block(name)
            if number is None or not self._contents.stored(name):
                del self._copies[name]
                continue
            self._copies.move_to_end(name)
            if name in host:
                stack = device.stack(number)
                found.append((name, PRICELESS if stack is None else self._rank(stack, now)))
        return sorted(found, key=lambda one: one[1], reverse=True)

    def _mark(self, now: float) -> Rank:
        """The rank up to which the device gives blocks up soon."""
        left = self.margin - self._contents.idle
        if left <= 0:
            return WORTHLESS
        for stack in upcoming(self._keeper.device.order, now):
            left -= len(stack.blocks)
            if left <= 0:
                return self._rank(stack, now)
        return PRICELESS

    def _unsaved(self, numbers: Iterable[int]) -> Iterator[tuple[int, Key, int]]:
        """Those of the device blocks that hold what the host has not: number, name, and where in its prompt it ends."""
        for number in numbers:
            name = self._contents.name(number)
            if name is not None and not self._contents.stored(name):
                yield number, name, self._contents.depth(name)

    def _state(self, most: int) -> Hashable:
        """While this is the same, the tiers hold the same, and nothing has been told of their owners."""
        tiers = (
            (len(t), t.order._added, t.order._now, len(t.order._stale))
            for t in (self._keeper.device, self._keeper.host)
        )
        return most, self._changes, self._contents.idle, self._contents.vacant, *tiers

    def _rank(self, stack: Ranked, now: float) -> Rank:
        return self._keeper.policy.rank(stack, now)
