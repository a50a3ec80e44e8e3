"""Measures one system on real engines: one cell of a benchmark."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable

from bench.cells import CLOSED, TRACE
from bench.errors import BenchError
from bench.metrics import TIMEOUT
from bench.overhead import own_ticks, tree_ticks
from bench.play import Player
from bench.records import Played
from bench.rivals.engines import Engines
from bench.rivals.front import Front, Hash, LeastLoaded, RoundRobin, Semaphore, Stock, Unlimited
from bench.rivals.servers import Hinted, Program, Router, Weft, WeftHinted
from bench.rivals.texts import calibrate
from bench.schedule import OPEN_RUNS, poisson, starts, traced
from bench.schedule import slots as slots_of
from bench.simulation.profile import CPU, Profile
from bench.workloads.runs import Run, Workload

SYSTEMS: dict[str, Callable[[], Front]] = {
    "stock": Stock,
    "stock-round-robin": RoundRobin,
    "stock-least-loaded": LeastLoaded,
    "stock-hash": Hash,
    "semaphore": Semaphore,
    "vllm-router-cache-aware": lambda: Router("cache_aware"),
    "vllm-router-consistent-hash": lambda: Router("consistent_hash"),
    "vllm-router-program": Program,
    "vllm-router-program-hinted": Hinted,
    "weft": Weft,
    "weft-hinted": WeftHinted,
    "weft-attached": lambda: Weft(policy=None),
    "weft-no-evict": lambda: Weft(policy="lru"),
    "weft-saga": lambda: Weft(policy="saga"),
    "weft-kvflow": lambda: WeftHinted(policy="kvflow"),
    "unlimited": Unlimited,
}
LATER = ("weft-no-gate",)


def make(system: str) -> Front:
    """A fresh front. Raises BenchError where there is no such system, or not yet."""
    if system in LATER:
        raise BenchError(f"{system} does not exist yet: Weft has no such part to leave out")
    if system not in SYSTEMS:
        raise BenchError(f"unknown system {system!r}; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[system]()


async def measure(
    system: str, engines: Engines, workload: Workload, *, seed: int, load: float | None = None, tier: float = 0.0,
    arrivals: str = CLOSED, supply: int = 4, timeout: float = TIMEOUT, profile: Profile | None = None,
    say: Callable[[str], None] = print,
) -> Played:  # fmt: skip
    """Play a workload on a fresh front over emptied engines.

    In a closed loop `load` gives the slots, each of which has `supply` runs to play after its first. Else `arrivals` is
    "poisson:R", with OPEN_RUNS runs for each of the supply, R an hour, or "trace", each run at its own time. `profile`
    is what was measured of these engines: by it a run's unloaded time is known. Of the figures in `extra`, `load` is
    what the slots make of the load asked for, `load_played` the same with the contexts that the engines counted,
    `starved` the slots whose first run outlasted the supply.
    """
    front = make(system)
    slots = slots_of(load, engines.asked * engines.count, workload) if load is not None and arrivals == CLOSED else 0
    runs, times = _runs(workload, arrivals, seed, slots, supply)
    begins = starts(seed, slots, workload, profile or CPU)
    longest = max(call.prompt.end + call.output for run in runs for call in run.calls)
    if longest > engines.max_len:
        raise BenchError(f"{workload.name} has calls of {longest} tokens, the engines take {engines.max_len}")
    await engines.fit(front.build(runs, engines.asked, tier))
    await engines.reset()
    try:
        await front.start(engines, workload)
        texts = await calibrate(engines.http, engines.urls[0], engines.model, seed, runs)
        player = Player(engines.http, front, texts, engines.model, engines.block, timeout, profile)
        player.reckon(runs)
        before, began, ticks = await engines.counters(), time.perf_counter(), _ticks(front, engines)
        played = await (player.open(runs, times) if times else player.closed(runs, begins))
        played.extra |= _extra(engines, workload, played, slots)
        played.extra |= _used(time.perf_counter() - began, ticks, _ticks(front, engines))
        played.extra |= {name: value - before[name] for name, value in (await engines.counters()).items()}
    finally:
        await front.stop()
    shown = f"load {played.extra['load']:.2f} ({slots} slots), {played.extra['load_played']:.2f} as played"
    say(f"{system}: {shown if slots else arrivals}, {len(runs)} runs, {len(played.calls)} calls")
    return played


def _runs(workload: Workload, arrivals: str, seed: int, slots: int, supply: int) -> tuple[list[Run], list[float]]:
    """The runs to play, and when each arrives; no times in a closed loop."""
    if arrivals == CLOSED:
        if not slots:
            raise BenchError("a closed loop needs a load above 0")
        return list(itertools.islice(workload.draw(seed), slots * (1 + supply))), []
    if arrivals == TRACE:
        try:
            return traced(workload)
        except ValueError as error:
            raise BenchError(str(error)) from error
    kind, _, rate = arrivals.partition(":")
    try:
        each = float(rate) if kind == "poisson" else 0.0
    except ValueError:
        each = 0.0
    if not 0 < each < math.inf:
        raise BenchError(f"arrivals {arrivals!r}: neither closed, trace nor poisson:RUNS_PER_HOUR")
    count = OPEN_RUNS * supply
    return list(itertools.islice(workload.draw(seed), count)), poisson(each, count, seed)


def _extra(engines: Engines, workload: Workload, played: Played, slots: int) -> dict[str, float]:
    total = engines.asked * engines.count
    done = [call for call in played.calls if call.finished is not None]
    context = sum(call.prompt + call.output for call in done) / max(1, len(done))
    return {
        "slots": slots,
        "kv_tokens": engines.kv_tokens * engines.count,
        "load": slots * workload.mean_context / total,
        "load_played": slots * context / total,
    }


def _ticks(front: Front, engines: Engines) -> dict[str, int]:
    """CPU ticks that each has used: the front, the client, API servers, and the engines beside these."""
    used = {"front": tree_ticks(front.pid) if front.pid else 0, "client": own_ticks(os.getpid())}
    if engines.pids:
        servers = sum(map(own_ticks, engines.pids))
        used |= {"servers": servers, "engines": sum(map(tree_ticks, engines.pids)) - servers}
    return used


def _used(seconds: float, before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Seconds that the cell took, and of them the share of one core that each used."""
    each = seconds * os.sysconf("SC_CLK_TCK")
    return {"seconds": seconds} | {f"{name}_cpus": (after[name] - before[name]) / each for name in before}
