"""KVFlow's case on vLLM in this process: agents in turn, each with a fixed prompt, more than the KV memory holds.

    python -m tests.engine.cycle MODEL stock|declared ROOM

ROOM of 8 agents fit. Prints the prompt tokens found in the cache at each step after the first loop, and all outputs.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

AGENTS, TOKENS, BLOCK, LOOPS = 8, 256, 32, 8


def main(model: str, mode: str, room: int) -> None:
    """Play the loops and print what was found."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    ours = {} if mode == "stock" else {"scheduler_cls": "kvcache.plugin.engine.WeftScheduler"}
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=TOKENS + BLOCK, block_size=BLOCK,
        num_gpu_blocks_override=1 + room * TOKENS // BLOCK, max_num_seqs=2, **ours,
    ).llm_engine  # fmt: skip
    scheduler: Any = engine.engine_core.engine_core.scheduler
    rng, params = random.Random(7), SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    prompts = [[rng.randrange(3, 1000) for _ in range(TOKENS)] for _ in range(AGENTS)]
    found, outputs, count = [], [], 0
    for loop in range(LOOPS):
        for agent, prompt in enumerate(prompts):
            count += 1
            engine.add_request(str(count), {"prompt_token_ids": prompt}, params, session_id=f"b{agent}.r{agent}")
            answers: list[Any] = []
            while engine.has_unfinished_requests():
                answers += engine.step()
            found.append(answers[-1].num_cached_tokens if loop else 0)
            outputs.append(list(answers[-1].outputs[0].token_ids))
            if mode == "declared":
                scheduler(message(count, agent))
    print(json.dumps({"found": found[AGENTS:], "outputs": outputs}))


def message(number: int, agent: int) -> dict[str, Any]:
    """When each agent runs next, now that this one has."""
    actions = [
        {
            "action_id": str(other), "action_type": "kv.retain", "action_version": 1,
            "payload": {"owner": f"b{other}", "next_use": float((other - agent - 1) % AGENTS + 1)},
        }
        for other in range(AGENTS)
    ]  # fmt: skip
    return {"protocol_version": 1, "message_id": f"m{number}", "actions": actions}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
