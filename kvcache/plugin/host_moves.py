"""Copies that no request asked for: to the host what the device gives up soon, and back what is needed next.

vLLM knows them by numbers of jobs of its own counter; the names of requests that it wants with them start with
`PREFIX`, and must not come back to its scheduler. A block that is being copied down may be taken at any time: vLLM then
waits for the copy first (its fence). One that is being filled is nobody's and has no hash until it is full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
from vllm.v1.kv_offload.base import GPULoadStoreSpec, ReqContext

from kvcache.joint import Joint, Leaving, Move
from kvcache.keeper import Keeper
from kvcache.plugin.host_policy import Coming, HostManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

PREFIX = "weft:"

MOST_BLOCKS = 64
"""In one transfer: what a demand load waits for at most."""

MOST_WISHES = 256
LONGEST = 60.0
"""Seconds that a prefetch may wait for its turn."""

Jobs = dict[int, TransferJob]


@dataclass(slots=True)
class _Flight:
    """A copy on its way: `left` workers have not said that it is done. `blocks` that are held for it."""

    left: int
    names: list[bytes]
    context: ReqContext
    numbers: list[int] = field(default_factory=list)
    blocks: list[KVCacheBlock] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def _landed(flights: dict[int, _Flight], job: int, workers: int) -> _Flight | None:
    """So many workers have done with a copy: it, once that was the last of them."""
    flight = flights[job]
    flight.left -= workers
    return flights.pop(job) if flight.left <= 0 else None


class Saves:
    """What the device gives up soon and the host has not, on its way there. `vllm`: the scheduler of its connector.

    `saved` counts the blocks, `late` those for which a step waited.
    """

    def __init__(self, vllm: Any, joint: Joint) -> None:
        self._vllm, self._joint = vllm, joint
        self._manager: HostManager = vllm.manager
        self._flights: dict[int, _Flight] = {}
        self.saved = self.late = 0
        self.on = True

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, job: int) -> bool:
        return job in self._flights

    def start(self, jobs: Jobs, now: float) -> None:
        """Copies to begin with this step, put into `jobs` one by one: what has begun goes on, whatever fails then."""
        room = self._joint.margin - sum(len(one.numbers) for one in self._flights.values())
        if room <= 0 or not self.on or not self._manager.unsaved:
            return
        self._manager.policy.settle()
        moves = self._joint.moves(room, now) if self._manager.policy.joint is not None else []
        for job in self._begun(jobs, moves):
            for number in self._flights[job].numbers:
                self._vllm._block_id_to_pending_jobs.setdefault(number, set()).add(job)

    def start_late(self, leaving: Sequence[Leaving], jobs: Jobs, awaited: set[int], most: int, now: float) -> None:
        """Copies of what the device has given up for this step, which waits for those `awaited`, of so many blocks."""
        if not leaving or not self.on or not self._manager.unsaved:
            return
        self._manager.policy.settle()
        for job in self._begun(jobs, self._joint.late(leaving, most, now)):
            awaited.add(job)
            flight = self._flights[job]
            self.late, flight.numbers = self.late + len(flight.names), []  # the blocks are another's already

    def done(self, job: int, workers: int) -> None:
        """So many workers have done with it."""
        if (flight := _landed(self._flights, job, workers)) is None:
            return
        self.saved += len(flight.names)
        pending = self._vllm._block_id_to_pending_jobs
        for number in flight.numbers:
            if (jobs := pending.get(number)) is not None:
                jobs.discard(job)
                if not jobs:
                    del pending[number]
        self._manager.complete_store(flight.names, flight.context)

    def _begun(self, jobs: Jobs, moves: Sequence[Move]) -> Iterator[int]:
        """Begin these copies, `MOST_BLOCKS` in one, until there is no place: the jobs, each as soon as it has begun."""
        for start in range(0, len(moves), MOST_BLOCKS):
            part = moves[start : start + MOST_BLOCKS]
            context = ReqContext(req_id=PREFIX + "save")
            self._manager.on_new_request(context)
            going: list[Any] = [one.instead for one in part if one.instead is not None]
            coming: dict[Any, Coming] = {one.name: (one.freed, one.depth) for one in part}
            output = self._manager.move(coming, going, context)
            if output is None or not output.keys_to_store:
                return
            numbers = {one.name: one.number for one in part}
            job, names = self._vllm._generate_job_id(), list(output.keys_to_store)
            blocks = [numbers[name] for name in names]
            self._flights[job] = _Flight(self._vllm.config.num_workers, names, context, blocks)
            jobs[job] = TransferJob(context.req_id, GPULoadStoreSpec(blocks, [len(blocks)], [0]), output.store_spec)
            yield job

    def stop(self) -> None:
        """Begin no more."""
        self.on = False

    def forget(self) -> set[int]:
        """The host tier has been emptied: the jobs that were on their way, for vLLM to wait for."""
        jobs = set(self._flights)
        self._flights.clear()
        return jobs


@dataclass(slots=True)
class _Wish:
    """A prefetch: until when in seconds, and up to where in the owner's line all is on the device."""

    due: float
    at: int = 0


class Prefetches:
    """What is on its way back to the device before its request comes, one transfer at a time, the most urgent first.

    `waits` says how many requests wait, which go first; `speed` is the link's in blocks a second, None: not known. In
    blocks: `loaded`, of which `used` and `wasted` (gone before anybody used them), and in owners: `dropped`.
    """

    def __init__(
        self, vllm: Any, pool: Any, keeper: Keeper, joint: Joint, waits: Callable[[], int],
        speed: Callable[[], float | None],
    ) -> None:  # fmt: skip
        self._vllm, self._pool, self._keeper, self._joint = vllm, pool, keeper, joint
        self._manager: HostManager = vllm.manager
        self._waits, self._speed = waits, speed
        self._group = (0).to_bytes(4, "big")
        self._wishes: OrderedDict[str, _Wish] = OrderedDict()
        self._flights: dict[int, _Flight] = {}
        self._fresh: dict[int, bytes] = {}
        self.loaded = self.used = self.wasted = self.dropped = 0

    def __len__(self) -> int:
        return len(self._flights) + len(self._wishes)

    def __contains__(self, job: int) -> bool:
        return job in self._flights

    def wish(self, owner: str, within: float, now: float) -> bool:
        """Have the owner's KV on the device in so many seconds. False where the host has nothing that is missing."""
        if not self._missing(owner, wish := _Wish(now + min(within, LONGEST)), 1):
            return False
        self._wishes[owner] = wish
        if len(self._wishes) > MOST_WISHES:
            self._wishes.popitem(last=False)
            self.dropped += 1
        return True

    def cancel(self, owner: str) -> None:
        """Its own request has come."""
        if self._wishes.pop(owner, None) is not None:
            self.dropped += 1

    def start(self, now: float) -> Jobs:
        """The copy to begin with this step."""
        for owner in [owner for owner, wish in self._wishes.items() if wish.due < now]:
            self.cancel(owner)
        if self._flights or (self._wishes and (self._waits() or self._free <= 0)):
            return {}
        while self._wishes:
            owner = min(self._wishes, key=lambda one: self._wishes[one].due)
            wish = self._wishes[owner]
            missing = self._missing(owner, wish, MOST_BLOCKS)
            if not missing:
                del self._wishes[owner]
            elif (most := self._most(missing, wish, now)) > 0:
                return self._begin(missing[:most])
            else:
                self.cancel(owner)
        return {}

    def done(self, job: int, workers: int) -> None:
        """So many workers have done with it. The last one makes it visible."""
        if (flight := _landed(self._flights, job, workers)) is None:
            return
        self._vllm._chunks_being_loaded.difference_update(flight.names)
        known = self._pool.cached_block_hash_to_block
        try:
            self._manager.complete_load(flight.names, flight.context)
            for block, name, end in zip(flight.blocks, flight.names, flight.ends, strict=False):
                if known.get_one_block(name) is None:
                    self._pool._insert_block_hash(name, block, num_tokens=end)
                    self._fresh[block.block_id] = name
            self.loaded += len(flight.blocks)
        finally:
            self._pool.free_blocks(reversed(flight.blocks))

    def give_back(self) -> set[int]:
        """Hold no device block any more: the jobs on their way, for vLLM to wait for before the blocks are used."""
        self.dropped += len(self._wishes)
        self._wishes.clear()
        for flight in self._flights.values():
            self._pool.free_blocks(flight.blocks)
            flight.blocks = []
        self._fresh.clear()
        return set(self._flights)

    def forget(self) -> set[int]:
        """The host tier has been emptied, too."""
        jobs = self.give_back()
        self._flights.clear()
        return jobs

    def count(self, blocks: list[KVCacheBlock]) -> None:
        """A request has these blocks now."""
        for block in blocks if self._fresh else ():
            if (name := self._fresh.pop(block.block_id, None)) is not None:
                if block.block_hash == name:
                    self.used += 1
                else:
                    self.wasted += 1

    def count_lost(self) -> None:
        """Count those that have gone since."""
        for number in [one for one, name in self._fresh.items() if self._pool.blocks[one].block_hash != name]:
            del self._fresh[number]
            self.wasted += 1

    def _missing(self, owner: str, wish: _Wish, most: int) -> list[tuple[bytes, int]]:
        """What the host has and the device not of an owner's line, and where it ends in tokens, up to the first gap."""
        line, known, found = self._keeper.ledger.line(owner), self._pool.cached_block_hash_to_block, []
        chunk = self._manager.policy.get
        for at in range(wish.at, len(line)):
            name = bytes(line[at]) + self._group  # type: ignore[call-overload]
            if known.get_one_block(name) is None:
                status = chunk(name)
                if status is None or not status.is_ready:
                    break
                found.append((name, (at + 1) * self._keeper.block))
                if len(found) == most:
                    break
            elif not found:
                wish.at = at + 1
        return found

    def _most(self, missing: list[tuple[bytes, int]], wish: _Wish, now: float) -> int:
        """How many of them there is room and time for."""
        most = self._free
        if (speed := self._speed()) is not None:
            most = min(most, int((wish.due - now) * speed))
        span = self._keeper.ledger.span(missing[0][0][: -len(self._group)])
        if span is None or most <= 0:
            return 0
        self._manager.policy.settle()
        return self._joint.room(span, min(most, len(missing)), now)

    @property
    def _free(self) -> int:
        """Blocks that it may take: some are left to whoever comes."""
        return int(self._pool.get_num_free_blocks()) - int(self._pool.num_gpu_blocks) // 8

    def _begin(self, missing: list[tuple[bytes, int]]) -> Jobs:
        names = [name for name, _ in missing]
        context = ReqContext(req_id=PREFIX + "prefetch")
        self._manager.on_new_request(context)
        source = self._manager.prepare_load(names, context)
        blocks = self._pool.get_new_blocks(len(names))
        numbers = [block.block_id for block in blocks]
        self._vllm._current_batch_allocated_block_ids.update(numbers)
        self._vllm._chunks_being_loaded.update(names)
        job = self._vllm._generate_job_id()
        ends = [end for _, end in missing]
        self._flights[job] = _Flight(self._vllm.config.num_workers, names, context, numbers, blocks, ends)
        first = ends[0] // self._keeper.block - 1
        return {job: TransferJob(context.req_id, source, GPULoadStoreSpec(numbers, [len(numbers)], [first]))}
