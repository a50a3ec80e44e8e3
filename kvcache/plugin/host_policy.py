"""Which chunks vLLM's host tier keeps: ranked with the device's blocks once attached, vLLM's LRU until then.

vLLM's own bookkeeping goes on underneath, so that its LRU can take over at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy

from kvcache.joint import Joint
from kvcache.keeper import Keeper
from kvcache.ledger import ANONYMOUS, HOST
from kvcache.plugin.free_queue import GROUP_BYTES
from kvcache.plugin.owners import owners_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.weft")

MOST_UNSETTLED = 64

Coming = tuple[float, int]
"""Of a chunk that is being stored, when it was used last in seconds, and where in its prompt it ends in tokens."""


class _Use:
    """Chunks that were used together, as they lie in their prompt: they go from the tail."""

    __slots__ = ("names", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.names: list[bytes] = []


class HostPolicy(LRUCachePolicy):  # type: ignore[misc]
    """vLLM's seam for the order in which chunks go. They are named by block hash and KV group.

    `stored` counts the chunks that came, `evicted` those that were given up. vLLM's own part of each step comes first;
    where ours fails then, it is off from now on, and the failure goes no further.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.joint: Joint | None = None
        self.owner = ANONYMOUS
        self.coming: dict[bytes, Coming] = {}
        self.going: list[bytes] = []
        self.depths: dict[bytes, int] = {}
        self.stored = self.evicted = 0
        self._uses: dict[bytes, _Use] = {}
        self._unsettled: dict[_Use, None] = {}
        self._latest: _Use | None = None

    def attach(
        self, keeper: Keeper, joint: Joint, request: Callable[[str], Request | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Rank with the device from now on. `request` finds one by its id."""
        self._keeper, self.joint, self._request, self._clock = keeper, joint, request, clock
        for name in sorted(self.chunks, key=self._ranks.__getitem__):
            self._gain(name)

    def detach(self) -> None:
        """Be vLLM's LRU from now on."""
        if self.joint is not None:
            self.joint = None
            self._forget()
            try:
                self._keeper.cleared(HOST)
            except Exception as why:
                logger.warning("Weft's ranking of the host tier ended badly", exc_info=why)

    def fail(self, why: Exception) -> None:
        """Something of ours failed: be vLLM's LRU from now on."""
        if self.joint is not None:
            logger.warning("Weft's ranking of the host tier is off, vLLM goes on alone", exc_info=why)
            self.detach()

    def safely(self, does: Callable[..., Any], *args: Any) -> Any:
        """What `does` returns for the ranking of both tiers and `args`; None where ours is off, or fails."""
        if self.joint is None:
            return None
        try:
            return does(self.joint, *args)
        except Exception as why:
            self.fail(why)
            return None

    @property
    def vacant(self) -> int:
        """Chunks that hold nothing."""
        return max(0, int(self.cache_capacity) - len(self.chunks))

    def insert(self, key: bytes, chunk: Any, *_: Any) -> None:
        """A chunk is being stored: `owner`'s, or of what the ledger knows; `coming` says more."""
        super().insert(key, chunk)
        self.stored += 1
        self.safely(self._inserted, key)

    def remove(self, key: bytes) -> None:
        """It is gone."""
        super().remove(key)
        self.safely(self._removed, key)

    def mark_evictable(self, key: bytes) -> None:
        """Nobody reads or writes it."""
        super().mark_evictable(key)
        self.safely(lambda _: self._unsettle(self._uses[key]))

    def mark_non_evictable(self, key: bytes) -> None:
        """Somebody reads it: on to the device."""
        super().mark_non_evictable(key)
        self.safely(self._read, key)

    def touch(self, keys: Iterable[bytes], req_context: Any) -> None:
        """A request used these, from its start on."""
        keys = list(keys)
        super().touch(keys, req_context)
        self.safely(self._used, keys)

    def on_request_finished(
        self, key_groups: Sequence[Sequence[bytes]], insertion_only_keys: set[bytes], reused_keys: set[bytes],
        req_context: Any,
    ) -> None:  # fmt: skip
        """A request has ended: it has used all of its line, also what it found on the device."""
        super().on_request_finished(key_groups, insertion_only_keys, reused_keys, req_context)
        self.safely(self._ended, key_groups, req_context)

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, Any]] | None:
        """Give up so many chunks; None where there are not so many."""
        found = self.safely(self._chosen, n, protected) if n else None
        if self.joint is None or n == 0:
            return super().evict(n, protected)  # type: ignore[no-any-return]
        for name, _ in found or ():
            self.remove(name)
        self.evicted += len(found or ())
        return found

    def clear(self) -> None:
        """Everything is gone."""
        gone = list(self.chunks)
        super().clear()
        self.safely(self._cleared, gone)

    def settle(self) -> None:
        """Give the chunks that have been used their place in the order.

        One that was read or written when it was used comes to the place it would have had, among those used with it.
        """
        self.safely(lambda _: self._settle())

    def _settle(self) -> None:
        host, evictable, uses = self._keeper.host, self._evictable, self._uses
        unsettled, self._unsettled = self._unsettled, {}
        for use in sorted(unsettled, key=lambda use: use.seconds):
            use.names = [name for name in dict.fromkeys(use.names) if uses.get(name) is use]
            free = self._tails_first(name for name in reversed(use.names) if name in evictable)
            for name in free:
                if name in host:
                    host.remove(name)
            host.put([(name, _hash(name)) for name in free], use.seconds)

    def _tails_first(self, names: Iterable[bytes]) -> list[bytes]:
        """Those of a span together, the deepest first: what is saved comes in another order than what was used."""
        spans: dict[int, list[bytes]] = {}
        for name in names:
            spans.setdefault(id(self._keeper.ledger.span(_hash(name))), []).append(name)
        deepest: Callable[[bytes], int] = self.depths.__getitem__
        return [name for span in spans.values() for name in sorted(span, key=deepest, reverse=True)]

    def _inserted(self, joint: Joint, key: bytes) -> None:
        self._gain(key)
        joint.copied((key,))

    def _removed(self, joint: Joint, key: bytes) -> None:
        if key in self._keeper.host:
            self._keeper.host.remove(key)
        self._uses.pop(key, None)
        self.depths.pop(key, None)
        joint.gone(key)
        self._keeper.ledger.lost(_hash(key), HOST)

    def _read(self, joint: Joint, key: bytes) -> None:
        if key in self._keeper.host:
            self._keeper.host.remove(key)
        joint.copied((key,))

    def _ended(self, joint: Joint, key_groups: Sequence[Sequence[bytes]], req_context: Any) -> None:
        request = self._request(req_context.req_id)
        keys = [key for group in key_groups for key in group]
        if request is not None and len(groups := {key[-GROUP_BYTES:] for key in keys} or {bytes(GROUP_BYTES)}) == 1:
            group = groups.pop()
            keys = [bytes(one) + group for one in request.block_hashes]
        self._used(joint, keys)

    def _chosen(self, joint: Joint, n: int, protected: set[bytes]) -> list[tuple[bytes, Any]] | None:
        names: Any = self.going
        if len(names) != n or not self._evictable.issuperset(names):
            self._settle()
            names = joint.spare(n, protected, self._clock())
        return None if names is None else [(name, self.chunks[name]) for name in names]

    def _cleared(self, joint: Joint, gone: list[bytes]) -> None:
        for key in gone:
            joint.gone(key)
        self._forget()
        self._keeper.cleared(HOST)

    def _forget(self) -> None:
        self._uses.clear()
        self._unsettled.clear()
        self.depths.clear()
        self._latest = None

    def _gain(self, key: bytes) -> None:
        self._keeper.ledger.gained(_hash(key), HOST, self.owner)
        seconds, self.depths[key] = self.coming.get(key) or (self._clock(), 0)
        self._use([key], seconds)

    def _used(self, joint: Joint, keys: Collection[bytes]) -> None:
        if mine := [key for key in keys if key in self.chunks]:
            self._latest = None
            freed = joint.freed(mine[-1])
            self._use(mine, self._clock() if freed is None else freed)
            joint.copied(mine)

    def _use(self, keys: list[bytes], seconds: float) -> None:
        use = self._latest
        if use is None or use.seconds != seconds:
            use = self._latest = _Use(seconds)
        use.names += keys
        for key in keys:
            self._uses[key] = use
        self._unsettle(use)

    def _unsettle(self, use: _Use) -> None:
        self._unsettled[use] = None
        if len(self._unsettled) > MOST_UNSETTLED:
            self._settle()


class HostManager(CPUOffloadingManager):  # type: ignore[misc]
    """vLLM's manager of the host tier. Once attached, a full tier takes only what the device gives up soon.

    `unsaved`: something that the device had was not stored, or is not any more.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refused = 0

    @property
    def policy(self) -> HostPolicy:
        """Its policy."""
        policy = self._policy
        assert isinstance(policy, HostPolicy)
        return policy

    @property
    def unsaved(self) -> bool:
        """Whether the device may have something that the host has not."""
        return bool(self.refused or self.policy.evicted)

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> Any:
        """What a request computes is stored where that costs nothing else its place."""
        policy, keys = self.policy, list(keys)
        taken = policy.safely(self._taken, keys, req_context)
        try:
            return super().prepare_store(keys if taken is None else taken, req_context)
        finally:
            policy.owner, policy.coming = ANONYMOUS, {}

    def _taken(self, joint: Joint, keys: list[bytes], req_context: Any) -> list[bytes]:
        """Those that are stored, or are there."""
        policy = self.policy
        policy._settle()
        new = [key for key in keys if policy.get(key) is None]
        now = policy._clock()
        refused = set(new[joint.vacant(len(new), now) :])
        taken = [key for key in keys if key not in refused]
        request = policy._request(req_context.req_id)
        policy.owner = owners_of(request)[0] if request is not None else ANONYMOUS
        policy.coming = {key: (now, req_context.get_offload_key_position(key) or 0) for key in taken}
        self.refused += len(refused)
        return taken

    def move(self, coming: dict[bytes, Coming], going: list[bytes], req_context: Any) -> Any:
        """Store what the device gives up soon, in place of the chunks that go for it."""
        policy = self.policy
        policy.coming, policy.going = coming, going
        try:
            return super().prepare_store(list(coming), req_context)
        finally:
            policy.coming, policy.going = {}, []


def _hash(name: bytes) -> bytes:
    return name[:-GROUP_BYTES]
