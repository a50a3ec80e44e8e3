"""The host tier on vLLM in this process: agents in turn, more than the device holds.

    python -m tests.engine.tier MODEL turns|none|small|machine [EXAMPLES]

`turns`: sessions that grow, with a tier of twice the device; `none`: the same without one; `small`: agents in turn with
a tier that holds what the device does not, next uses told and the next agent prefetched; `machine`: all at once, with
aborts, resets and prefetches of anybody, and poison in blocks and chunks that hold nothing. Prints JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

BLOCK, CHUNK_BYTES = 32, 1 << 18


class Play:
    """An engine with `blocks` on the device and `chunks` on the host, 0: no tier. `link` in bytes a second."""

    def __init__(self, model: str, blocks: int, chunks: int, link: float = 0) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        from vllm import LLM

        extra = {
            "spec_name": "HostTierSpec", "spec_module_path": "kvcache.plugin.host_copy",
            "cpu_bytes_to_use": chunks * CHUNK_BYTES, "offload_prompt_only": False, "link_gbps": link / 1e9,
            "always_restore": True,
        }  # fmt: skip
        tier = {
            "kv_connector": "WeftConnector", "kv_connector_module_path": "kvcache.plugin.connector",
            "kv_role": "kv_both", "kv_connector_extra_config": extra,
        }  # fmt: skip
        self.engine = LLM(
            model=model, dtype="float32", enforce_eager=True, max_model_len=1024, block_size=BLOCK,
            num_gpu_blocks_override=1 + blocks, max_num_seqs=4, max_num_batched_tokens=1024,
            scheduler_cls="kvcache.plugin.engine.WeftScheduler", additional_config={"weft_guard": False},
            **({"kv_transfer_config": tier} if chunks else {}),
        ).llm_engine  # fmt: skip
        self.scheduler: Any = self.engine.engine_core.engine_core.scheduler
        self.count = 0
        self.answers: dict[str, Any] = {}

    @property
    def connector(self) -> Any:
        """Ours, on the scheduler's side."""
        return self.scheduler.connector

    def add(self, owner: str, prompt: list[int], tokens: int) -> str:
        """A step of an owner comes."""
        from vllm import SamplingParams

        self.count += 1
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        name = str(self.count)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params, session_id=f"{owner}.r")
        return name

    def step(self) -> None:
        """One step of the engine, if it has anything to do."""
        if self.scheduler.has_requests():
            for answer in (one for one in self.engine.step() if one.finished):
                self.answers[answer.request_id.split("-")[0]] = answer

    def run(self, seconds: float = 0.0) -> None:
        """Step until nobody waits, and for so many seconds more."""
        while self.engine.has_unfinished_requests():
            self.step()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.step()
            time.sleep(0.0005)

    def drain(self) -> None:
        """Step until there is nothing to do."""
        while self.scheduler.has_requests():
            self.step()

    def say(self, *actions: dict[str, Any]) -> Any:
        """A message of the core."""
        self.count += 1
        named = [
            {"action_id": str(place), "action_version": 1, **action} for place, action in enumerate(actions)
        ]  # fmt: skip
        return self.scheduler({"protocol_version": 1, "message_id": f"m{self.count}", "actions": named})


def retain(owner: str, seconds: float) -> dict[str, Any]:
    """The owner runs next in so many seconds."""
    return {"action_type": "kv.retain", "payload": {"owner": owner, "next_use": seconds}}


def prefetch(owner: str, within: float) -> dict[str, Any]:
    """Have its KV on the device by then."""
    return {"action_type": "kv.prefetch", "payload": {"owner": owner, "within": within}}


def turns(model: str, tiered: bool) -> dict[str, Any]:
    """Eight sessions in turn, each of which goes on from its own output."""
    play, rng = Play(model, 32, 64 if tiered else 0), random.Random(5)
    lines = [[rng.randrange(3, 1000) for _ in range(160)] for _ in range(8)]
    outputs, cached, seen = [], [], [0] * len(lines)
    for turn in range(4):
        for agent, line in enumerate(lines):
            name = play.add(f"b{agent}", line, 40)
            play.run(0.002)
            answer = play.answers[name]
            outputs.append(list(answer.outputs[0].token_ids))
            if turn:
                cached.append((seen[agent], answer.num_cached_tokens))
            line += outputs[-1] + [rng.randrange(3, 1000) for _ in range(8)]
            seen[agent] = (len(line) - 8 - 1) // BLOCK * BLOCK
    play.drain()
    return {"outputs": outputs, "cached": cached, "gauges": play.connector.gauges() if tiered else {}}


def small(model: str) -> dict[str, Any]:
    """Six agents of 14 blocks in turn; 48 blocks on the device, 48 on the host."""
    play, rng, agents, found = Play(model, 48, 48, 80e6), random.Random(7), 6, []
    prompts = [[rng.randrange(3, 1000) for _ in range(448)] for _ in range(agents)]
    for loop in range(6):
        for agent, prompt in enumerate(prompts):
            name = play.add(f"b{agent}", prompt, 1)
            play.run()
            if loop:
                found.append(play.answers[name].num_cached_tokens)
            uses = [retain(f"b{other}", 0.15 * ((other - agent - 1) % agents + 1)) for other in range(agents)]
            play.say(*uses, prefetch(f"b{(agent + 1) % agents}", 5.0))
            play.run(0.12)
    return {"found": found, "most": 448, "gauges": play.connector.gauges()}


if __name__ == "__main__":
    mode = sys.argv[2]
    if mode == "machine":
        from tests.engine.tier_machine import machine

        result = machine(sys.argv[1], int(sys.argv[3]))
    else:
        result = small(sys.argv[1]) if mode == "small" else turns(sys.argv[1], mode == "turns")
    print(json.dumps(result))
