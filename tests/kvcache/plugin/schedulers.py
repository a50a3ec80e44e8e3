"""vLLM's real scheduler with ours put in, without an engine around it: tokens are made up, several steps in flight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from bench.sequence import modelless
from kvcache.plugin.engine import WeftScheduler

BLOCK = 32


def config(**arguments: Any) -> VllmConfig:
    """vLLM's configuration: 4 requests at once, 512 tokens each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    given = {"max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 4, "scheduling_policy": "priority"}
    given |= {"enable_prefix_caching": True}
    return modelless.configured(**(given | arguments))


def full(block: int = BLOCK) -> FullAttentionSpec:
    """A layer with full attention."""
    return modelless.full(block)


class Played:
    """A scheduler, and what an engine does with it. `blocks` can be used."""

    def __init__(
        self, blocks: int = 16, specs: Sequence[KVCacheSpec] = (), hash_block: int | None = None,
        kind: type[Any] = WeftScheduler, asynchronous: bool = True, **arguments: Any,
    ) -> None:  # fmt: skip
        settings = config(**arguments)
        settings.scheduler_config.async_scheduling = asynchronous
        self.scheduler, self._hasher = modelless.scheduler(settings, blocks, specs or (full(),), kind, hash_block)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.found: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self._flying: deque[Any] = deque()

    def ask(
        self, name: str, prompt: Sequence[int], session: str | None = None, tokens: int = 4, **more: Any
    ) -> Request:
        """Let a request come."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        request = modelless.asked(name, prompt, params, self._hasher, session_id=session, **more)
        self.scheduler.add_request(request)
        return request

    def begin(self) -> None:
        """Schedule a step, which is in flight from now on."""
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            stats = self.scheduler.requests[new.req_id].prefill_stats
            if stats is not None:
                self.found[new.req_id] = stats.num_local_cached_tokens
        self._flying.append(output)

    def finish(self, loaded: Iterable[str] = ()) -> None:
        """The oldest step in flight is done, and what a connector loads for these requests is there."""
        output = self._flying.popleft()
        sampled = {}
        for name in output.num_scheduled_tokens:
            request = self.scheduler.requests.get(name)
            whole = request is None or not request.is_prefill_chunk
            sampled[name] = [7 + len(self.outputs.setdefault(name, [])) % 900] if whole else []
        ran = modelless.ran(sampled, kv_connector_output=KVConnectorOutput(finished_recving=set(loaded)))
        for core in self.scheduler.update_from_output(output, ran).values():
            for one in core.outputs:
                self.outputs.setdefault(one.request_id, []).extend(one.new_token_ids)

    def run(self, depth: int = 1) -> None:
        """Play until nothing waits or runs, with so many steps in flight."""
        while self.scheduler.has_requests() or self._flying:
            while len(self._flying) < depth and self.scheduler.has_requests():
                self.begin()
            self.finish()

    def abort(self, name: str) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def tell(self, number: int, *actions: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Send a message with these actions; returns the answer."""
        told = [
            {"action_id": str(place), "action_type": kind, "action_version": 1, "payload": payload}
            for place, (kind, payload) in enumerate(actions)
        ]
        message = {"protocol_version": 1, "message_id": f"m{number}", "actions": told, **more}
        return dict(self.scheduler(message))
