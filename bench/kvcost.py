"""What the plug-in costs an engine: per block allocated, per re-rank, per hint, and in throughput.

    python -m bench.kvcost [--blocks 50000] [--reps 5] [--out DIR]
    python -m bench.kvcost --throughput [--hints 10000] [--starts 6] [--reps 5] [--out DIR]

The first drives vLLM's own `BlockPool` with its own queue and with ours: prompts of cached blocks are allocated, hashed
and freed, as many owners as fit holding the pool. The second plays such calls on two real engines, in turns: stock
vLLM, and the plug-in without a hint and told so many things a second: messages of 256 owners that it knows, half of
them with learned gaps, half with next uses, in the words of `weft serve` and packed as vLLM's API server passes them
on. To read that counts, to make it does not; what packing costs that server, which is another process, the first tells.
It is more than an engine takes in (`kvcache.keeper.PACE`): most of it is out of date by then.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from msgspec import json, msgpack

from bench.cells import write_json
from bench.comparison import paired
from bench.machine import origin
from server import embedded

BLOCK = 32
OWNERS = (1_000, 10_000)
REQUEST = 64  # blocks of a request
MESSAGE = 256
KINDS = ("next use", False), ("curve", True)
LONGEST = 15  # seconds of a turn, for which messages are made ahead
ACCEPTED = 0.9  # of the hints at least, or what is measured is how others are turned away
POOL = 768  # blocks: a third for the owners of which is told
CALLS, PROMPT, OUTPUT = 16, 256, 32


class Pool:
    """vLLM's pool, with its own queue or with ours, whose blocks are owned in equal parts."""

    def __init__(self, blocks: int, owners: int | None) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.pool = BlockPool(blocks + 1, True, BLOCK)
        self.owners, self.count = owners or OWNERS[0], 0
        self.keeper: Any = None
        if owners is not None:
            from kvcache.hints import Hints
            from kvcache.keeper import Keeper
            from kvcache.plugin.control import Control
            from kvcache.plugin.free_queue import OwnerQueue
            from kvcache.retention import Retention
            from kvcache.shadow import Guarded, Shadow

            self.keeper = Keeper(Guarded(Retention(), Shadow(blocks)), BLOCK)
            self.control = Control(self.keeper, Hints(self.keeper), dict)
            free = self.pool.free_block_queue.get_all_free_blocks()
            self.queue = self.pool.free_block_queue = OwnerQueue(self.pool.blocks, free, self.keeper)
        each = max(1, blocks // self.owners)
        for number in range(self.owners):
            self.step(f"b{number}", each, each)
        if self.keeper is not None:
            self.tell(0)

    def step(self, owner: str, blocks: int, at_once: int) -> float:
        """A step of an owner takes blocks, so many at once, fills and frees them. Returns the seconds of the taking."""
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        now = time.monotonic()
        number = self.keeper.began(owner, None, now) if self.keeper is not None else 0
        began = time.perf_counter()
        taken = [block for _ in range(blocks // at_once) for block in self.pool.get_new_blocks(at_once)]
        spent = time.perf_counter() - began
        for block in taken:
            self.count += 1
            block.set_block_hash(make_block_hash_with_group_id(self.count.to_bytes(32, "big"), 0))
            self.pool.cached_block_hash_to_block.insert(block.block_hash, block)
        if self.keeper is not None:
            keys = [bytes(block.block_hash[:-4]) for block in taken]
            self.keeper.wrote(owner, None, keys, now, number)
            self.queue.declare(taken, owner)
            self.keeper.left(owner, blocks * BLOCK, now)
        self.pool.free_blocks(reversed(taken))
        return spent

    def tell(self, shift: int) -> None:
        """Foretell every owner anew."""
        from kvcache.policy import Hint

        now = time.monotonic()
        ahead = (1.0 + (number * 7919 + shift) % 997 for number in range(self.owners))
        self.keeper.told({f"b{number}": Hint(now, next_use=now + wait) for number, wait in enumerate(ahead)}, now)
        self.keeper.settle(now, at_once=True)

    def said(self, number: int, curves: bool) -> float:
        """Seconds that a message takes, of as many owners in turn, until it is taken in."""
        owners = [f"b{(number * MESSAGE + place) % self.owners}" for place in range(MESSAGE)]
        message = _message(f"{curves} {number}", owners, curves)
        began = time.perf_counter()
        answer = self.control.answer(message, time.monotonic())
        self.keeper.settle(time.monotonic(), at_once=True)
        spent = time.perf_counter() - began
        assert answer["counts"]["accepted"] == MESSAGE, answer["counts"]
        return spent

    def rerank(self, shift: int) -> float:
        """Seconds until the next block is known after all owners were foretold anew, without the telling itself."""
        self.tell(shift)
        began = time.perf_counter()
        self.keeper.device.order.first(time.monotonic())
        return time.perf_counter() - began

    def refresh(self, later: int) -> float:
        """Seconds until the next block is known so many seconds later, where nothing new is foretold."""
        began = time.perf_counter()
        self.keeper.device.order.rerank(time.monotonic() + later)
        return time.perf_counter() - began


def blocks(size: int, reps: int) -> dict[str, Any]:
    """Microseconds for each block allocated, and milliseconds for a re-rank."""
    pools = {"stock": Pool(size, None)} | {f"{owners} owners": Pool(size, owners) for owners in OWNERS}
    gc.collect()
    gc.freeze()  # as vLLM does with what an engine has when it starts
    told: dict[str, Any] = {}
    for kind, curves in KINDS:
        told[f"packed by the API server, a hint of a {kind}, us"] = _spread(partial(_packing, curves), reps)
    for name, pool in pools.items():
        for kind, curves in KINDS if pool.keeper is not None else ():
            told[f"{name}, a hint of a {kind}, us"] = _spread(partial(_telling, pool, curves, count(1)), reps)
    for at_once in (1, REQUEST):
        for name, pool in pools.items():
            told[f"{name}, {at_once} at a time, us a block"] = _spread(partial(_allocating, pool, at_once), reps)
    for name, pool in pools.items():
        if pool.keeper is not None:
            told[f"{name}, re-rank when all were foretold anew, ms"] = _spread(partial(_reranking, pool), reps)
            told[f"{name}, re-rank a second later, ms"] = _spread(partial(_refreshing, pool, count(1)), reps)
    return told


def _packing(curves: bool) -> float:
    from kvcache.envelope import packed

    actions, turns = _actions([f"b{number}" for number in range(MESSAGE)], curves), 20
    began = time.perf_counter()
    for _ in range(turns):
        packed(actions)
    return 1e6 * (time.perf_counter() - began) / (turns * MESSAGE)


def _allocating(pool: Pool, at_once: int) -> float:
    steps = 64
    spent = sum(pool.step(f"b{random.randrange(pool.owners)}", REQUEST, at_once) for _ in range(steps))
    return 1e6 * spent / (steps * REQUEST)


def _reranking(pool: Pool) -> float:
    return 1000 * pool.rerank(random.randrange(997))


def _refreshing(pool: Pool, seconds: Iterator[int]) -> float:
    return 1000 * pool.refresh(next(seconds))


def _telling(pool: Pool, curves: bool, numbers: Iterator[int]) -> float:
    return 1e6 * sum(pool.said(next(numbers), curves) for _ in range(20)) / (20 * MESSAGE)


def _spread(measure: Callable[[], float], reps: int) -> list[float]:
    """The median, the least and the most."""
    found = sorted(measure() for _ in range(reps))
    return [round(one, 2) for one in (statistics.median(found), found[0], found[-1])]


def throughput(hints: float, starts: int, reps: int) -> dict[str, Any]:
    """Seconds for such calls: stock, the plug-in without hints, and with so many a second; the ratio to stock.

    The plug-in has an engine in a process of its own, and one plays at a time, in turns. How fast a process is differs
    by some percent from one start to the next: both start anew so many times, and a start is one pair. What hints cost
    is told of the same process, in turns with and without.
    """
    told = f"plug-in, {hints:g} hints/s"
    variants = {"stock": (False, 0.0), "plug-in, no hints": (True, 0.0), told: (True, hints)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for start in range(1, starts + 1):
        for name, took in _started(variants, start, reps).items():
            seconds[name].append(took)
        print(f"{start}/{starts}: { ({name: round(each[-1], 2) for name, each in seconds.items()}) }", file=sys.stderr)
    pairs = {name: (name, "stock") for name in variants} | {f"{told}, over none": (told, "plug-in, no hints")}
    ratios = {
        name: paired(list(zip(seconds[one], seconds[other], strict=True))) for name, (one, other) in pairs.items()
    }
    figures: dict[str, Any] = {
        name: {"ratio": round(over.mean, 4), "interval": [over.low, over.high]}
        for name, over in ratios.items() if over is not None
    }  # fmt: skip
    return figures | {f"{name}, seconds": [round(one, 2) for one in each] for name, each in seconds.items()}


def _started(variants: dict[str, tuple[bool, float]], start: int, reps: int) -> dict[str, float]:
    """Start an engine of each kind, and play: the mean seconds of a turn."""
    seconds = dict.fromkeys(variants, 0.0)
    with ExitStack() as stack:
        pools = [stack.enter_context(multiprocessing.get_context("spawn").Pool(1)) for _ in (False, True)]
        for plugin in random.Random(start).sample((False, True), 2):
            pools[plugin].apply(_start, (plugin,))
        for rep in range(1, reps + 1):
            for name in random.Random(f"{start} {rep}").sample(list(variants), len(variants)):
                plugin, hints = variants[name]
                seconds[name] += pools[plugin].apply(_play, (f"{rep}t" if hints else f"{rep}", hints)) / reps
    return seconds


_playing: list[Any] = []
"""The engine of this process, whether it has the plug-in, and the name of its latest turn."""

_numbers = count()  # of messages


def _start(plugin: bool) -> None:
    """Start the engine of this process, and warm it up."""
    from bench.sequence.engine import local, prepare

    prepare()
    engine = local(
        "retention" if plugin else None, POOL, dtype=embedded.dtype(), max_model_len=PROMPT + OUTPUT + BLOCK,
        max_num_seqs=8,
    )  # fmt: skip
    _playing[:] = engine, plugin, ""
    _play("0", 0.0)


def _ask(name: str, prompt: list[int], owner: str, tokens: int) -> None:
    from vllm import SamplingParams

    engine, plugin, _ = _playing
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.add_request(name, {"prompt_token_ids": prompt}, params, session_id=owner if plugin else None)


def _play(turn: str, hints: float) -> float:
    """Seconds for the calls of a turn, the same in all processes, told so many hints a second."""
    from scheduler.actions import Release
    from server.advice import actions

    engine, plugin, before = _playing
    _playing[2] = turn
    core: Any = engine.engine_core.engine_core.scheduler
    rng, told, accepted = random.Random(turn), 0, 0
    owners = [f"o{number}" for number in range(MESSAGE)]
    if plugin:  # the runs of the turn before have ended
        over = [Release("w", f"b{before}x{number}") for number in range(CALLS)]
        core({"protocol_version": 1, "message_id": f"over {turn}", "actions": actions("", over, 0.0)})
    for number, owner in enumerate(owners):  # those of which it is told
        _ask(f"{turn}.{owner}", [3 + number] * (BLOCK + 1), owner, 1)
    while engine.has_unfinished_requests():
        engine.step()
    ahead = int(LONGEST * hints / MESSAGE) + 1
    kinds = [_message("", owners, curves) for curves in (False, True)]
    messages = [msgpack.encode(kinds[n % 2] | {"message_id": str(n)}) for n in islice(_numbers, ahead)]
    prompts = [[rng.randrange(3, 1000) for _ in range(PROMPT)] for _ in range(CALLS)]
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        _ask(f"{turn}.{number}", prompt, f"b{turn}x{number}.r", OUTPUT)
    while engine.has_unfinished_requests():
        engine.step()
        while hints and told < hints * (time.perf_counter() - began):
            answer = core(msgpack.decode(messages[told // MESSAGE]))
            told, accepted = told + MESSAGE, accepted + answer["counts"]["accepted"]
    spent = time.perf_counter() - began
    assert accepted >= ACCEPTED * told, f"{accepted} hints of {told} were accepted"
    return spent


def _message(name: str, owners: list[str], curves: bool) -> dict[str, Any]:
    """What the core says of these owners, as the API server passes it on."""
    from kvcache.envelope import packed

    plain = _actions(owners, curves)
    actions = packed(plain)
    assert actions is not plain, "not what the engine is sent"
    return {"protocol_version": 1, "message_id": name, "actions": actions}


def _actions(owners: list[str], curves: bool) -> bytes:
    """What the core says of these owners, in its own words: their learned gaps, or when they run next."""
    from kvcache.policy import Hint
    from scheduler.actions import Retain
    from scheduler.gaps import GAPS, Gap
    from server.advice import actions

    gap = Gap(GAPS.log_normal(8, 1.3), 0.05) if curves else None
    advice = []
    for place, owner in enumerate(owners):
        next_use = None if curves else 1.0 + place % 60
        hint = Hint(-0.5 - place % 7, gap=gap, next_use=next_use, hold=30.0, reuse=0.9, leased=place % 3 > 0)
        advice.append(Retain("w", owner, hint))
    return json.encode(actions("", advice, 0.0))


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.kvcost", description=__doc__)
    parser.add_argument("--blocks", type=int, default=50_000, help=f"at least {2 * OWNERS[-1]}")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--hints", type=float, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.blocks < 2 * OWNERS[-1]:
        parser.error(f"--blocks: fewer than two for each of {OWNERS[-1]} owners")
    told = throughput(args.hints, args.starts, args.reps) if args.throughput else blocks(args.blocks, args.reps)
    for name, figures in told.items():
        print(f"{name}: {figures}")
    if args.out:
        write_json(args.out / "kvcost.json", {**origin("bench.kvcost"), "told": told})


if __name__ == "__main__":
    main()
