"""A batch: how soon all is done, against the best fixed limit."""

from __future__ import annotations

from dataclasses import replace

from bench.batch import AT_ONCE, limited, told
from bench.records import CallRecord, Played, RunRecord
from bench.simulation.cluster import simulate
from bench.simulation.profile import PROFILES
from bench.simulation.system import System
from bench.simulation.systems import SYSTEMS
from bench.workloads.tenants import w8

SMALL = replace(PROFILES["l70"], kv_tokens=40_000)


RUNS = w8(1, tenants=3, light=4, greedy=8, lying=4)


def play(system: type[System]) -> Played:
    return simulate(RUNS, system, SMALL, workers=1, load=0.0, arrivals=AT_ONCE, supply=1)


def test_all_runs_are_there_at_once_and_all_are_played() -> None:
    played = play(SYSTEMS["weft"])
    assert max(run.started for run in played.runs) - min(run.started for run in played.runs) < 1.0
    assert told("weft", played)["errors"] == 0
    assert all(run.finished is not None for run in played.runs)


def test_a_limit_serves_so_many_runs_at_once_and_no_more() -> None:
    played = play(limited(0.3))
    begun = {run.run: min(c.first_token or 0.0 for c in played.calls if c.run == run.run) for run in played.runs}
    spans = [(begun[run.run], run.finished or 0.0) for run in played.runs]
    at_once = max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)
    assert 1 <= at_once <= int(0.3 * SMALL.kv_tokens / RUNS.mean_context)


def test_what_is_told_is_when_nine_tenths_and_all_have_ended() -> None:
    calls = [CallRecord("r", n, "s", "t", "0", 0.0, 10, 1, first_token=n * 60.0, finished=n * 360.0) for n in range(11)]
    runs = [RunRecord("r", "t", 0.0, 10.0, warm=False, finished=3600.0, until=3600.0)]
    figures = told("stock", Played(calls, runs, (0.0, 100.0), {}))
    assert figures["hours to 90 %"] == 0.9
    assert figures["hours to all"] == 1.0
    assert figures["longest wait"] == 600
