from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import pytest

from bench.cells import Cell, Ledger
from bench.errors import BenchError
from bench.matrix import plan, play
from bench.real import Real
from tests.bench.rivals.fake_engine import FakeEngine, FakeEngines


class Engines(FakeEngines):
    """Two fake engines that know how often they were started and ended."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__([FakeEngine(), FakeEngine()], None)
        self.started = self.ended = 0
        self.broken = broken

    async def __aenter__(self) -> Engines:
        self.started += 1
        if self.broken:
            raise RuntimeError("no engine starts here")
        for engine in self.engines:
            await engine.start()
        self.http = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended += 1
        await self.http.close()
        for engine in self.engines:
            await engine.stop()


BASE = Cell("cascade", "", 0.5, 2, 0.0, 0, 0, engine="real", scale=100.0, supply=2)


def playing(engines: Any, folder: Path) -> tuple[int, int]:
    with Real(engines, None) as real:
        cells = plan(BASE, ["stock", "stock-hash"], [{}], 2)
        done, failed = play(cells, Ledger(folder), real, real.guess, ("abc", {}))
    assert all(one.metrics["errors"] == 0 for one in done)
    return len(done), len(failed)


def test_engines_are_started_once_for_all_cells_and_ended(tmp_path: Path) -> None:
    engines = Engines()
    assert playing(engines, tmp_path) == (4, 0)
    assert (engines.started, engines.ended) == (1, 1)
    assert engines.engines[0].resets >= 4


def test_where_every_cell_is_there_no_engine_is_started(tmp_path: Path) -> None:
    playing(Engines(), tmp_path)
    engines = Engines()
    assert playing(engines, tmp_path) == (4, 0)
    assert (engines.started, engines.ended) == (0, 0)


def test_engines_that_do_not_start_end_the_matrix_and_are_not_tried_for_every_cell(tmp_path: Path) -> None:
    engines = Engines(broken=True)
    with pytest.raises(BenchError, match="no engine starts here"):
        playing(engines, tmp_path)
    assert (engines.started, engines.ended) == (1, 0)


def test_a_cell_takes_longer_the_higher_the_load() -> None:
    with Real(Engines(), None) as real:  # type: ignore[arg-type]
        low, high = (real.guess(Cell("cascade", "stock", load, 2, 0.0, 0, 0)) for load in (0.5, 4.0))
    assert 0 < low < high == pytest.approx(low * 8)
