from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import pytest

from bench.attached import Attached
from bench.cells import Cell, Ledger
from bench.errors import BenchError
from bench.matrix import plan, play
from bench.real import Real
from bench.rivals.costs import Costs
from bench.runners import workload
from bench.simulation.calibration import document
from tests.bench.rivals.fake_engine import COSTS, FakeEngine, FakeEngines
from tests.bench.rivals.runs import quick


class Engines(FakeEngines):
    """Two fake engines that know how often they were started and ended."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__([FakeEngine(), FakeEngine()], None, costs=COSTS)
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


@pytest.fixture(autouse=True)
def starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.rivals.measure.starts", lambda seed, slots, workload, profile: quick(slots))


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


def test_unloaded_times_are_those_of_the_engines_that_were_measured(tmp_path: Path) -> None:
    cell = plan(BASE, ["stock"], [{}], 1)[0]

    def unloaded(costs: Costs) -> tuple[dict[str, float | None], Real]:
        engines = Engines()
        engines.costs = costs
        with Real(engines, None) as real:
            played = real(cell)
        return {run.run: run.unloaded for run in played.runs}, real

    some, real = unloaded(COSTS)
    assert real.profile is not None
    assert (real.profile.name, real.profile.kv_tokens, real.profile.block) == ("measured", 400, 4)
    assert (real.profile.budget, real.profile.sequences) == (1024, 16)
    assert real.about()["profile"] == document(real.profile)
    runs = {run.id: run for run in islice(workload(cell, None).draw(cell.seed), len(some))}
    assert some == {name: real.profile.unloaded(run, answers=False) for name, run in runs.items()}
    slower, _ = unloaded(replace(COSTS, fixed=1.0))
    assert all(slower[name] > seconds for name, seconds in some.items())


class Foreign(Attached):
    """A running server that refuses the first prompt of those that would measure it."""

    def __init__(self) -> None:
        super().__init__("", 400, 512)
        self.engine = FakeEngine(poison="1")

    async def __aenter__(self) -> Foreign:
        self.urls = [(await self.engine.start()).url]
        await super().__aenter__()
        return self

    async def __aexit__(self, *ended: Any) -> None:
        await super().__aexit__(*ended)
        await self.engine.stop()


def test_a_running_server_that_cannot_be_measured_is_played_and_no_time_alone_is_claimed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Real(Foreign(), None) as real:
        played = real(plan(BASE, ["stock"], [{}], 1)[0])
    assert real.profile is None
    assert "profile" not in real.about()
    assert {call.error for call in played.calls} == {None}
    assert {run.unloaded for run in played.runs} == {None}
    assert "cannot be measured" in capsys.readouterr().err


def test_own_engines_that_cannot_be_measured_end_the_matrix(tmp_path: Path) -> None:
    engines = Engines()
    engines.costs = None
    for engine in engines.engines:
        engine.poison = "1"
    with pytest.raises(BenchError, match="costs cannot be measured"):
        playing(engines, tmp_path)
    assert (engines.started, engines.ended) == (1, 1)


def test_a_cell_takes_longer_the_higher_the_load() -> None:
    with Real(Engines(), None) as real:  # type: ignore[arg-type]
        low, high = (real.guess(Cell("cascade", "stock", load, 2, 0.0, 0, 0)) for load in (0.5, 4.0))
    assert 0 < low < high == pytest.approx(low * 8)
