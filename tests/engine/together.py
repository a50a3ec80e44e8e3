"""Sessions that run at once on vLLM in this process: what each call answered, and how sure the model was.

    python -m tests.engine.together MODEL stock|ours|tier

Prompts do not hold what was generated, so that calls can be compared one by one. `ours` has the plug-in, which is told
of a next use after each call; `tier` a host tier besides. Prints JSON: per call the tokens found in the cache, the
tokens generated, and the log probabilities of the likeliest two at each.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

BLOCK, CHUNK_BYTES = 32, 1 << 18
SESSIONS, TURNS, FIRST, MORE, OUTPUT = 12, 6, 160, 96, 24
BLOCKS = 120  # of some 230 that the sessions hold at last


def engine(model: str, mode: str) -> Any:
    """vLLM with room for half of what the sessions hold."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    flags: dict[str, Any] = {}
    if mode != "stock":
        flags = {"scheduler_cls": "kvcache.plugin.engine.WeftScheduler", "additional_config": {"weft_guard": False}}
    if mode == "tier":
        extra = {
            "spec_name": "HostTierSpec", "spec_module_path": "kvcache.plugin.host_copy",
            "cpu_bytes_to_use": BLOCKS * CHUNK_BYTES, "offload_prompt_only": False, "always_restore": True,
        }  # fmt: skip
        flags["kv_transfer_config"] = {
            "kv_connector": "WeftConnector", "kv_connector_module_path": "kvcache.plugin.connector",
            "kv_role": "kv_both", "kv_connector_extra_config": extra,
        }  # fmt: skip
    return LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=1024, block_size=BLOCK,
        num_gpu_blocks_override=1 + BLOCKS, max_num_seqs=6, max_num_batched_tokens=512, **flags,
    ).llm_engine  # fmt: skip


def play(model: str, mode: str) -> dict[str, Any]:
    """All sessions at once, each turn when the one before it has ended."""
    from vllm import SamplingParams

    running, rng = engine(model, mode), random.Random(11)
    scheduler: Any = running.engine_core.engine_core.scheduler
    lines = [[rng.randrange(3, 1000) for _ in range(FIRST + MORE * TURNS)] for _ in range(SESSIONS)]
    params = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True, logprobs=2)
    calls: dict[str, Any] = {}

    def send(session: int, turn: int) -> None:
        prompt = lines[session][: FIRST + MORE * turn]
        owner = f"b{session}.r" if mode != "stock" else None
        running.add_request(f"{session}.{turn}", {"prompt_token_ids": prompt}, params, session_id=owner)

    for session in range(SESSIONS):
        send(session, 0)
    while running.has_unfinished_requests():
        for one in running.step():
            if not one.finished:
                continue
            name = ".".join(one.request_id.split("-")[0].split(".")[:2])
            session, turn = map(int, name.split("."))
            (answer,) = one.outputs
            sure = [sorted((p.logprob for p in at.values()), reverse=True)[:2] for at in answer.logprobs]
            calls[name] = [one.num_cached_tokens, list(answer.token_ids), sure]
            if mode != "stock":
                hint = {"owner": f"b{session}", "next_use": rng.random() * 10}
                action = {"action_id": "0", "action_type": "kv.retain", "action_version": 1, "payload": hint}
                scheduler({"protocol_version": 1, "message_id": name, "actions": [action]})
            if turn + 1 < TURNS:
                send(session, turn + 1)
    return calls


if __name__ == "__main__":
    print(json.dumps(play(*sys.argv[1:])))
