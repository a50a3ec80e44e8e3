"""vLLM's queue of free KV blocks, in the order of their owners instead of LRU: the same surface, for `BlockPool`.

Free blocks without a hash (never matched again) go first, the last freed first, as in vLLM; the others by the
keeper's policy. Which blocks are free, and in which order vLLM itself would give them up, stands apart from all that:
if the ranking fails, it is vLLM's order from then on, and no block is lost. Nothing here awaits or locks: all calls
come from the engine's own thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from kvcache.joint import Leaving
from kvcache.keeper import Keeper
from kvcache.ledger import ANONYMOUS, DEVICE, Key

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

NOT_FREE = object()
GROUP_BYTES = 4
"""Of a block's hash, the number of its KV group at the end."""


def key_of(block: KVCacheBlock) -> Key | None:
    """What stands for the tokens up to the end of a block, in all KV groups alike; None where it has no hash."""
    found = block.block_hash
    return bytes(found[:-GROUP_BYTES]) if found is not None else None


def _nothing(why: Exception) -> None:
    pass


class OwnerQueue:
    """Free blocks. `blocks` are all of the pool by number, `free` those that are free now.

    `failed` is told of the exception after which the order is vLLM's. `evicted` counts the cached blocks given up, by
    the class of their owners (`kvcache.policy`).
    """

    def __init__(
        self, blocks: list[KVCacheBlock], free: Iterable[KVCacheBlock], keeper: Keeper,
        clock: Callable[[], float] = time.monotonic, failed: Callable[[Exception], None] = _nothing,
    ) -> None:  # fmt: skip
        self._blocks, self._keeper, self._clock, self._failed = blocks, keeper, clock, failed
        self._free: OrderedDict[int, None] = OrderedDict()
        self._spare: OrderedDict[int, None] = OrderedDict()  # without a hash; the others are in the keeper's tier
        self._keys: list[Key | None] = [None] * len(blocks)
        self._copies: dict[Key, int] = {}  # blocks by key: one in each KV group, and doubles
        self._ranks = True
        self._giving: object = None  # the stack that gave up the last block; `evicted` counts it as it began
        self._class = 0
        self._leaving: list[Leaving] | None = None  # None: nobody asks
        self.evicted = [0, 0, 0, 0]
        self.append_n(list(free))

    @property
    def num_free_blocks(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def declare(self, blocks: Iterable[KVCacheBlock], owner: str = ANONYMOUS) -> None:
        """These blocks hold what their hashes say. What nobody knows is the owner's."""
        self._declare([(block.block_id, key) for block in blocks if (key := key_of(block)) is not None], owner)

    def popleft(self) -> KVCacheBlock:
        """Take the next block."""
        if not self._free:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the next blocks."""
        if n == 0:
            return []
        assert len(self._free) >= n
        blocks = self._blocks
        return [blocks[number] for number in self._next(n)]

    def remove(self, block: KVCacheBlock) -> None:
        """Take just this block. RuntimeError where it is not free."""
        number = block.block_id
        if number not in self._free:
            raise RuntimeError(f"remove() called on an invalid block: {block}")
        del self._free[number]
        if self._ranks:
            try:
                if number in self._spare:
                    del self._spare[number]
                else:
                    self._keeper.device.remove(number)
            except Exception as why:
                self._fail(why)

    def append(self, block: KVCacheBlock) -> None:
        """Put a block back."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks back, of each owner the first to go first; those without a hash behind others of their kind."""
        for block in blocks:
            self._free[block.block_id] = None
        self._rank(blocks, last=True)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks back; those without a hash, as they should all be, are the first to go."""
        back = blocks[::-1]
        for block in back:
            self._free[block.block_id] = None
            self._free.move_to_end(block.block_id, last=False)
        self._rank(back, last=False)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """All free blocks, the first to go first."""
        return list(self.iter_blocks_after(None))

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        """Free blocks in their order behind `cursor`; where that is not free any more, none. Take none meanwhile."""
        order = self._order()
        if cursor is not None:
            next((number for number in order if number == cursor.block_id), None)
        return (self._blocks[number] for number in order)

    def follow(self) -> bool:
        """The prefix cache may have been reset. Returns whether it was: no block has a hash."""
        if any(block.block_hash is not None for block in self._blocks):
            return False
        self._spare.update(dict.fromkeys(self._keeper.device))
        self._keys = [None] * len(self._keys)
        self._leaving = None if self._leaving is None else []
        self._copies.clear()
        self._keeper.cleared(DEVICE)
        return True

    def stop(self) -> None:
        """From now on the order is vLLM's."""
        self._ranks = False

    def watch(self, on: bool) -> None:
        """Whether somebody asks for what is `leaving`, and lets go of it after each step that is planned."""
        self.let_go()
        self._leaving = [] if on else None

    @property
    def leaving(self) -> Sequence[Leaving]:
        """What was given up since `let_go`, the first that went first. Its owners are known."""
        return self._leaving or ()

    def let_go(self) -> None:
        """What was given up is gone."""
        if self._leaving:
            leaving, self._leaving = self._leaving, []
            for one in leaving:
                self._lose_copy(one.key)
            self._keeper.sweep()

    def _order(self) -> Iterator[int]:
        if self._ranks:
            try:
                device = iter(self._keeper.device)
                first = list(islice(device, 1))  # all are ranked before the first comes
                return chain(self._spare, first, device)
            except Exception as why:
                self._fail(why)
        return iter(self._free)

    def _next(self, n: int) -> list[int]:
        free = self._free
        if self._ranks:
            taken: list[int] = []
            try:
                self._take(n, taken)
                return taken
            except Exception as why:
                for number in reversed(taken):
                    free[number] = None
                    free.move_to_end(number, last=False)
                self._fail(why)
        return [free.popitem(last=False)[0] for _ in range(n)]

    def _take(self, n: int, taken: list[int]) -> None:
        """Take blocks until there are n. RuntimeError where the ranking names one that is not free."""
        free, spare, device = self._free, self._spare, self._keeper.device
        while spare and len(taken) < n:
            number = spare.popitem(last=False)[0]
            if free.pop(number, NOT_FREE) is NOT_FREE:
                raise RuntimeError(f"the ranking names block {number}, which is not free")
            taken.append(number)
        if len(taken) == n:
            return
        now = self._clock()
        keys, copies, ledger = self._keys, self._copies, self._keeper.ledger
        while (left := n - len(taken)) > 0:
            stack = device.order.first(now)
            assert stack is not None, "fewer blocks are ranked than free"
            if stack is not self._giving:
                self._giving, self._class = stack, self._keeper.policy.rank(stack, now)[0]
            going = device.pop(stack, min(left, len(stack.blocks)))
            self.evicted[self._class] += len(going)
            if self._leaving is not None:
                self._leaving += self._held(going, stack.freed)
            for number, key in going:
                keys[number] = None
                if others := copies.pop(key) - 1:
                    copies[key] = others
                else:
                    ledger.lost(key, DEVICE)
                if free.pop(number, NOT_FREE) is NOT_FREE:
                    raise RuntimeError(f"the ranking names block {number}, which is not free")
                taken.append(number)
        if ledger.forgotten:
            self._keeper.sweep()

    def _held(self, going: Iterable[tuple[int, Key]], freed: float) -> Iterator[Leaving]:
        for number, key in going:
            block = self._blocks[number]
            if block.block_hash is None:
                continue
            self._copies[key] += 1
            yield Leaving(number, block.block_hash, key, block.block_hash_num_tokens or 0, freed)

    def _declare(self, named: Iterable[tuple[int, Key]], owner: str = ANONYMOUS) -> None:
        # The new keys come before the old ones go: of a block that changed its hash in use, the old key may be the new
        # one of another. For the ledger the device has one copy of a key, or none: tokens count once.
        ledger, keys, copies = self._keeper.ledger, self._keys, self._copies
        changed = [(number, key) for number, key in named if keys[number] != key]
        for _, key in changed:
            copies[key] = copies.get(key, 0) + 1
            if copies[key] == 1:
                ledger.gained(key, DEVICE, owner)
        for number, key in changed:
            self._lose(number)
            keys[number] = key

    def _rank(self, blocks: list[KVCacheBlock], last: bool) -> None:
        if self._ranks and blocks:
            try:
                self._put(blocks, last)
            except Exception as why:
                self._fail(why)

    def _put(self, blocks: list[KVCacheBlock], last: bool) -> None:
        keys = [(block.block_id, key_of(block)) for block in blocks]
        ranked = [(number, key) for number, key in keys if key is not None]
        now = self._clock()
        self._adopt(ranked, now)
        self._declare(ranked)
        for number, key in keys:
            if key is None:
                self._lose(number)
                self._spare[number] = None
                if not last:
                    self._spare.move_to_end(number, last=False)
        if ranked:
            self._keeper.device.put(ranked, now)

    def _adopt(self, named: list[tuple[int, Key]], now: float) -> None:
        """What no owner has declared is nobody's, all of it at once."""
        span = self._keeper.ledger.span
        if unknown := dict.fromkeys(key for _, key in named if span(key) is None):
            self._keeper.wrote(ANONYMOUS, None, list(unknown), now)

    def _lose(self, number: int) -> None:
        if (key := self._keys[number]) is not None:
            self._keys[number] = None
            self._lose_copy(key)

    def _lose_copy(self, key: Key) -> None:
        if left := self._copies.pop(key) - 1:
            self._copies[key] = left
        else:
            self._keeper.ledger.lost(key, DEVICE)

    def _fail(self, why: Exception) -> None:
        self.stop()
        self._failed(why)
