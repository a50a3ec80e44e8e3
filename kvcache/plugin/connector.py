"""vLLM's offloading connector with both tiers ranked as one, and prefetch without a request.

    --kv-transfer-config '{"kv_connector": "WeftConnector", "kv_connector_module_path": "kvcache.plugin.connector",
      "kv_role": "kv_both", "kv_connector_extra_config": {"spec_name": "HostTierSpec",
      "spec_module_path": "kvcache.plugin.host_copy", "cpu_bytes_to_use": BYTES, "offload_prompt_only": false}}'

Without Weft's scheduler, or where a model has several groups of KV, the tier is vLLM's own with LRU. In the extra
configuration also `link_gbps` (gigabytes a second, for the CPU platform: 0, as fast as it copies) and `always_restore`
(false: what is computed sooner than loaded, by the rates measured, is not loaded).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv

from kvcache.joint import Joint
from kvcache.keeper import Keeper
from kvcache.plugin.free_queue import OwnerQueue
from kvcache.plugin.host_moves import PREFIX, Jobs, Prefetches, Saves
from kvcache.plugin.host_policy import HostManager
from kvcache.plugin.host_rates import Rates
from kvcache.plugin.owners import owners_of
from kvcache.plugin.selftest import submits_first

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.weft")

AHEAD, FAR_AHEAD = 64, 16
"""The part of the device's blocks that is saved before it goes, if a step may take as many: the other where what went
can not be saved any more."""

STALL = 0.1
"""Seconds of copying for which a step waits at most."""


class WeftConnector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's connector of one engine, on the scheduler's side and on the worker's."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._saves: Saves | None = None  # None: not attached
        self._prefetches: Prefetches | None = None
        self._waiting: set[str] = set()
        self._flush: set[int] = set()
        self._skipped = 0
        self._left_out: dict[str, int] = {}
        self._clock: Callable[[], float] = time.monotonic
        self._queue: OwnerQueue | None = None
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._always = bool(extra.get("always_restore", False))
        self._caches = bool(vllm_config.cache_config.enable_prefix_caching)
        # Where KV is set to zero before it is used, what a block held is gone before it could be copied.
        self._late = submits_first() and not getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
        offloading = build_offloading_config(vllm_config, kv_cache_config)
        block = offloading.groups[0].tokens_per_block
        self._step = cdiv(vllm_config.scheduler_config.max_num_batched_tokens, block)
        self._rates = Rates(block, max(1, offloading.worker_kv_bytes_per_block))

    def ranks(self, block: int) -> int:
        """How many chunks it would rank with device blocks of so many tokens; 0: the tier stays vLLM's own."""
        manager, groups = self.scheduler.manager, self.scheduler.config.kv_group_configs
        group = groups[0]
        plain = len(groups) == 1 and group.sliding_window_size_in_chunks is None and not group.is_eagle_group
        if not (plain and self._caches and group.hashes_per_chunk == 1 and group.tokens_per_block == block):
            return 0
        return int(manager.policy.cache_capacity) if isinstance(manager, HostManager) else 0

    def attach(self, keeper: Keeper, queue: OwnerQueue, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
        """Rank the host's chunks with the device's blocks, free in `queue`; what this connector can do from now on.

        `clock` is that of all events of owners. What copies and steps take is measured by a clock of its own.
        """
        vllm, pool, manager = self.scheduler, self._kv_cache_manager.block_pool, self.scheduler.manager
        if not (chunks := self.ranks(keeper.block)):
            kept = manager.policy.cache_capacity if isinstance(manager, HostManager) else 0
            return {"host_tier": kept * vllm.config.kv_group_configs[0].tokens_per_chunk, "prefetch": False}
        if not self._late:
            logger.warning("Weft saves KV ahead of its eviction only: this vLLM copies nothing before it computes")
        margin = min(self._step, pool.num_gpu_blocks // (AHEAD if self._late else FAR_AHEAD))
        joint = Joint(keeper, _Contents(pool, keeper, manager), margin)
        manager.policy.attach(keeper, joint, self._request, clock)
        self._clock = clock
        self._saves = Saves(vllm, joint)
        self._prefetches = Prefetches(vllm, pool, keeper, joint, lambda: len(self._waiting), lambda: self._rates.blocks)
        self._queue = queue
        queue.watch(self._late)
        logger.info("Weft keeps %d tokens of KV on the host", chunks * keeper.block)
        return {"host_tier": chunks * keeper.block, "prefetch": True}

    def detach(self) -> None:
        """The device's blocks are not ranked any more: the tier is vLLM's own from now on."""
        if self._saves is not None:
            self._saves.stop()
            self.scheduler.manager.policy.detach()
            self.settle()
            if self._queue is not None:
                self._queue.watch(False)

    def left_out(self, request: str) -> int:
        """Tokens of a request that the host has, and that are computed all the same, as that is sooner done."""
        return self._left_out.get(request, 0)

    def prefetch(self, owner: str, within: float) -> bool:
        """Have an owner's KV on the device in so many seconds. False where the host has nothing that is missing."""
        return bool(self._safely(lambda prefetches: prefetches.wish(owner, within, self._clock())))

    def settle(self) -> None:
        """Hold no device block, as before the prefix cache is reset: prefetches end, and what they fetched is lost."""
        if self._prefetches is not None:
            self._flush |= self._prefetches.give_back()

    def gauges(self) -> dict[str, float]:
        """Totals in blocks since the start, but for `prefetch_dropped_total`, in owners, and what is held now.

        `host_ranked`: 1; 0 where ours has failed, and the tier is vLLM's own.
        """
        saves, prefetches = self._saves, self._prefetches
        if saves is None or prefetches is None:
            return {}
        prefetches.count_lost()
        manager: HostManager = self.scheduler.manager
        return {
            "host_ranked": float(manager.policy.joint is not None),
            "host_blocks": len(manager.policy.chunks),
            "host_stores_total": manager.policy.stored,
            "host_saves_total": saves.saved,
            "host_late_saves_total": saves.late,
            "host_refused_total": manager.refused,
            "host_evictions_total": manager.policy.evicted,
            "prefetch_blocks_total": prefetches.loaded,
            "prefetch_used_total": prefetches.used,
            "prefetch_wasted_total": prefetches.wasted,
            "prefetch_dropped_total": prefetches.dropped,
            "restore_skipped_total": self._skipped,
            "link_blocks_per_second": self._rates.blocks or 0.0,
            "prefill_tokens_per_second": self._rates.tokens or 0.0,
        }

    def on_new_request(self, request: Request) -> None:
        """A request comes: it goes before what was to be fetched for it."""
        super().on_new_request(request)
        if self._prefetches is not None:
            self._waiting.add(request.request_id)
            self._safely(lambda prefetches: prefetches.cancel(owners_of(request)[0]))

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What of a request's prompt the host has beyond what the device has, where that is worth loading."""
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not found[0] or self._always or not self._rates.leaves_out(request.request_id):
            return found
        self._skipped += found[0] // self._rates.block
        self._left_out[request.request_id] = found[0]
        self.scheduler._req_status[request.request_id].max_load_tokens = 0
        return super().get_num_new_matched_tokens(request, num_computed_tokens)  # type: ignore[no-any-return]

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """A request has its blocks."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if self._prefetches is not None:
            self._waiting.discard(request.request_id)
            self._safely(lambda prefetches: prefetches.count(blocks.blocks[0]))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended, or will not come to run."""
        self._forget(request.request_id)
        return super().request_finished(request, block_ids)  # type: ignore[no-any-return]

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """The same."""
        self._forget(request.request_id)
        return super().request_finished_all_groups(request, block_ids)  # type: ignore[no-any-return]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        """What the workers are to copy with this step."""
        saves, loads = self._start(self._clock())
        meta = super().build_connector_meta(scheduler_output)
        meta.load_jobs = {**meta.load_jobs, **loads}
        meta.store_jobs = {**meta.store_jobs, **saves}
        meta.jobs_to_flush = {*(meta.jobs_to_flush or ()), *self._flush}
        self._flush = set()
        self._rates.began(scheduler_output, scheduler_output.total_num_scheduled_tokens, time.monotonic())
        return meta

    def stepped(self, scheduler_output: SchedulerOutput) -> None:
        """A step has ended, also one of which the workers had nothing to say."""
        self._rates.ended(scheduler_output, time.monotonic())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have copied."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, OffloadingWorkerMetadata):
            loads = meta.transfer_stats.load
            if loads.time > 0:
                self._rates.loaded(loads.bytes, loads.time)
            for ours in (self._saves, self._prefetches):
                for job in [job for job in meta.completed_jobs if ours is not None and job in ours]:
                    self._done(ours, job, meta.completed_jobs.pop(job))
        super().update_connector_output(connector_output)

    def has_pending_push_work(self) -> bool:
        """Whether an idle engine must go on stepping."""
        return bool(self._saves or self._prefetches or super().has_pending_push_work())

    def reset_cache(self) -> bool | None:
        """Empty the host tier."""
        if self._saves is not None and self._prefetches is not None:
            self._flush |= self._saves.forget() | self._prefetches.forget()
        # vLLM's own part stands no second reset before the next step.
        self._flush |= self.scheduler._current_batch_jobs_to_flush
        self.scheduler._current_batch_jobs_to_flush = set()
        return super().reset_cache()  # type: ignore[no-any-return]

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """On the worker's side: the requests for which all has been copied. No request waits for ours."""
        sent, received = super().get_finished(finished_req_ids)
        return sent, {name for name in received if not name.startswith(PREFIX)}

    def _start(self, now: float) -> tuple[Jobs, Jobs]:
        """Copies to the host and to the device that begin with this step; none from the first failure on."""
        saves, loads = Jobs(), Jobs()
        if self._saves is not None and self._prefetches is not None:
            policy = self.scheduler.manager.policy
            if policy.joint is None and self._saves.on:
                self.detach()  # not in the step in which a copy began: its block may be freed only once workers know it
            try:
                with self._lock():
                    if policy.joint is not None:
                        loads = self._prefetches.start(now)
                    if policy.joint is not None and self._queue is not None:
                        self._saves.start_late(self._queue.leaving, saves, self._flush, self._most_late, now)
                        self._queue.let_go()
                    self._saves.start(saves, now)
            except Exception as why:
                policy.fail(why)
        return saves, loads

    @property
    def _most_late(self) -> int:
        """Blocks for whose copies a step may wait: none where they would be computed anew all the same."""
        if self._rates.recomputes and not self._always:
            return 0
        return self._step if self._rates.blocks is None else int(STALL * self._rates.blocks)

    def _done(self, ours: Any, job: int, workers: int) -> None:
        try:
            with self._lock():
                ours.done(job, workers)
        except Exception as why:
            self.scheduler.manager.policy.fail(why)

    def _safely(self, does: Callable[[Prefetches], Any]) -> Any:
        """What `does` returns; None where ours is off, or fails and is off from now on."""
        if self._prefetches is None:
            return None
        return self.scheduler.manager.policy.safely(lambda _: does(self._prefetches))

    def _forget(self, request: str) -> None:
        self._waiting.discard(request)
        self._left_out.pop(request, None)

    def _lock(self) -> AbstractContextManager[Any]:
        """That of vLLM's manager, which since 0.33 its callers hold."""
        lock: AbstractContextManager[Any] = getattr(self.scheduler.manager, "lock", None) or nullcontext()
        return lock

    def _request(self, name: str) -> Request | None:
        status = self.scheduler._req_status.get(name)
        return None if status is None else status.req


class _Contents:
    """What lies where, for the joint ranking. Chunks are named as vLLM names blocks: hash, then KV group."""

    def __init__(self, pool: Any, keeper: Keeper, manager: HostManager) -> None:
        self._pool, self._keeper, self._policy = pool, keeper, manager.policy

    def block(self, name: Any) -> int | None:
        """The device block of a chunk."""
        found = self._pool.cached_block_hash_to_block.get_one_block(name)
        return None if found is None else int(found.block_id)

    def name(self, number: int) -> Any:
        """The chunk of a device block."""
        return self._pool.blocks[number].block_hash

    def stored(self, name: Any) -> bool:
        """Whether the host has it or is being given it."""
        return name in self._policy.chunks

    def depth(self, name: Any) -> int:
        """Where in its prompt it ends, in tokens."""
        if (depth := self._policy.depths.get(name)) is not None:
            return depth
        block = self._pool.cached_block_hash_to_block.get_one_block(name)
        return 0 if block is None else block.block_hash_num_tokens or 0

    @property
    def idle(self) -> int:
        """Free device blocks without content."""
        return int(self._pool.get_num_free_blocks()) - len(self._keeper.device)

    @property
    def vacant(self) -> int:
        """Host chunks without content."""
        return self._policy.vacant
