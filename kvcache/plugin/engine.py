"""vLLM's scheduler, aware of the owners of KV: `--scheduler-cls kvcache.plugin.engine.WeftScheduler`.

Blocks are given up by their owners' next use instead of LRU, requests wait and are preempted by the priority that the
core gives their owners, short prefills pass long ones, and its messages come in through vLLM's own utility calls, on
the engine's thread (`kvcache.plugin.control`). `--additional-config` takes `weft_policy` (retention) and `weft_guard`
(true), for benchmarks: with false, the policy is not compared with LRU.

The base is vLLM's asynchronous scheduler; where vLLM schedules synchronously (on the CPU, or pipeline parallelism on
its old model runner) what that adds is left out: a placeholder lets a step go on whose token is still on its way. With
steps in flight a request may end one step before its last blocks are free, or be preempted while its tokens are on
their way; the hooks hold, since a block has a hash only once its tokens are final, placeholders and drafts never do,
and what a step leaves is read where vLLM takes it from the request. A block on its way back is in use for the queue
until it is there.

What is put in has passed a self-test. Where a seam of vLLM is not what it was, or ours fails later on, the engine does
as vLLM does and says so: `{"ask": "abilities"}` is answered with

    {"plugin": true, "vllm": version, "supported": bool, "eviction": bool, "guard": bool, "order": bool,
     "passing": bool, "control": bool, "session": bool, "residency": bool, "host_tier": tokens, "prefetch": bool,
     "block": tokens, "why": [reasons for what is false]}
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from kvcache.hints import Hints
from kvcache.keeper import Keeper
from kvcache.plugin.control import Control, stock
from kvcache.plugin.free_queue import OwnerQueue
from kvcache.plugin.groups import Group, Unfit, telling
from kvcache.plugin.owners import owners_of
from kvcache.plugin.passing import Passing
from kvcache.plugin.selftest import failures, reason
from kvcache.plugin.steps import Steps
from kvcache.plugin.versions import supported
from kvcache.plugin.waiting import reorder
from kvcache.policies import POLICIES
from kvcache.policy import Policy
from kvcache.shadow import Guarded, Shadow

logger = init_logger("vllm.weft")

POLICY = "retention"


class WeftScheduler(AsyncScheduler):  # type: ignore[misc]
    """One engine's scheduler. `abilities` says what it can do here. No exception of ours gets out of it.

    `clock` tells seconds; benchmarks have another.
    """

    clock = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.abilities: dict[str, Any] = {
            "plugin": True, "vllm": vllm.__version__, "supported": supported(vllm.__version__), "eviction": False,
            "guard": False, "order": False, "passing": False, "control": True, "session": True, "residency": False,
            "host_tier": 0, "prefetch": False, "block": 0, "why": [],
        }  # fmt: skip
        self._steps: Steps | None = None  # None: ours is off
        self._queue: OwnerQueue | None = None
        self._connected: Any = None
        self._passing: Passing | None = None
        self._told: dict[str, None] = {}  # owners whose priority has changed
        try:
            self._put_in(failures())
        except Exception as why:
            self._turn_off(why)

    def __call__(self, message: Any) -> dict[str, Any]:
        """A message of the core, by vLLM's utility call "scheduler"."""
        if isinstance(message, dict) and message.get("ask") == "abilities":
            ranked = self._connected is None or self._connected.gauges().get("host_ranked", 1.0)
            return self.abilities | ({} if ranked else {"prefetch": False})
        answer: dict[str, Any] | None = self._safely(self._answer, message)
        return stock(message) if answer is None else answer

    def add_request(self, request: Request) -> None:
        """A step comes to wait, or a streamed one goes on."""
        if request.request_id not in self.requests:
            self._safely(self._came, request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Choose what the next forward pass computes."""
        self._safely(self._plan)
        output = super().schedule(*args, **kwargs)
        if output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids:
            self._safely(self._admitted, output)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take over what a step has computed."""
        found = super().update_from_output(scheduler_output, model_runner_output)
        self._safely(self._stepped, scheduler_output)
        return found

    def _update_after_schedule(self, *args: Any, **kwargs: Any) -> None:
        self._base._update_after_schedule(self, *args, **kwargs)

    def _update_request_with_output(self, *args: Any, **kwargs: Any) -> Any:
        return self._base._update_request_with_output(self, *args, **kwargs)

    @property
    def _base(self) -> Any:
        """The scheduler of vLLM that would run if ours did not."""
        return AsyncScheduler if self.scheduler_config.async_scheduling else Scheduler

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Forget all cached KV. False where some is in use, or a connector cannot."""
        self._safely(self._settle)
        try:
            return bool(super().reset_prefix_cache(*args, **kwargs))
        finally:
            # Whatever the answer, the pool may have been emptied.
            self._safely(Steps.emptied, self.clock())

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        found = super()._free_request(request, *args, **kwargs)
        self._safely(self._left, request)
        return found

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._safely(self._unsay, request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request_blocks(self, request: Request) -> None:
        self._safely(self._freeing, request)
        super()._free_request_blocks(request)

    def _plan(self, steps: Steps) -> None:
        steps.planned(self.clock())
        if self._passing is not None:
            self._passing.plan()

    def _came(self, steps: Steps, request: Request) -> None:
        steps.came(request, self.clock())
        priority = self._hints.priorities.get(owners_of(request)[0])
        if priority is not None and self.abilities["order"]:
            request.priority = priority

    def _left(self, steps: Steps, request: Request) -> None:
        steps.left(request, self.clock())
        if (owner := owners_of(request)[0]) not in steps:
            self._hints.priorities.pop(owner, None)  # that of its next step comes with it

    def _admitted(self, steps: Steps, output: Any) -> None:
        again = output.scheduled_cached_reqs
        ran = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        if again.resumed_req_ids:
            both = zip(again.req_ids, again.num_computed_tokens, strict=True)
            ran |= {name: tokens for name, tokens in both if name in again.resumed_req_ids}
        found = []
        for request in self.running:  # in the order of admission
            if (tokens := ran.get(request.request_id)) is None:
                continue
            kept, stats = tokens, getattr(request, "prefill_stats", None)
            if stats is not None and not request.num_preemptions:
                kept = stats.num_local_cached_tokens  # the others came from a connector
                if self._connected is not None:
                    kept += stats.num_external_cached_tokens + self._connected.left_out(request.request_id)
            groups = self.kv_cache_manager.coordinator.get_blocks(request.request_id)
            found.append((request, kept, [*chain.from_iterable(groups)]))
        steps.admitted(found, self._used, self._late, self.clock())

    @property
    def _late(self) -> Counter[int]:
        """How many steps that are over still hold each block: vLLM takes back late what one in flight may write."""
        waiting = getattr(self, "deferred_frees", ())
        return Counter(block.block_id for _, blocks in waiting for block in blocks if not block.is_null)

    @property
    def _used(self) -> int:
        """Blocks in use, without those that are only on their way back."""
        pool = self.kv_cache_manager.block_pool
        back = sum(pool.blocks[number].ref_cnt == times for number, times in self._late.items())
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() - back)

    def _stepped(self, steps: Steps, output: Any) -> None:
        if self._connected is not None:
            self._connected.stepped(output)

    def _unsay(self, steps: Steps, request: Request) -> None:
        # vLLM names blocks when it plans what fills them. A request that is preempted in the very step for which it was
        # planned leaves such as hold nothing of the kind.
        coordinator, pool = self.kv_cache_manager.coordinator, self.kv_cache_manager.block_pool
        groups = coordinator.get_blocks(request.request_id)
        for manager, blocks in zip(coordinator.single_type_managers, groups, strict=True):
            for block in blocks[request.num_computed_tokens // manager.block_size :]:
                if block.block_hash is not None and block.ref_cnt == 1:
                    pool._maybe_evict_cached_block(block)

    def _freeing(self, steps: Steps, request: Request) -> None:
        groups = self.kv_cache_manager.coordinator.get_blocks(request.request_id)
        steps.frees(request, groups, self._used, self.clock())

    def _settle(self, steps: Steps) -> None:
        if self._connected is not None:
            self._connected.settle()  # what it fetches holds blocks

    def _answer(self, steps: Steps, message: Any) -> dict[str, Any]:
        self._told.clear()
        answer = self._control.answer(message, self.clock())
        if self._told:
            reorder((self.waiting, self.kv_holding_waiting), steps.told(self._told, self._hints.priorities))
        return answer

    def _gauges(self) -> dict[str, float]:
        gauges: dict[str, float] = dict(self._connected.gauges()) if self._connected is not None else {}
        if self._queue is not None:
            names = ("dead", "unknown", "known", "leased")
            gauges |= {f"evicted_{name}_total": n for name, n in zip(names, self._queue.evicted, strict=True)}
        if self._guard is not None:
            shadow = self._guard.shadow
            gauges |= {"guard_hits_total": shadow.hits, "guard_lru_hits_total": shadow.lru}
            gauges["guard_weight"] = self._guard.weight
        return gauges

    def _put_in(self, missing: dict[str, str]) -> None:
        settings = self.vllm_config.additional_config
        settings = settings if isinstance(settings, dict) else {}
        pool, group = self.kv_cache_manager.block_pool, None
        try:
            group = telling(self.kv_cache_manager, self.hash_block_size)
        except Unfit as why:
            missing = {"eviction": str(why)} | missing
        if getattr(self.policy, "value", None) != "priority":
            missing = {"order": "--scheduling-policy is not priority"} | missing
        for name, lack in missing.items():
            self._lacks(name, lack)
        policy: Policy = POLICIES[settings.get("weft_policy", POLICY)]()
        block = group.block if group else self.block_size
        tiered = not missing.keys() & {"eviction", "host_tier"} and hasattr(self.connector, "ranks")
        # Under LRU the host holds what the device holds, too.
        shadow = Shadow(max(pool.num_gpu_blocks - 1, self.connector.ranks(block) if tiered else 0))
        self._guard = Guarded(policy, shadow) if settings.get("weft_guard", True) else None
        keeper, queue = Keeper(self._guard or policy, block), None
        if "eviction" not in missing:
            free = pool.free_block_queue.get_all_free_blocks()
            queue = OwnerQueue(pool.blocks, free, keeper, self.clock, self._turn_off)
        self._connected = self._attached(keeper, queue) if "host_tier" not in missing else None
        self._hints = Hints(
            keeper,
            self._connected.prefetch if self.abilities["prefetch"] else None,
            (lambda owner: self._told.update({owner: None})) if "order" not in missing else None,
        )
        self._control = Control(keeper, self._hints, self._gauges)
        self._steps = Steps(keeper, queue, group, self._guard, 1 + keeper.block * self.use_eagle_block_drop)
        self._passing = self._let_pass(keeper, group) if "passing" not in missing else None
        self.abilities |= {"order": "order" not in missing, "block": keeper.block}
        if queue is not None:
            # One of several data-parallel engines answers for all.
            alone = self.parallel_config.data_parallel_size == 1
            self.abilities |= {"eviction": True, "residency": alone, "guard": self._guard is not None}
            if not alone:
                self._lacks("residency", "the server has several data-parallel engines")
            pool.free_block_queue = self._queue = queue
            logger.info("Weft keeps the KV blocks: %d of %d tokens", pool.num_gpu_blocks, keeper.block)

    def _let_pass(self, keeper: Keeper, group: Group | None) -> Passing | None:
        try:
            passing = Passing(self, keeper.ledger, group)
        except Unfit as why:
            self._lacks("passing", str(why))
            return None
        self.abilities["passing"] = True
        return passing

    def _attached(self, keeper: Keeper, queue: OwnerQueue | None) -> Any:
        """Our connector, where it is here and keeps its tier by owners as well."""
        if queue is None or self.connector is None:
            return None
        if not hasattr(self.connector, "attach"):
            self._lacks("host_tier", f"{type(self.connector).__name__} keeps what it keeps in an order of its own")
            return None
        try:
            self.abilities |= self.connector.attach(keeper, queue, self.clock)
        except Exception as why:
            self._lacks("host_tier", reason(why))
            return None
        return self.connector

    def _safely(self, does: Callable[..., Any], *args: Any) -> Any:
        """What `does` returns for the steps and `args`; None where ours is off, or fails and is off from now on."""
        if self._steps is None:
            return None
        try:
            return does(self._steps, *args)
        except Exception as why:
            self._turn_off(why)
            return None

    def _turn_off(self, why: Exception) -> None:
        """Go on as vLLM does."""
        logger.warning("Weft's plug-in is off, vLLM goes on alone", exc_info=why)
        self._steps = None
        if self._queue is not None:
            self._queue.stop()
        if self._passing is not None:
            self._passing.stop()
        if self._connected is not None:
            try:
                self._connected.detach()
            except Exception:
                logger.exception("Weft's connector could not be detached")
        self.abilities |= dict.fromkeys(("eviction", "guard", "order", "passing", "residency", "prefetch"), False)
        self.abilities["why"].append(reason(why))

    def _lacks(self, ability: str, why: str) -> None:
        logger.warning("Weft's plug-in does without %s: %s", ability, why)
        self.abilities[ability] = 0 if ability == "host_tier" else False
        self.abilities["why"].append(f"{ability}: {why}")
