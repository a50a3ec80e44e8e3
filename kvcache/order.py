"""The eviction order over stacks: which one gives up a block next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from kvcache.policy import INFINITY, Policy, Rank, Stack

S = TypeVar("S", bound=Stack)
Entry = tuple[Rank, float, tuple[int, int], S, tuple[str, ...]]  # rank, freed, number

SPARE = 64  # stale entries that a heap may always have
MANY = 8  # where one stack of so many has another rank, the heap is made anew


class Order(Generic[S]):
    """Stacks by the policy's rank, of equals the one freed first, then the one added first.

    A rank is as of the latest event of the stack's owners, or at most `policy.refresh` seconds old. Whoever calls
    tells the policy of an event, then `changed` here; the stacks are ranked anew when somebody asks for an order, once
    for all events since. Stacks are hashed by identity. Their `tokens` may change at any time, `freed` and `owners`
    only before another `add`.

    For a queue of free blocks: a stack is a run of blocks of equal owners that were freed together; such runs are added
    tail first, blocks are taken from the tail of `first`, and a stack that has none left is discarded. A block that no
    session is known of needs an owner of its own, for a stack without owners is dead.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[Entry[S]] = []  # replaced entries stay until they come up or are half of it
        self._entries: dict[S, Entry[S]] = {}
        self._of: dict[str, dict[S, None]] = {}
        self._stale: dict[str, None] = {}  # owners of which an event has come
        self._now = -INFINITY  # that of the latest
        self._added = 0
        self._due = -INFINITY

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[S]:
        """All stacks, the first to go first, by the ranks as they are."""
        self._settle(self._now)
        return (entry[3] for entry in sorted(self._entries.values()))

    def add(self, stack: S, now: float, place: int | None = None) -> None:
        """Put the stack in, or in its new place; it stays among equals where it was if `freed` is the same.

        `place` among what was freed at once, the lowest first; None: behind what came before. All give one, or none.
        """
        number, freed = (self._added if place is None else place, self._added), stack.freed
        if (old := self._entries.get(stack)) is not None:
            self.discard(stack)
            if old[1] == freed and place is None:
                number = old[2]
        self._added += 1
        owners = tuple(stack.owners)
        for owner in owners:
            if (stacks := self._of.get(owner)) is not None:
                stacks[stack] = None
            else:
                self._of[owner] = {stack: None}
        self._push((self._policy.ranked(owners, freed, now), freed, number, stack, owners))

    def discard(self, stack: S) -> None:
        """Take the stack out, if it is in."""
        if (entry := self._entries.pop(stack, None)) is None:
            return
        for owner in entry[4]:
            stacks = self._of[owner]
            del stacks[stack]
            if not stacks:
                del self._of[owner]
        self._shrink()

    def changed(self, owner: str, now: float) -> None:
        """An event of the owner has come: its stacks have another rank."""
        if owner in self._of:
            self._stale[owner] = None
            self._now = now

    def all_changed(self, owners: Iterable[str], now: float) -> None:
        """Events of these owners have come."""
        of = self._of
        if stale := [owner for owner in owners if owner in of]:
            self._stale.update(dict.fromkeys(stale))
            self._now = now

    def first(self, now: float) -> S | None:
        """The stack to take the next block from; None: there is none."""
        if self._stale:
            self._settle(now)
        if now >= self._due:
            self.rerank(now)
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[3]) is entry:
                return entry[3]
            heappop(heap)
        return None

    def _settle(self, now: float) -> None:
        """Rank the stacks of those owners anew of which an event has come."""
        ranked, entries, of = self._policy.ranking(), self._entries, self._of
        stacks = {stack: None for owner in self._stale for stack in of.get(owner, ())}
        self._stale.clear()
        many = len(stacks) > len(entries) // MANY
        for stack in stacks:
            was, freed, number, _, owners = entries[stack]
            if (new := ranked(owners, freed, now)) != was:
                entry = entries[stack] = (new, freed, number, stack, owners)
                if not many:
                    heappush(self._heap, entry)
        if many:
            self._sort()
        self._shrink()

    def _push(self, entry: Entry[S]) -> None:
        self._entries[entry[3]] = entry
        heappush(self._heap, entry)

    def rerank(self, now: float) -> None:
        """Rank all stacks anew. O(stacks)."""
        self._due = now + self._policy.refresh
        ranked, entries = self._policy.ranking(), self._entries
        moved = False
        for stack, (was, freed, number, _, owners) in entries.items():
            new = ranked(owners, freed, now)
            if new is not was and new != was:
                entries[stack] = (new, freed, number, stack, owners)
                moved = True
        if moved:
            self._sort()

    def _shrink(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + SPARE:
            self._sort()

    def _sort(self) -> None:
        self._heap = list(self._entries.values())
        heapify(self._heap)
