"""One setting played on real vLLM in this process, one call at a time."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import runners
from bench.cells import Cell
from bench.rivals.engines import stock_tier_args
from bench.sequence.calls import Tokens, order
from bench.sequence.core import LIAR, LYING, NAMED, STALE, Brain, Clock
from bench.sequence.modelless import Modelless
from bench.simulation.profile import CPU
from bench.workloads.runs import Call, Run, Workload
from scheduler.events import Usage
from server import embedded
from server.config import Settings
from server.engine import GIB, plugin_args

BLOCK = 32
POLICIES = {
    "lru": "lru", "weft": "retention", NAMED: "retention", "weft-hinted": "retention", "saga": "saga",
    "kvflow": "kvflow", LYING: "retention", LIAR: "retention", STALE: "retention",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One engine, and what is played on it. Without a model there is no host tier."""

    mode: str
    cell: Cell
    trace: Path | None
    runs: int
    live: int
    room: float
    tier: float
    model: bool = True


@dataclass(frozen=True, slots=True)
class Answered:
    """What a call generated, and by how much each token was ahead of the next likely one, as logarithms.

    `prompt` stands for its prompt.
    """

    prompt: int
    tokens: list[int]
    ahead: list[float]


@dataclass(slots=True)
class Figures:
    """Tokens; `seconds` that the calls took, one after the other, without what passes between them.

    `asked` are the blocks that each call asked for and left; `answers` go by run and number of the call, as `steps`.
    `others` are the runs that never lie.
    """

    prompt: int = 0
    device: int = 0
    host: int = 0
    seconds: float = 0.0
    steps: list[list[int]] = field(default_factory=list)
    answers: dict[str, Answered] = field(default_factory=dict)
    asked: list[tuple[list[int], list[int]]] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    @property
    def recomputed(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt - self.device - self.host

    @property
    def recomputed_of_others(self) -> int:
        """Those of the runs that never lie."""
        steps = zip(self.answers, self.steps, strict=True)
        return sum(p - d - h for name, (p, d, h) in steps if name.rsplit("/", 1)[0] in self.others)


def prepare() -> None:
    """Have vLLM run in this process, on one thread. Before it is imported."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip


def play(setting: Setting) -> tuple[Figures, int]:
    """Play a setting in this process, where nothing else loads vLLM before. Returns the blocks of the engine, too."""
    prepare()
    workload = runners.workload(setting.cell, setting.trace)
    clock = Clock()
    engine, blocks = started(setting, workload, clock)
    core: Any = engine.engine_core.engine_core.scheduler
    brain = None
    if setting.mode in POLICIES:
        lied = {run.id for run in workload.runs[1::2]}
        brain = Brain(core, setting.mode, clock, int(setting.tier * blocks * BLOCK), lied)
    figures, tokens = Figures(), Tokens(engine.model_config.get_vocab_size())
    figures.others = {run.id for run in workload.runs[::2]}
    left: dict[str, int] = {}
    calls = order(workload, setting.live, setting.runs)
    try:
        due, run, call = next(calls)
        while True:
            clock.now = max(clock.now, due)
            _call(figures, engine, core, brain, clock, tokens, run, call)
            left[run.id] = left.get(run.id, len(run.calls)) - 1
            if brain is not None and not left[run.id]:
                brain.ended(run)
            due, run, call = calls.send(clock.now)
    except StopIteration:
        pass
    return figures, blocks


def _call(
    figures: Figures, engine: Any, core: Any, brain: Brain | None, clock: Clock, tokens: Tokens, run: Run, call: Call
) -> None:
    """Play one call."""
    from vllm import SamplingParams

    name = str(len(figures.steps))
    prompt = tokens.prompt(call.prompt)
    owner = brain.arrived(name, run, call) if brain is not None else None
    params = SamplingParams(max_tokens=call.output, temperature=0, ignore_eos=True, logprobs=2)
    began = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, params, session_id=owner)
    (asked,) = core.requests.values()  # vLLM gives it an id of its own
    keys, stats = asked.block_hashes, asked.prefill_stats
    answers: list[Any] = []
    while engine.has_unfinished_requests():
        answers += engine.step()
    figures.seconds += time.perf_counter() - began
    last = answers[-1]
    generated = list(last.outputs[0].token_ids)
    device, host = stats.num_local_cached_tokens, stats.num_external_cached_tokens
    if call.answer is not None:
        tokens.answered(call.answer, generated)
    clock.now += CPU.alone(call, device + host)
    figures.prompt += len(prompt)
    figures.device += device
    figures.host += host
    figures.steps.append([len(prompt), device, host])
    ahead = [_ahead(at) for at in last.outputs[0].logprobs]
    figures.answers[f"{run.id}/{run.calls.index(call)}"] = Answered(hash(tuple(prompt)), generated, ahead)
    most = max(0, len(prompt) - 1) // BLOCK
    figures.asked.append(([hash(bytes(key)) for key in keys[:most]], [hash(bytes(key)) for key in keys]))
    if brain is not None:
        brain.finished(name, call, Usage(len(prompt), device + host, len(generated)))
    for _ in range(8):  # what a connector still has to store or to fetch
        if not core.has_requests():
            break
        engine.step()


def _ahead(likely: Any) -> float:
    first, second = sorted((float(one.logprob) for one in likely.values()), reverse=True)[:2]
    return first - second


def started(setting: Setting, workload: Workload, clock: Clock) -> tuple[Any, int]:
    """An engine in this process, and its blocks."""
    blocks, most = room(setting, workload)
    if not setting.model:
        return modelless(setting.mode, blocks, most, clock), blocks
    gib = setting.tier * blocks * BLOCK * 2 * CPU.kv_bytes / GIB  # CPU.kv_bytes are of bfloat16
    ours: dict[str, Any] = {"scheduler_cls": clocked(clock)} if setting.mode in POLICIES else {}
    engine = local(
        POLICIES.get(setting.mode), blocks, gib, dtype="float32", max_model_len=most, max_num_seqs=4, **ours
    )  # fmt: skip
    return engine, blocks


def modelless(mode: str, blocks: int, longest: int, clock: Clock) -> Modelless:
    """vLLM's scheduler alone, in that mode."""
    ours: dict[str, Any] = {}
    if mode in POLICIES:
        ours = {"kind": clocked(clock), **plugged(POLICIES[mode])}
    return Modelless(blocks, BLOCK, longest, max_num_seqs=4, **ours)


def plugged(policy: str) -> dict[str, Any]:
    """vLLM's flags beside the scheduler's class, for our plug-in with an eviction policy."""
    return {"scheduling_policy": "priority", "additional_config": {"weft_policy": policy}}


def local(policy: str | None, blocks: int, gib: float = 0.0, link_gbps: float = 0.0, **flags: Any) -> Any:
    """An engine of the embedded model in this process: our plug-in with an eviction policy, or None: stock vLLM.

    `blocks` of KV and `gib` of host tier behind such a link, 0: as fast as it copies. `flags` are more of vLLM's.
    """
    from vllm import LLM

    args: list[str] = []
    given: dict[str, Any] = {}
    if policy is not None:
        args = [*plugin_args((), gib, link_gbps)]
        given = {"scheduler_cls": "kvcache.plugin.engine.WeftScheduler", **plugged(policy)}
    elif gib:
        args = stock_tier_args(gib, link_gbps)
    if gib:
        given["kv_transfer_config"] = json.loads(args[args.index("--kv-transfer-config") + 1])
    return LLM(
        model=str(embedded.ensure(Settings.model_fields["home"].default)), enforce_eager=True, block_size=BLOCK,
        num_gpu_blocks_override=blocks + 1, max_num_batched_tokens=1024, disable_log_stats=True, **(given | flags),
    ).llm_engine  # fmt: skip


def room(setting: Setting, workload: Workload) -> tuple[int, int]:
    """Blocks of the engine, and tokens of its longest call."""
    calls = [call for run in workload.runs[: setting.runs] for call in run.calls]
    most = (max(call.prompt.end + call.output for call in calls) // BLOCK + 2) * BLOCK
    held = []
    for first in range(0, min(setting.runs, len(workload.runs)), setting.live):
        runs = workload.runs[first : first + setting.live]
        pieces = {piece for run in runs for call in run.calls for piece in call.prompt.path()}
        held.append(sum(piece.tokens for piece in pieces))
    blocks = int(setting.room * sum(held) / len(held) / BLOCK)
    return max(blocks, most // BLOCK), most


def clocked(clock: Clock) -> type:
    """Our scheduler on a virtual clock."""
    from kvcache.plugin.engine import WeftScheduler

    class Clocked(WeftScheduler):
        clock = staticmethod(lambda: clock.now)

    return Clocked
