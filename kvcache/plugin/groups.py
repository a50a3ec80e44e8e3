"""Which of a model's KV groups tells the line of a request: its blocks from the start, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from kvcache.ledger import Key
from kvcache.plugin.free_queue import key_of

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class Unfit(Exception):
    """Why the engine's KV cannot be kept by its owners."""


@dataclass(frozen=True, slots=True)
class Group:
    """The group at `place`, with blocks of `block` tokens; `named`: a block's key is one of its request's hashes."""

    place: int
    block: int
    named: bool

    def prompt(self, request: Request) -> list[Key] | None:
        """What the full blocks of a request are, or will be, named; None where nobody knows before they are."""
        return [bytes(one) for one in request.block_hashes] if self.named else None

    def line(self, groups: Sequence[Iterable[KVCacheBlock]]) -> list[Key]:
        """The blocks of a request from its start up to the first without a hash, of all that it has."""
        keys: list[Key] = []
        for block in groups[self.place]:
            if (key := key_of(block)) is None:
                break
            keys.append(key)
        return keys


def telling(manager: KVCacheManager, hash_block: int) -> Group:
    """The group that tells, where requests are hashed by `hash_block` tokens. Raises Unfit where none does.

    The others' blocks share its keys, so that they go and stay with them.
    """
    if not manager.enable_caching:
        raise Unfit("prefix caching is off")
    managers = manager.coordinator.single_type_managers
    if any(one.block_pool is not manager.block_pool for one in managers):
        raise Unfit("the KV groups have several pools")
    for place, one in enumerate(managers):
        spec = one.kv_cache_spec
        spec = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if isinstance(spec, FullAttentionSpec) and spec.prefix_cacheable:
            return Group(place, one.block_size, one.block_size == hash_block)
    raise Unfit("no KV group with full attention")
