"""When runs begin and which of them count."""

from __future__ import annotations

import pytest

from bench.schedule import PARTWAY, Turnover, poisson, starts, traced
from bench.simulation.profile import CPU
from bench.workloads.runs import Call, Piece, Run, Workload


def runs(count: int) -> Workload:
    made = [Run(str(i), "agent", [Call("s", "r", Piece(str(i), 100), 10)], arrival=10.0 - i) for i in range(count)]
    return Workload("w", made)


def test_the_window_opens_with_the_last_first_run_to_end() -> None:
    turnover = Turnover({"a", "b"}, 10)
    turnover.ended("a", 1.0)
    turnover.began(1.0)
    turnover.ended("c", 2.0)
    turnover.ended("b", 3.0)
    turnover.ran_out(9.0)
    turnover.ran_out(10.0)
    assert turnover.window == (3.0, 9.0)
    assert turnover.turned == {"a", "b"}
    assert turnover.starved == 0


def test_a_slot_that_starves_does_not_keep_the_window_shut_and_its_run_is_counted() -> None:
    turnover = Turnover({"a", "b"}, 4)
    turnover.ended("a", 1.0)
    turnover.began(1.0)
    turnover.began(2.0)
    turnover.ended("b", 3.0)
    turnover.ran_out(5.0)
    assert turnover.window == (2.0, 5.0)
    assert turnover.turned == {"a"}
    assert turnover.starved == 1


def test_first_runs_begin_part_way_over_some_turns_and_the_seed_decides() -> None:
    one, same, other = (starts(seed, 20, runs(3), CPU) for seed in (1, 1, 2))
    assert one == same != other
    turn = CPU.unloaded(runs(1).runs[0])
    assert all(0 <= delay <= 5 * turn and 0 <= depth <= PARTWAY for delay, depth in one)


def test_arrivals_come_at_their_rate() -> None:
    times = poisson(3600, 2000, 1)
    assert times == sorted(times) == poisson(3600, 2000, 1)
    assert times[-1] == pytest.approx(2000, rel=0.1)


def test_a_trace_gives_its_own_times() -> None:
    found, times = traced(runs(3))
    assert [run.id for run in found] == ["2", "1", "0"]
    assert times == [8.0, 9.0, 10.0]
    with pytest.raises(ValueError, match="when its runs arrived"):
        traced(Workload("w", [Run("x", "agent", [])]))
