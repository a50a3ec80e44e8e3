"""A matrix on real engines: started once for all its cells, or somebody else's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from bench import runners
from bench.attached import Attached, afresh
from bench.campaign import carry_out
from bench.cells import Cell
from bench.comparison import BASELINE
from bench.errors import BenchError
from bench.machine import named
from bench.matrix import plan
from bench.records import Played
from bench.rivals.costs import ROOM, measured
from bench.rivals.engines import Engines, length_for
from bench.rivals.measure import make, measure
from bench.simulation.calibration import document, fitted
from bench.simulation.profile import CPU, Profile

COSTS_SECONDS = 600.0


class Real:
    """Plays cells on engines, which are started for the first one and live as long as this: a context manager.

    What an engine costs is measured before the first cell. A server that somebody else runs may not let itself be
    measured: then nobody knows how long a run takes alone.
    """

    def __init__(self, engines: Engines, trace: Path | None) -> None:
        self.engines, self.trace = engines, trace
        self._attached = isinstance(engines, Attached)
        self._loop: asyncio.Runner | None = None
        self._reckoned = False
        self.profile: Profile | None = None

    def __enter__(self) -> Real:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop:
            try:
                self._loop.run(self.engines.__aexit__(kind, error, trace))
            finally:
                self._loop.close()

    def __call__(self, cell: Cell) -> Played:
        loop = self._started()
        if not self._reckoned:
            self.profile = loop.run(self._measured())
            self._reckoned = True
        return loop.run(self._played(cell))

    def guess(self, cell: Cell) -> float:
        """About how many seconds the cell takes: its runs one after another in each slot, slower as the load grows."""
        runs = runners.workload(replace(cell, seed=cell.seed - cell.rep), self.trace)
        each = sum(CPU.unloaded(run) for run in runs.runs) / len(runs.runs)
        return each * cell.supply * max(1.0, 2 * (cell.load or 1.0))

    @property
    def kv_tokens(self) -> int:
        """Those of an engine; a running server that was not told is asked. Raises BenchError where it does not say."""
        if not self.engines.asked:
            self._started()
        return self.engines.asked

    def about(self) -> dict[str, Any]:
        """What run.json tells of the engines; their "profile" is one of `weft simulate`."""
        return self.engines.about() | ({"profile": document(self.profile)} if self.profile else {})

    async def _measured(self) -> Profile | None:
        """The engines' profile. BenchError where they cannot be measured, None where they are somebody else's."""
        engines = self.engines
        budget, sequences = engines.limits
        try:
            async with asyncio.timeout(COSTS_SECONDS):
                costs = await measured(engines)
        except Exception as error:
            if not self._attached:
                raise BenchError(f"the engines' costs cannot be measured: {error!r}") from error
            print(f"weft: its costs cannot be measured, nor what a run takes alone: {error!r}", file=sys.stderr)
            return None
        return fitted(
            costs, name="measured", kv_tokens=engines.asked, kv_bytes=0, block=engines.block, budget=budget,
            sequences=sequences,
        )  # fmt: skip

    async def _played(self, cell: Cell) -> Played:
        runs = runners.workload(cell, self.trace)
        return await measure(
            BASELINE if self._attached else cell.system,  # with one address every client-side system is the same
            self.engines,
            afresh(runs) if self._attached else runs,
            seed=cell.seed,
            load=cell.load,
            tier=cell.tier,
            arrivals=cell.arrivals,
            supply=cell.supply,
            profile=self.profile,
            say=lambda text: print(text, file=sys.stderr),
        )

    def _started(self) -> asyncio.Runner:
        if self._loop is None:
            loop = asyncio.Runner()
            try:
                loop.run(self.engines.__aenter__())
            except BaseException as error:
                loop.close()
                if isinstance(error, RuntimeError):
                    raise BenchError(str(error)) from error  # the next cell would wait for them in vain, too
                raise
            self._loop = loop
        return self._loop


def compare(
    base: Cell, places: Sequence[dict[str, Any]], systems: Sequence[str], trace: Path | None, reps: int, out: Path,
    model: str | None = None, kv_tokens: int | None = None, url: str | None = None, link_gbps: float = 0.0,
) -> None:  # fmt: skip
    """Play the systems at these places of the matrix and report. Raises BenchError for what cannot be measured."""
    if url is not None and any(place["tier"] for place in places):
        raise BenchError("--url is one running server, with what host tier it has: --tier 0")
    if url is None:
        for name in systems:
            make(name)
    elif len(systems) != 1:
        raise BenchError("--url is one running server: give --systems the one name to report it under")
    workloads = [
        runners.checked(replace(base, **places[0], seed=base.seed + rep), trace) for rep in range(reps)
    ]  # fmt: skip
    longest = max(ROOM, *map(length_for, workloads))
    size = kv_tokens or CPU.kv_tokens
    engines = (
        Attached(url, kv_tokens, longest)
        if url
        else Engines(base.workers, size, out / "engines", model=model, max_len=longest, link_gbps=link_gbps)
    )
    about = {"left_out": dict(workloads[0].left_out)}
    with Real(engines, trace) as real:
        name = f"{Path(model).name if model else 'embedded model'}, {size:,} KV tokens each"
        profile = f"attached, {real.kv_tokens:,} KV tokens" if url else name
        cells = plan(replace(base, profile=profile, trace=named(trace) if trace else None), systems, places, reps)
        carry_out(cells, real, real.guess, out, about=lambda: about | {"engines": real.about()})
