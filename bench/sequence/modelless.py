"""vLLM's scheduler and cache without a model, as what a cache finds does not depend on which tokens come."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


class Modelless:
    """As much of an engine as a sequence needs, over vLLM's own scheduler or `kind` of it; one step at a time.

    `blocks` of KV. `flags` are vLLM's. Every answer is the same made-up tokens, none ahead of another.
    """

    def __init__(self, blocks: int, block: int, longest: int, kind: type | None = None, **flags: Any) -> None:
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        with TemporaryDirectory(prefix="weft-modelless-") as folder:
            Path(folder, "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": longest}))
            config = EngineArgs(
                model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, block_size=block,
                max_model_len=longest, max_num_batched_tokens=1024, **flags,
            ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = blocks + 1
        spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=1, dtype=torch.float32)
        scheduler: Any = kind or config.scheduler_config.get_scheduler_cls()
        self._scheduler = scheduler(
            vllm_config=config, kv_cache_config=KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config), block_size=block, hash_block_size=block,
            log_stats=True,
        )  # fmt: skip
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block, sha256)
        self._answers: dict[str, list[int]] = {}
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self._scheduler))
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)

    def add_request(self, name: str, prompt: Mapping[str, Any], params: Any, session_id: str | None = None) -> None:
        """As vLLM's."""
        from vllm.v1.request import Request

        params.update_from_generation_config({}, 2)
        self._answers[name] = []
        self._scheduler.add_request(
            Request(
                name, list(prompt["prompt_token_ids"]), params, None, block_hasher=self._hasher, session_id=session_id
            )
        )

    def has_unfinished_requests(self) -> bool:
        """As vLLM's."""
        return bool(self._scheduler.has_unfinished_requests())

    def step(self) -> list[Any]:
        """As vLLM's, but that only answers which are whole are returned."""
        from vllm.v1.outputs import ModelRunnerOutput

        planned = self._scheduler.schedule()
        names = list(planned.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self._scheduler.requests[name]
            sampled.append([] if request.is_prefill_chunk else [3 + len(self._answers[name]) % (VOCABULARY - 3)])
        ran = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=sampled, logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        )  # fmt: skip
        whole = []
        for told in self._scheduler.update_from_output(planned, ran).values():
            for one in told.outputs:
                self._answers[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    tokens = self._answers.pop(one.request_id)
                    answer = SimpleNamespace(token_ids=tokens, logprobs=[EVEN] * len(tokens))
                    whole.append(SimpleNamespace(outputs=[answer]))
        return whole
