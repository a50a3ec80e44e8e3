"""Short prefills pass long ones in vLLM's scheduler (`kvcache.chunks`)."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from kvcache.chunks import longest, shortest
from kvcache.ledger import HOST, Ledger
from kvcache.plugin.groups import Group, Unfit

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def _left(request: Request) -> int:
    """Tokens that are to be computed before its next one; at most 1 where it decodes."""
    return int(request.num_tokens - request.num_computed_tokens)


class Passing:
    """Says before each step how much of it one prefill may take, by vLLM's own `long_prefill_token_threshold`.

    Raises Unfit where that is the user's already, prefills are not cut, or the last that runs is the first preempted.
    """

    def __init__(self, scheduler: Scheduler, ledger: Ledger, group: Group | None) -> None:
        self._scheduler, self._ledger, self._group = scheduler, ledger, group
        self._kept = ""  # who waited first when the last step was planned, if there was room for it
        self._refused = ("", 0)  # who did not take it, and how many ran
        config = scheduler.scheduler_config
        if config.long_prefill_token_threshold or scheduler.adaptive_long_prefill_threshold:
            raise Unfit("--long-prefill-token-threshold is set")
        if not config.enable_chunked_prefill:
            raise Unfit("prefills are not chunked")
        if config.disable_chunked_mm_input:
            raise Unfit("what an encoder makes is not chunked")
        if getattr(scheduler.policy, "value", None) != "priority":
            raise Unfit("--scheduling-policy is not priority")

    def plan(self) -> None:
        """A step is about to be planned."""
        scheduler = self._scheduler
        running = scheduler.running
        left = [more for one in running if (more := _left(one)) > 1]
        room = scheduler.max_num_scheduled_tokens - (len(running) - len(left)) * (1 + scheduler.num_spec_tokens)
        bound, most = shortest(room), room
        if max(left, default=0) > bound > 0:
            # vLLM serves them in this order: what passes a long one must get its tokens in later steps, too.
            running.sort(key=lambda one: (_left(one) > 1) + (_left(one) > bound))
            most = longest(room, left, self._coming(bound, sum(left)))
        else:
            self._kept = ""
        scheduler.scheduler_config.long_prefill_token_threshold = most if most < room else 0

    def stop(self) -> None:
        """vLLM goes on alone."""
        self._scheduler.scheduler_config.long_prefill_token_threshold = 0

    def _coming(self, bound: int, promised: int) -> list[int]:
        """What is to be computed of each that may join: those that have been loaded, and the first that waits.

        None where there is no place. Of the latter if it is at most `bound` tokens, there is memory for it beside the
        `promised` tokens that those who run will compute, and it did not wait on when there was room for it: then it
        lacks something else, and waits until somebody ends.
        """
        scheduler = self._scheduler
        if len(scheduler.running) + scheduler.num_waiting_for_streaming_input >= scheduler.max_num_active_reqs:
            self._kept = ""
            return []
        coming = [max(1, _left(one)) for one in scheduler.kv_holding_waiting if self._ready(one)]
        first = scheduler.waiting.peek_request() if scheduler.waiting else None
        if first is None or not self._ready(first):
            self._kept = ""
            return coming
        name, inside = first.request_id, len(scheduler.running)
        if self._kept == name:
            self._refused = name, inside
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks() * scheduler.block_size
        refused = self._refused[0] == name and self._refused[1] <= inside
        fits = not refused and first.num_tokens <= free - promised and (new := self._new(first)) <= bound
        self._kept = name if fits and not coming else ""  # what has been loaded comes in before it
        return [*coming, new] if fits else coming

    def _ready(self, request: Request) -> bool:
        """Whether nothing is outstanding that it waits for."""
        waits = self._scheduler._is_blocked_waiting_status(request.status)
        return not waits or request.request_id in self._scheduler.finished_recving_kv_req_ids

    def _new(self, request: Request) -> int:
        """What is to be computed of a request that waits: what the device has not, 1 where it is to be loaded first.

        Where a block is gone, those behind it count as gone.
        """
        tokens, group = int(request.num_tokens), self._group
        if group is None or not group.named:
            return tokens
        hashes, pool = request.block_hashes, self._scheduler.kv_cache_manager.block_pool
        places = [group.place]
        have = bisect_left(range(len(hashes)), True, key=lambda at: pool.get_cached_block(hashes[at], places) is None)
        if have < len(hashes) and self._ledger.copies(bytes(hashes[have]), HOST):
            return 1
        return max(1, tokens - have * group.block)
