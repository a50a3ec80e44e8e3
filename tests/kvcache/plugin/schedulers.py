"""vLLM's real scheduler with ours put in, without an engine around it: tokens are made up, several steps in flight."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvcache.plugin.engine import WeftScheduler

BLOCK = 32


@cache
def model() -> str:
    """A folder with as much of a model as a scheduler asks for."""
    folder = Path(mkdtemp(prefix="weft-model-"))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    more = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(shape | more | {"max_position_embeddings": 2048}))
    return str(folder)


def config(**arguments: Any) -> VllmConfig:
    """vLLM's configuration: 4 requests at once, 512 tokens each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    given = {"max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 4, "scheduling_policy": "priority"}
    given |= {"enable_prefix_caching": True}
    return EngineArgs(
        model=model(), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **(given | arguments),
    ).create_engine_config()  # fmt: skip


def full(block: int = BLOCK) -> FullAttentionSpec:
    """A layer with full attention."""
    return FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=1, dtype=torch.float32)


class Played:
    """A scheduler, and what an engine does with it. `blocks` can be used."""

    def __init__(
        self, blocks: int = 16, specs: Sequence[KVCacheSpec] = (), hash_block: int | None = None,
        kind: type[Any] = WeftScheduler, asynchronous: bool = True, **arguments: Any,
    ) -> None:  # fmt: skip
        settings = config(**arguments)
        settings.scheduler_config.async_scheduling = asynchronous
        settings.cache_config.num_gpu_blocks = blocks + 1
        specs = specs or (full(),)
        groups = [KVCacheGroupSpec([f"layer {place}"], spec) for place, spec in enumerate(specs)]
        size = max(spec.block_size for spec in specs)
        self.scheduler = kind(
            vllm_config=settings, kv_cache_config=KVCacheConfig(blocks + 1, [], groups),
            structured_output_manager=StructuredOutputManager(settings), block_size=size,
            hash_block_size=hash_block or size, log_stats=True,
        )  # fmt: skip
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.found: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self._flying: deque[Any] = deque()
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(hash_block or size, sha256)

    def ask(
        self, name: str, prompt: Sequence[int], session: str | None = None, tokens: int = 4, **more: Any
    ) -> Request:
        """Let a request come."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        params.update_from_generation_config({}, 2)
        request = Request(
            name, list(prompt), params, None, block_hasher=self._hasher, session_id=session, **more
        )  # fmt: skip
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
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            whole = request is None or not request.is_prefill_chunk
            sampled.append([7 + len(self.outputs.setdefault(name, [])) % 900] if whole else [])
        ran = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=sampled, logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
            kv_connector_output=KVConnectorOutput(finished_recving=set(loaded)),
        )  # fmt: skip
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
