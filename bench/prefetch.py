"""Agents in turn over a host tier: what each way to keep and fetch their KV finds, and how soon the first token comes.

    python -m bench.prefetch [--links 0.04,0.08,0.32] [--loops 12] [--reps 1] [--out DIR]

Real vLLM in this process: six agents of 448 prompt tokens, 84 blocks of 32, 48 on the device; the tier holds 48 or 100
more; `links` are the speeds of its link in GB/s that the copies of the CPU backend are slowed down to. Between two
calls pass 0.12 s. `stock` is vLLM with its own tier; `lru` our plug-in with vLLM's policy, `retention` ours, told
after each call when every agent runs next; with `prefetch` it is told to fetch the next one, too. The first loop, in
which nothing can be found, does not count. All variants of a repetition run after one another, in an order of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cells import write_json
from bench.machine import origin
from bench.metrics import percentile
from bench.sequence.engine import local, prepare
from server.engine import GIB

CHUNK_BYTES = 1 << 18  # of a block of 32 tokens
AGENTS, PROMPT, DEVICE = 6, 448, 48
PAUSE, AHEAD = 0.12, 0.15
"""Seconds between two calls, and between two uses as they are told: the pause and what a call takes."""


@dataclass(frozen=True, slots=True)
class Variant:
    """`blocks` of host tier behind a link of so many GB/s; `policy`: None, stock vLLM, else our plug-in's."""

    blocks: int
    link: float
    policy: str | None
    prefetch: bool = False

    def __str__(self) -> str:
        way = self.policy or "stock"
        return f"{way}{', prefetch' * self.prefetch}, " + (
            f"tier of {self.blocks}, {self.link:g} GB/s" if self.blocks else "no tier"
        )


@dataclass(frozen=True, slots=True)
class Row:
    """Shares of the prompt tokens; seconds to the first token; blocks that were fetched ahead, used and wasted."""

    device: float
    host: float
    ttft_p50: float
    ttft_p90: float
    fetched: float
    used: float
    wasted: float


def variants(links: list[float]) -> list[Variant]:
    """What is compared."""
    made = [Variant(0, 0.0, None)]
    for link in links:
        for blocks in (DEVICE, 100):
            made += [Variant(blocks, link, None), Variant(blocks, link, "lru"), Variant(blocks, link, "retention"),
                     Variant(blocks, link, "retention", True)]  # fmt: skip
    return made


def play(variant: Variant, loops: int) -> Row:
    """Play it in this process, which must have loaded no vLLM yet."""
    prepare()
    gib = variant.blocks * CHUNK_BYTES / GIB
    engine = local(variant.policy, DEVICE, gib, variant.link, dtype="float32", max_model_len=1024, max_num_seqs=4)
    core: Any = engine.engine_core.engine_core.scheduler
    rng, waits, found = random.Random(7), [], [0, 0]
    prompts = [[rng.randrange(3, 1000) for _ in range(PROMPT)] for _ in range(AGENTS)]
    for turn in range(loops):
        for agent, prompt in enumerate(prompts):
            took, device, host = _call(engine, core, variant, f"{turn}.{agent}", f"b{agent}", prompt)
            if turn:
                waits.append(took)
                found = [found[0] + device, found[1] + host]
            if variant.policy == "retention":
                core(_told(f"{turn}.{agent}", agent, variant.prefetch))
            until = time.monotonic() + PAUSE
            while time.monotonic() < until:
                if core.has_requests():
                    engine.step()
                time.sleep(0.0005)
    gauges = core.connector.gauges() if variant.policy and variant.blocks else {}
    counts = [gauges.get(f"prefetch_{name}_total", 0.0) for name in ("blocks", "used", "wasted")]
    whole = PROMPT * len(waits)
    return Row(found[0] / whole, found[1] / whole, *(percentile(waits, at) or 0.0 for at in (50, 90)), *counts)


def _call(engine: Any, core: Any, variant: Variant, name: str, owner: str, prompt: list[int]) -> tuple[float, int, int]:
    """Seconds to its one token, and the tokens found on the device and on the host."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    engine.add_request(
        name, {"prompt_token_ids": prompt}, params, session_id=f"{owner}.r" if variant.policy else None
    )  # fmt: skip
    (asked,) = core.requests.values()
    stats = asked.prefill_stats
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - began, stats.num_local_cached_tokens, stats.num_external_cached_tokens


def _told(name: str, agent: int, prefetch: bool) -> dict[str, Any]:
    """After an agent's call: who runs when, and perhaps that the next one is to be fetched."""
    said = [
        ("kv.retain", {"owner": f"b{other}", "next_use": AHEAD * ((other - agent - 1) % AGENTS + 1)})
        for other in range(AGENTS)
    ] + [("kv.prefetch", {"owner": f"b{(agent + 1) % AGENTS}", "within": 5.0})] * prefetch
    actions = [
        {"action_id": str(place), "action_version": 1, "action_type": kind, "payload": payload}
        for place, (kind, payload) in enumerate(said)
    ]
    return {"protocol_version": 1, "message_id": name, "actions": actions}


def table(rows: dict[Variant, list[Row]]) -> str:
    """As Markdown: means over the repetitions."""
    names = ("variant", "device / host hits", "TTFT p50 / p90 ms", "fetched ahead: blocks, used, wasted")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for variant, made in rows.items():
        one = {name: sum(asdict(row)[name] for row in made) / len(made) for name in asdict(made[0])}
        fetched = f"{one['fetched']:.0f}, {one['used']:.0f}, {one['wasted']:.0f}" if variant.prefetch else "-"
        lines.append(
            f"| {variant} | {one['device']:.1%} / {one['host']:.1%} | "
            f"{1000 * one['ttft_p50']:.0f} / {1000 * one['ttft_p90']:.0f} | {fetched} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.prefetch", description=__doc__)
    parser.add_argument(
        "--links", type=lambda text: [float(one) for one in text.split(",")], default=[0.04, 0.08, 0.32]
    )
    parser.add_argument("--loops", type=int, default=12)
    parser.add_argument("--reps", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: dict[Variant, list[Row]] = {variant: [] for variant in variants(args.links)}
    for rep in range(args.reps):
        for variant in random.Random(rep).sample(list(rows), len(rows)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[variant].append(pool.apply(play, (variant, args.loops)))
            print(f"{variant}: {rows[variant][-1]}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.out:
        made = [{"variant": asdict(variant), "rows": list(map(asdict, found))} for variant, found in rows.items()]
        write_json(args.out / "prefetch.json", {**origin("bench.prefetch"), "rows": made})


if __name__ == "__main__":
    main()
