"""vLLM's scheduler and cache without a model, as what a cache finds does not depend on which tokens come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

VOCABULARY = 1000
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16,
    "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1,
}  # fmt: skip
EVEN = {token: SimpleNamespace(logprob=0.0) for token in (0, 1)}


def configured(**flags: Any) -> Any:
    """vLLM's configuration with these flags, for as much of a model as a scheduler asks for."""
    from vllm.engine.arg_utils import EngineArgs

    with TemporaryDirectory(prefix="weft-modelless-") as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": flags["max_model_len"]}))
        args = EngineArgs(model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **flags)
        return args.create_engine_config()


def full(block: int) -> Any:
    """A layer with full attention, in blocks of so many tokens."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=1, dtype=torch.float32)


def scheduler(
    config: Any, blocks: int, specs: Sequence[Any], kind: type | None = None, hash_block: int | None = None
) -> tuple[Any, Any]:
    """vLLM's own scheduler or `kind` of it over so many blocks that can be used, and what hashes a request's blocks."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = blocks + 1
    groups = [KVCacheGroupSpec([f"layer {place}"], spec) for place, spec in enumerate(specs)]
    size = max(spec.block_size for spec in specs)
    made: Any = kind or config.scheduler_config.get_scheduler_cls()
    init_none_hash(sha256)
    return made(
        vllm_config=config, kv_cache_config=KVCacheConfig(blocks + 1, [], groups),
        structured_output_manager=StructuredOutputManager(config), block_size=size, hash_block_size=hash_block or size,
        log_stats=True,
    ), get_request_block_hasher(hash_block or size, sha256)  # fmt: skip


def asked(name: str, prompt: Sequence[int], params: Any, hasher: Any, **more: Any) -> Any:
    """A request, as an engine makes it."""
    from vllm.v1.request import Request

    params.update_from_generation_config({}, 2)
    return Request(name, list(prompt), params, None, block_hasher=hasher, **more)


def ran(sampled: Mapping[str, list[int]], **more: Any) -> Any:
    """What a model's step says of these requests: the tokens that it sampled for each."""
    from vllm.v1.outputs import ModelRunnerOutput

    return ModelRunnerOutput(
        req_ids=list(sampled), req_id_to_index={name: place for place, name in enumerate(sampled)},
        sampled_token_ids=list(sampled.values()), logprobs=None, prompt_logprobs_dict={}, pooler_output=[], **more,
    )  # fmt: skip


class Modelless:
    """As much of an engine as a sequence needs, over vLLM's own scheduler or `kind` of it; one step at a time.

    `blocks` of KV. `flags` are vLLM's. Every answer is the same made-up tokens, none ahead of another.
    """

    def __init__(self, blocks: int, block: int, longest: int, kind: type | None = None, **flags: Any) -> None:
        config = configured(block_size=block, max_model_len=longest, max_num_batched_tokens=1024, **flags)
        self._scheduler, self._hasher = scheduler(config, blocks, (full(block),), kind)
        self._answers: dict[str, list[int]] = {}
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self._scheduler))
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)

    def add_request(self, name: str, prompt: Mapping[str, Any], params: Any, session_id: str | None = None) -> None:
        """As vLLM's."""
        self._answers[name] = []
        request = asked(name, prompt["prompt_token_ids"], params, self._hasher, session_id=session_id)
        self._scheduler.add_request(request)

    def has_unfinished_requests(self) -> bool:
        """As vLLM's."""
        return bool(self._scheduler.has_unfinished_requests())

    def step(self) -> list[Any]:
        """As vLLM's, but that only answers which are whole are returned."""
        planned = self._scheduler.schedule()
        sampled = {}
        for name in planned.num_scheduled_tokens:
            token = 3 + len(self._answers[name]) % (VOCABULARY - 3)
            sampled[name] = [] if self._scheduler.requests[name].is_prefill_chunk else [token]
        whole = []
        for told in self._scheduler.update_from_output(planned, ran(sampled)).values():
            for one in told.outputs:
                self._answers[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    tokens = self._answers.pop(one.request_id)
                    answer = SimpleNamespace(token_ids=tokens, logprobs=[EVEN] * len(tokens))
                    whole.append(SimpleNamespace(outputs=[answer]))
        return whole
