"""vLLM's scheduler, aware of the owners of KV: `--scheduler-cls kvcache.plugin.engine.WeftScheduler`.

Blocks are given up by their owners' next use instead of LRU, waiting requests go by their owners' priority, and
messages of the core come in through vLLM's own utility calls, on the engine's thread. The base is vLLM's asynchronous
scheduler, which is right with synchronous scheduling, too. Where a seam of vLLM is not what it was, the engine is stock
and says so in `abilities`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from kvcache.hints import Hints
from kvcache.keeper import Keeper
from kvcache.ledger import ANONYMOUS, Key
from kvcache.plugin.free_queue import OwnerQueue, key_of
from kvcache.plugin.waiting import StepQueue
from kvcache.policies import POLICIES

logger = init_logger("vllm.weft")

POLICY = "retention"


def owners_of(request: Request) -> tuple[str, str | None]:
    """The branch and the role on whose account a request runs: `BRANCH.ROLE` in its session id."""
    branch, _, role = (getattr(request, "session_id", None) or "").partition(".")
    return branch or ANONYMOUS, role or None


class WeftScheduler(AsyncScheduler):  # type: ignore[misc]
    """One engine's scheduler. `abilities` says what it can do here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.abilities: dict[str, Any] = {"plugin": True, "eviction": False, "order": False}
        self._running_of: dict[str, set[Request]] = defaultdict(set)
        settings = self.vllm_config.additional_config or {}
        pool = self.kv_cache_manager.block_pool
        self._keeper = Keeper(POLICIES[settings.get("weft_policy", POLICY)](), self.block_size)
        self._hints = Hints(self._keeper, reordered=self._reordered)
        self._queue = OwnerQueue(pool.blocks, pool.free_block_queue.get_all_free_blocks(), self._keeper)
        pool.free_block_queue = self._queue
        self.waiting = StepQueue(self._priority)
        self.kv_holding_waiting = StepQueue(self._priority)
        self.abilities |= {"eviction": True, "order": True}
        logger.info("Weft keeps the KV blocks: %d of %d tokens", pool.num_gpu_blocks, self.block_size)

    def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message of the core, by vLLM's utility call "scheduler"."""
        if message.get("ask") == "abilities":
            return self.abilities
        return {"answers": self._hints.handle(message, time.monotonic())}

    def add_request(self, request: Request) -> None:
        """A step comes to wait, or a streamed one goes on."""
        if request.request_id not in self.requests:
            owner, _ = owners_of(request)
            self._running_of[owner].add(request)
            self._keeper.began(owner, self._prompt_keys(request), time.monotonic())
        super().add_request(request)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Forget all cached KV. False where some is in use."""
        done = bool(super().reset_prefix_cache(*args, **kwargs))
        if done:
            self._queue.reset()
        return done

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        owner, _ = owners_of(request)
        found = super()._free_request(request, *args, **kwargs)
        if (mine := self._running_of.get(owner)) is not None and request in mine:
            mine.discard(request)
            if not mine:
                del self._running_of[owner]
            self._keeper.left(owner, request.num_tokens, time.monotonic())
        return found

    def _free_request_blocks(self, request: Request) -> None:
        """The request's blocks are free: it has ended or is preempted. What they hold is its owners' from now on."""
        groups = self.kv_cache_manager.coordinator.get_blocks(request.request_id)
        owner, role = owners_of(request)
        keys = [key for block in groups[0] if (key := key_of(block)) is not None] if groups else []
        if keys:
            self._keeper.wrote(owner, role, keys, time.monotonic())
            self._queue.declare(groups[0])
        super()._free_request_blocks(request)

    def _prompt_keys(self, request: Request) -> list[Key] | None:
        """What its full blocks would be named; None where blocks are not hashed one by one."""
        if self.hash_block_size != self.block_size:
            return None
        return [bytes(one) for one in request.block_hashes]

    def _priority(self, request: Request) -> float:
        return self._hints.priorities.get(owners_of(request)[0], 0.0)

    def _reordered(self, owner: str) -> None:
        for queue in (self.waiting, self.kv_holding_waiting):
            queue.reordered(self._running_of.get(owner, ()))
