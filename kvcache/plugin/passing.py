"""Short prefills pass long ones in vLLM's scheduler (`kvcache.chunks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcache.chunks import SHORT, longest
from kvcache.ledger import Ledger
from kvcache.plugin.groups import Group, Unfit

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def _left(request: Request) -> int:
    """Tokens that are to be computed before its next one; 1 where it decodes."""
    return int(request.num_tokens - request.num_computed_tokens)


class Passing:
    """Says before each step how much of it one prefill may take, by vLLM's own `long_prefill_token_threshold`.

    Raises Unfit where that is the user's already, or prefills are not cut.
    """

    def __init__(self, scheduler: Scheduler, ledger: Ledger, group: Group | None) -> None:
        self._scheduler, self._ledger, self._group = scheduler, ledger, group
        self._next = ("", 0)  # the one that waited first, and what was to be computed of it
        config = scheduler.scheduler_config
        if config.long_prefill_token_threshold:
            raise Unfit("--long-prefill-token-threshold is set")
        if not config.enable_chunked_prefill:
            raise Unfit("prefills are not chunked")
        if config.disable_chunked_mm_input:
            raise Unfit("what an encoder makes is not chunked")

    def plan(self) -> None:
        """A step is about to be planned."""
        scheduler = self._scheduler
        budget, running = scheduler.max_num_scheduled_tokens, scheduler.running
        left = [more for one in running if (more := _left(one)) > 1]
        most = budget
        if max(left, default=0) > SHORT * budget:
            # vLLM serves them in this order: what passes a long one must get its tokens in later steps, too.
            running.sort(key=lambda one: _left(one) > 1)
            decoding = (len(running) - len(left)) * (1 + scheduler.num_spec_tokens)
            most = longest(budget, decoding, left, self._coming(sum(left)))
        scheduler.scheduler_config.long_prefill_token_threshold = most if most < budget else 0

    def stop(self) -> None:
        """vLLM goes on alone."""
        self._scheduler.scheduler_config.long_prefill_token_threshold = 0

    def _coming(self, promised: int) -> list[int]:
        """What is to be computed of each that may join: of those that have been loaded, else of the first that waits.

        For so many tokens those that run will need memory.
        """
        scheduler = self._scheduler
        if len(scheduler.running) + scheduler.num_waiting_for_streaming_input >= scheduler.max_num_active_reqs:
            return []
        loaded = [max(1, _left(one)) for one in scheduler.kv_holding_waiting if self._ready(one)]
        if loaded or not scheduler.waiting:
            return loaded
        first = scheduler.waiting.peek_request()
        if self._next[0] != first.request_id:
            self._next = first.request_id, self._new(first)
        tokens = self._next[1]
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks() * scheduler.block_size
        return [tokens] if tokens <= free - promised else []

    def _ready(self, request: Request) -> bool:
        """Whether it is there whole, or has been asked to go on."""
        waits = self._scheduler._is_blocked_waiting_status(request.status)
        return not waits or request.request_id in self._scheduler.finished_recving_kv_req_ids

    def _new(self, request: Request) -> int:
        """What a step may compute of a request that waits: what neither tier has, 1 where it is to be loaded first.

        As far as is known: more may have to be computed than that.
        """
        tokens = int(request.num_tokens)
        if self._group is None or (keys := self._group.prompt(request)) is None:
            return tokens
        device, both = self._ledger.reach(keys)
        return 1 if both > device else max(1, tokens - device * self._group.block)
