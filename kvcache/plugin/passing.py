"""Short prefills pass long ones in vLLM's scheduler (`kvcache.chunks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcache.chunks import SHORT, longest
from kvcache.ledger import Ledger
from kvcache.plugin.groups import Group, Unfit

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class Passing:
    """Says before each step how much of it one prefill may take, by vLLM's own `long_prefill_token_threshold`.

    Raises Unfit where that is the user's already, or prefills are not cut.
    """

    def __init__(self, scheduler: Scheduler, ledger: Ledger, group: Group | None) -> None:
        self._scheduler, self._ledger, self._group = scheduler, ledger, group
        config = scheduler.scheduler_config
        if config.long_prefill_token_threshold:
            raise Unfit("--long-prefill-token-threshold is set")
        if not config.enable_chunked_prefill:
            raise Unfit("prefills are not chunked")

    def plan(self) -> None:
        """A step is about to be planned."""
        scheduler = self._scheduler
        budget, running = scheduler.max_num_scheduled_tokens, scheduler.running
        left = [more for one in running if (more := one.num_tokens - one.num_computed_tokens) > 1]
        decoding, most = len(running) - len(left), budget
        if max(left, default=0) > SHORT * budget:
            if scheduler.waiting:
                left.append(self._new(scheduler.waiting.peek_request()))
            most = longest(budget, decoding, left)
        scheduler.scheduler_config.long_prefill_token_threshold = most if most < budget else 0

    def stop(self) -> None:
        """vLLM goes on alone."""
        self._scheduler.scheduler_config.long_prefill_token_threshold = 0

    def _new(self, request: Request) -> int:
        """What is to be computed of a request that waits: what neither tier has, as far as is known of it."""
        tokens = int(request.num_tokens)
        if self._group is None or (keys := self._group.prompt(request)) is None:
            return tokens
        return max(1, tokens - self._ledger.reach(keys) * self._group.block)
