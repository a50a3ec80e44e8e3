"""The steps of an engine on their owners' account: as vLLM's scheduler sees them come, run, give up blocks and end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvcache.keeper import Keeper
from kvcache.ledger import Key
from kvcache.plugin.free_queue import OwnerQueue
from kvcache.plugin.groups import Group
from kvcache.plugin.owners import owners_of
from kvcache.shadow import Guarded

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class Steps:
    """Passes the events of requests on to the keeper and the queue of free blocks. Times in seconds.

    A request's step begins when it comes, and ends when it has left and its blocks are free, in either order: vLLM may
    keep the blocks of one that has ended, and frees those of one that is preempted and waits on. Without a queue and
    its group nothing is known of blocks. `dropped`: how many tokens at the end of a prompt are computed even if all of
    it lies in the cache.
    """

    def __init__(
        self, keeper: Keeper, queue: OwnerQueue | None, group: Group | None, guard: Guarded | None = None,
        dropped: int = 1,
    ) -> None:  # fmt: skip
        self._keeper, self._queue, self._group, self._guard, self._dropped = keeper, queue, group, guard, dropped
        self._of: dict[str, dict[str, Request]] = {}
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Requests that have not left, or whose blocks are not free."""
        return len(self._numbers.keys() | {name for mine in self._of.values() for name in mine})

    def __contains__(self, owner: str) -> bool:
        """Whether a request of the owner has not left."""
        return owner in self._of

    def came(self, request: Request, now: float) -> None:
        """A request comes to wait."""
        owner, _ = owners_of(request)
        self._of.setdefault(owner, {})[request.request_id] = request
        self._numbers[request.request_id] = self._keeper.began(owner, self._prompt(request), now)

    def planned(self, now: float) -> None:
        """What the engine computes next is about to be chosen."""
        self._keeper.settle(now)

    def admitted(
        self, found: Sequence[tuple[Request, int, Sequence[KVCacheBlock]]], used: int, late: Counter[int], now: float
    ) -> None:
        """These requests run, the first admitted first; each with the tokens found for it, and its blocks.

        `used` blocks of the pool are in use now, theirs among them; `late`: how many steps that are over hold each.
        """
        if self._guard is None or self._group is None:
            return
        taken = _taken([blocks for _, _, blocks in found], late)
        used -= sum(taken)
        for (request, tokens, _), mine in zip(found, taken, strict=True):
            if (keys := self._prompt(request)) is not None:
                most = max(0, request.num_tokens - self._dropped) // self._group.block
                self._guard.looked(request.request_id, keys[:most], tokens // self._group.block, used, mine)
            used += mine
        self._judge(now)

    def frees(self, request: Request, groups: Sequence[Sequence[KVCacheBlock]], used: int, now: float) -> None:
        """The request gives up its blocks: it has ended or is preempted. What they hold is its owners' from now on.

        `used` blocks of the pool are in use, theirs among them.
        """
        name, (owner, role) = request.request_id, owners_of(request)
        number = self._numbers.get(name)
        if request.is_finished():
            self._numbers.pop(name, None)
        if self._queue is None or self._group is None:
            return
        keys = self._group.line(groups) if groups else []
        if keys:
            self._keeper.wrote(owner, role, keys, now, number)
            self._queue.declare(groups[self._group.place][: len(keys)], owner)
        if self._guard is not None:
            self._guard.freed(name, keys, used)
            self._judge(now)

    def left(self, request: Request, now: float) -> None:
        """The request has ended, well or not."""
        owner, _ = owners_of(request)
        mine = self._of.get(owner, {})
        if mine.pop(request.request_id, None) is not None:
            if not mine:
                del self._of[owner]
            self._keeper.left(owner, request.num_tokens, now)

    def emptied(self, now: float) -> None:
        """The prefix cache was reset, or was to be."""
        if self._queue is not None and self._queue.follow() and self._guard is not None:
            self._guard.cleared()
            self._judge(now)

    def told(self, owners: Iterable[str], priorities: Mapping[str, float]) -> dict[Request, float]:
        """The requests of these owners that wait or run, with their priorities."""
        known = [(owner, priorities[owner]) for owner in owners if owner in priorities]
        return {request: priority for owner, priority in known for request in self._of.get(owner, {}).values()}

    def _judge(self, now: float) -> None:
        if self._guard is not None and self._guard.judged():
            self._keeper.rerank(now)

    def _prompt(self, request: Request) -> list[Key] | None:
        return self._group.prompt(request) if self._group is not None and self._queue is not None else None


def _taken(lines: Sequence[Sequence[KVCacheBlock]], late: Counter[int]) -> list[int]:
    """The blocks of requests that were admitted together: how many each took that were not in use, the first first."""
    shared = [[block for block in line if block.ref_cnt > 1 and not block.is_null] for line in lines]
    times = Counter(block.block_id for line in shared for block in line)
    return [
        sum(block.ref_cnt == 1 and not block.is_null for block in line)
        + sum(times.pop(block.block_id, -1) + late[block.block_id] == block.ref_cnt for block in mine)
        for line, mine in zip(lines, shared, strict=True)
    ]
