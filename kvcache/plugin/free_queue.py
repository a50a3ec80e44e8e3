"""vLLM's queue of free KV blocks, in the order of their owners instead of LRU: the same surface, for `BlockPool`.

Free blocks without a hash (never matched again) go first, the last freed first, as in vLLM; the others by the
keeper's policy. Nothing here awaits or locks: all calls come from the engine's own thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from kvcache.keeper import Keeper
from kvcache.ledger import ANONYMOUS, DEVICE, Key

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

GROUP_BYTES = 4
"""Of a block's hash, the number of its KV group at the end."""


def key_of(block: KVCacheBlock) -> Key | None:
    """What stands for the tokens up to the end of a block, in all KV groups alike; None where it has no hash."""
    found = block.block_hash
    return bytes(found[:-GROUP_BYTES]) if found is not None else None


class OwnerQueue:
    """Free blocks. `blocks` are all of the pool by number, `free` those that are free now."""

    def __init__(
        self, blocks: list[KVCacheBlock], free: Iterable[KVCacheBlock], keeper: Keeper,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._blocks, self._keeper, self._clock = blocks, keeper, clock
        self._spare: OrderedDict[int, None] = OrderedDict()
        self._keys: list[Key | None] = [None] * len(blocks)
        self.num_free_blocks = 0
        self.append_n(list(free))

    def declare(self, blocks: Iterable[KVCacheBlock]) -> None:
        """These blocks hold what their hashes say; their keys are known to the ledger."""
        for block in blocks:
            if (key := key_of(block)) is not None:
                self._declare(block.block_id, key)

    def popleft(self) -> KVCacheBlock:
        """Take the next block."""
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the next blocks."""
        if n == 0:
            return []
        assert self.num_free_blocks >= n
        self.num_free_blocks -= n
        blocks, spare = self._blocks, self._spare
        taken = [blocks[spare.popitem(last=False)[0]] for _ in range(min(n, len(spare)))]
        if len(taken) < n:
            for number, _ in self._keeper.device.take(n - len(taken), self._clock()):
                self._lose(number)
                taken.append(blocks[number])
            self._keeper.sweep()
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        """Take just this block. RuntimeError where it is not free."""
        number = block.block_id
        if number in self._spare:
            del self._spare[number]
        elif number in self._keeper.device:
            self._keeper.device.remove(number)
        else:
            raise RuntimeError(f"remove() called on an invalid block: {block}")
        self.num_free_blocks -= 1

    def append(self, block: KVCacheBlock) -> None:
        """Put a block back."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks back, of each owner the first to go first; those without a hash behind others of their kind."""
        self._put(blocks, last=True)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks back; those without a hash, as they should all be, are the first to go."""
        self._put(blocks[::-1], last=False)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """All free blocks, the first to go first."""
        return list(self.iter_blocks_after(None))

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        """Free blocks in their order behind `cursor`; where that is not free any more, none."""
        order = [*self._spare, *self._keeper.device]
        start = 0
        if cursor is not None:
            start = order.index(cursor.block_id) + 1 if cursor.block_id in order else len(order)
        yield from (self._blocks[number] for number in order[start:])

    def reset(self) -> None:
        """The prefix cache was reset: no block has a hash."""
        for number in self._keeper.device:
            self._spare[number] = None
        self._keys = [None] * len(self._keys)
        self._keeper.cleared(DEVICE)

    def _put(self, blocks: list[KVCacheBlock], last: bool) -> None:
        ranked: list[tuple[int, Key]] = []
        now = self._clock()
        self._adopt(blocks, now)
        for block in blocks:
            number, key = block.block_id, key_of(block)
            if key is None:
                self._lose(number)
                self._spare[number] = None
                if not last:
                    self._spare.move_to_end(number, last=False)
                continue
            self._declare(number, key)
            ranked.append((number, key))
        if ranked:
            self._keeper.device.put(ranked, now)
        self.num_free_blocks += len(blocks)

    def _adopt(self, blocks: list[KVCacheBlock], now: float) -> None:
        """What no owner has declared is nobody's."""
        ledger = self._keeper.ledger
        found = dict.fromkeys(key for block in blocks if (key := key_of(block)) is not None)
        if unknown := [key for key in found if ledger.span(key) is None]:
            self._keeper.wrote(ANONYMOUS, None, unknown, now)

    def _declare(self, number: int, key: Key) -> None:
        if self._keys[number] != key:
            self._lose(number)
            self._keys[number] = key
            self._keeper.ledger.gained(key, DEVICE)

    def _lose(self, number: int) -> None:
        if (key := self._keys[number]) is not None:
            self._keys[number] = None
            self._keeper.ledger.lost(key, DEVICE)
