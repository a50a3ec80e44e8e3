"""What of vLLM the plug-in holds on to, tried before anything of ours is put in.

    python -m kvcache.plugin.selftest

prints what the plug-in would find in the installed vLLM.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcache.keeper import Keeper
from kvcache.plugin.free_queue import GROUP_BYTES, OwnerQueue
from kvcache.plugin.versions import SUPPORTED, supported
from kvcache.policy import Policy


class Missing(Exception):
    """A seam that is not what it was."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Those of its host tier: the connector and its part in the scheduler, the manager and the order of its chunks."""

    connector: Any
    scheduler: Any
    manager: Any
    policy: Any

    @classmethod
    def installed(cls) -> Tiers | None:
        """Those of the installed vLLM, if it has them all."""
        try:
            from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
            from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
            from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
            from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy
        except ImportError:
            return None
        return cls(OffloadingConnector, OffloadingConnectorScheduler, CPUOffloadingManager, LRUCachePolicy)


@dataclass(frozen=True, slots=True)
class Seams:
    """vLLM's classes that we derive from, replace or call."""

    scheduler: Any
    coordinator: Any
    pool: Any
    free_queue: Any
    waiting: Any
    request: Any
    request_type: Any
    tier: Tiers | None

    @classmethod
    def installed(cls) -> Seams:
        """Those of the installed vLLM. ImportError where one is gone."""
        from vllm.v1.core.block_pool import BlockPool
        from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
        from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.request_queue import PriorityRequestQueue
        from vllm.v1.engine import EngineCoreRequestType
        from vllm.v1.request import Request

        return cls(
            AsyncScheduler, KVCacheCoordinator, BlockPool, FreeKVCacheBlockQueue, PriorityRequestQueue, Request,
            EngineCoreRequestType, Tiers.installed(),
        )  # fmt: skip


def eviction(seams: Seams) -> None:
    """Blocks can be given up in our order. Raises Missing."""
    for name in ("schedule", "reset_prefix_cache"):
        _callable(seams.scheduler, name)
    for name in ("add_request", "_free_request", "_free_request_blocks"):
        _callable(seams.scheduler, name, "request")
    _callable(seams.coordinator, "get_blocks", "request id")
    _parameter(seams.request, "block_hasher")
    ours = {name for name in dir(OwnerQueue) if not name.startswith("_")}
    theirs = {name for name in dir(seams.free_queue) if not name.startswith("_")}
    if new := theirs - ours:
        raise Missing(f"the queue of free blocks has more: {', '.join(sorted(new))}")
    stock, mine = seams.pool(16, True, 4), seams.pool(16, True, 4)
    _put_in(mine)
    if _trip(stock) != _trip(mine):
        raise Missing("a block pool does not do with our queue what it does with its own")


def order(seams: Seams) -> None:
    """Waiting requests can change their places. Raises Missing."""
    for name in ("add_request", "remove_requests"):
        _callable(seams.waiting, name, "request")
    _callable(seams.waiting, "__iter__")
    _parameter(seams.request, "priority")


def passing(seams: Seams) -> None:
    """A prefill can be kept from taking a whole step. Raises Missing."""
    _callable(seams.scheduler, "_is_blocked_waiting_status")
    _callable(seams.pool, "get_cached_block", "hash", "groups")
    plans = inspect.getsource(seams.scheduler.schedule)
    for name in (
        "self.scheduler_config.long_prefill_token_threshold", "self.adaptive_long_prefill_threshold",
        "self.max_num_scheduled_tokens", "self.max_num_active_reqs", "self.num_waiting_for_streaming_input",
        "self.num_spec_tokens", "self.kv_holding_waiting", "peek_request()",
    ):  # fmt: skip
        if name not in plans:
            raise Missing(f"{seams.scheduler.__name__}.schedule knows no {name.rpartition('.')[2]}")


def control(seams: Seams) -> None:
    """Messages reach the scheduler. Raises Missing."""
    if not hasattr(seams.request_type, "UTILITY"):
        raise Missing("no utility calls")


def session(seams: Seams) -> None:
    """A request says whose it is by a header. Raises Missing."""
    _parameter(seams.request, "session_id")


def host_tier(seams: Seams) -> None:
    """The host tier can be ranked with the device, and fetched from without a request. Raises Missing."""
    if (tier := seams.tier) is None:
        raise Missing("no offloading connector")
    for of, calls in (
        (tier.connector, (
            ("on_new_request", "request"), ("get_num_new_matched_tokens", "request", 0), ("build_connector_meta", "of"),
            ("update_state_after_alloc", "request", "blocks", 0), ("request_finished", "request", "blocks"),
            ("request_finished_all_groups", "request", "blocks"), ("update_connector_output", "output"),
            ("get_finished", "ids"), ("has_pending_push_work",), ("reset_cache",),
        )),
        (tier.manager, (
            ("on_new_request", "context"), ("prepare_store", "keys", "context"), ("complete_store", "keys", "context"),
            ("prepare_load", "keys", "context"), ("complete_load", "keys", "context"),
        )),
        (tier.policy, (
            ("get", "key"), ("remove", "key"), ("mark_evictable", "key"), ("mark_non_evictable", "key"), ("clear",),
            ("touch", "keys", "context"), ("evict", 1, "protected"),
            ("on_request_finished", "groups", "inserted", "reused", "context"),
        )),
    ):  # fmt: skip
        for name, *arguments in calls:
            _callable(of, name, *arguments)
    kept = inspect.getsource(tier.scheduler)
    for name in (
        "_req_status", "_generate_job_id", "_block_id_to_pending_jobs", "_chunks_being_loaded",
        "_current_batch_allocated_block_ids", "_current_batch_jobs_to_flush", "manager",
    ):  # fmt: skip
        if f"self.{name}" not in kept:
            raise Missing(f"{tier.scheduler.__name__} has no {name}")


CHECKS: dict[str, Callable[[Seams], None]] = {
    "eviction": eviction, "order": order, "passing": passing, "control": control, "session": session,
    "host_tier": host_tier,
}  # fmt: skip


def failures(seams: Callable[[], Seams] = Seams.installed) -> dict[str, str]:
    """What cannot be done, and why. Never raises."""
    try:
        classes = seams()
    except Exception as why:
        return dict.fromkeys(CHECKS, reason(why))
    found = {}
    for name, check in CHECKS.items():
        try:
            check(classes)
        except Exception as why:
            found[name] = reason(why)
    return found


def reason(why: Exception) -> str:
    """An exception as a reader wants it."""
    return str(why) if isinstance(why, Missing) else f"{type(why).__name__}: {why}"[:300]


def _callable(of: Any, name: str, *arguments: Any) -> None:
    found = getattr(of, name, None)
    if not callable(found):
        raise Missing(f"no {of.__name__}.{name}")
    try:
        inspect.signature(found).bind(None, *arguments)
    except TypeError as why:
        raise Missing(f"{of.__name__}.{name}: {why}") from None


def _parameter(of: Any, name: str) -> None:
    if name not in inspect.signature(of).parameters:
        raise Missing(f"{of.__name__} has no {name}")


def _put_in(pool: Any) -> None:
    clock = itertools.count()
    free = pool.free_block_queue.get_all_free_blocks()

    def failed(why: Exception) -> None:
        raise why

    pool.free_block_queue = OwnerQueue(pool.blocks, free, Keeper(Policy(), 4), lambda: float(next(clock)), failed)


def _trip(pool: Any) -> list[Any]:
    """What a pool does with blocks that are taken, named, freed, found again and evicted."""
    said: list[Any] = []

    def take(count: int) -> list[Any]:
        blocks: list[Any] = pool.get_new_blocks(count)
        said.append([block.block_id for block in blocks])
        return blocks

    first, second = take(6), take(3)
    for number, block in enumerate([*first[:5], *second[:2]]):
        block.set_block_hash(bytes([number]) * 32 + bytes(GROUP_BYTES))
    pool.free_blocks(reversed(first))
    pool.free_blocks(reversed(second))
    pool.touch(first[1:3])
    third = take(10)
    pool.free_blocks(reversed(first[1:3]))
    pool.free_blocks(reversed(third))
    take(4)
    said += [[block.block_id for block in pool.free_block_queue.get_all_free_blocks()], pool.get_num_free_blocks()]
    said.append([block.block_hash for block in pool.blocks])
    return said


def submits_first(worker: Any = None) -> bool:
    """Whether a worker copies what it is to store and to wait for before it computes, as vLLM 0.32 does."""
    said: list[tuple[str, Any]] = []

    class Copies:
        def submit_store(self, job: int, *_: Any) -> bool:
            said.append(("copy", job))
            return True

        def wait(self, jobs: Any) -> None:
            said.append(("wait", sorted(jobs)))

    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
            OffloadingConnectorMetadata,
            TransferJob,
        )
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
        from vllm.v1.kv_offload.base import GPULoadStoreSpec

        tried = object.__new__(worker or OffloadingConnectorWorker)
        tried.worker, tried._is_store_writer, tried._unsubmitted_store_jobs = Copies(), True, []
        job = TransferJob("a request", GPULoadStoreSpec([0], [1], [0]), GPULoadStoreSpec([0], [1], [0]))
        step = OffloadingConnectorMetadata(load_jobs={}, store_jobs={7: job}, jobs_to_flush={7})
        tried.handle_preemptions(step)
        tried.prepare_store_kv(step)
        tried.handle_preemptions(OffloadingConnectorMetadata(load_jobs={}, store_jobs={}))
    except Exception:
        return False
    return said == [("copy", 7), ("wait", [7])]


def main() -> None:
    """Print what would be found."""
    import vllm

    missing = failures()
    said = {"vllm": vllm.__version__, "made for": SUPPORTED, "supported": supported(vllm.__version__)}
    said |= {name: name not in missing for name in CHECKS}
    print(json.dumps(said | {"why": missing}, indent=1))


if __name__ == "__main__":
    main()
