"""Preemption, an abort and resets on vLLM in this process, with hardly any KV memory.

    python -m tests.engine.trouble MODEL stock|ours

Prints what was left over: blocks that are not free, requests, steps; and the outputs of steps that ran alone.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

BLOCK, BLOCKS = 32, 14
TOKENS = 3 * BLOCK


def main(model: str, mode: str) -> None:
    """Play it all in one engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    ours = {} if mode == "stock" else {"scheduler_cls": "kvcache.plugin.engine.WeftScheduler"}
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=BLOCKS * BLOCK, block_size=BLOCK,
        num_gpu_blocks_override=1 + BLOCKS, max_num_seqs=4, scheduling_policy="priority", **ours,
    ).llm_engine  # fmt: skip
    scheduler: Any = engine.engine_core.engine_core.scheduler
    preempted = together(engine, scheduler)
    found = [alone(engine, f"{number}a", 3) for number in range(2)]
    audits = [audit(scheduler)]
    for running in (False, True):
        ask(engine, f"{running}", 3, 2 * BLOCK)
        for _ in range(5):
            engine.step()
        audits.append(engine.reset_prefix_cache(running))
        while engine.has_unfinished_requests():
            engine.step()
        audits.append(audit(scheduler))
    audits += [engine.reset_prefix_cache(), audit(scheduler)]
    found += [alone(engine, f"{number}b", 3) for number in range(2)]
    left = {"steps": len(scheduler._steps), "why": scheduler.abilities["why"]} if ours else {}
    print(json.dumps({"preempted": preempted, "found": found, "audits": audits, **left}))


def together(engine: Any, scheduler: Any) -> int:
    """Four at once that do not fit, of which one is aborted while it runs; returns how often one was preempted."""
    for number in range(4):
        ask(engine, f"{number}", number, 3 * BLOCK)
    requests = list(scheduler.requests.values())
    for _ in range(8):
        engine.step()
    engine.abort_request([scheduler.running[0].request_id], internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    return sum(request.num_preemptions for request in requests)


def ask(engine: Any, name: str, agent: int, tokens: int) -> None:
    """Let a step of an agent begin."""
    from vllm import SamplingParams

    rng = random.Random(agent)
    prompt = [rng.randrange(3, 1000) for _ in range(TOKENS)]
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.add_request(name, {"prompt_token_ids": prompt}, params, session_id=f"b{agent}.r", priority=agent)


def alone(engine: Any, name: str, agent: int) -> list[Any]:
    """Prompt tokens found by a step, and what it said."""
    ask(engine, name, agent, BLOCK)
    answers: list[Any] = []
    while engine.has_unfinished_requests():
        answers += engine.step()
    return [answers[-1].num_cached_tokens, list(answers[-1].outputs[0].token_ids)]


def audit(scheduler: Any) -> list[int]:
    """Blocks in use, blocks that are free for the queue and not for the pool or the other way round, requests."""
    pool = scheduler.kv_cache_manager.block_pool
    unused = {block.block_id for block in pool.blocks if not block.ref_cnt and not block.is_null}
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    apart = len(unused.symmetric_difference(free)) + len(free) - len(set(free))
    return [BLOCKS - pool.get_num_free_blocks(), apart, len(scheduler.requests)]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
