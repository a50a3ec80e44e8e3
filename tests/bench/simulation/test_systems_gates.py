"""What holds calls back: ThunderAgent, vllm-router's program scheduling, the oracle's gate."""

from __future__ import annotations

import pytest

from bench.simulation.systems.oracle import Belady, OracleGate, footprint
from bench.simulation.systems.program import RouterProgram, RouterProgramHinted
from bench.simulation.systems.progress import Progress, Sample
from bench.simulation.systems.thunderagent import ThunderAgent
from bench.workloads.runs import Call, Piece, Run
from tests.bench.simulation.fronts import FakeCluster, chain, relay


def names(cluster: FakeCluster) -> list[str]:
    return [turn.run.id for turn, _ in cluster.sent]


def test_thunderagent_resumes_the_shortest_first_at_its_tick_as_long_as_there_is_room() -> None:
    cluster = FakeCluster(ThunderAgent, workers=1, kv_tokens=5000)
    for name, tokens in (("long", 4000), ("short", 1000), ("middle", 2000)):
        cluster.call(chain(name, tokens=tokens), 0)
    assert cluster.sent == []
    cluster.pass_time(5)
    assert names(cluster) == ["short", "middle"]


def test_thunderagent_lets_an_active_program_pass_and_pauses_the_shortest_acting_ones_over_capacity() -> None:
    cluster = FakeCluster(ThunderAgent, workers=1, kv_tokens=5000)
    small, large = chain("small", tokens=1000), chain("large", tokens=2000)
    for run in (small, large):
        cluster.call(run, 0)
    cluster.pass_time(5)
    for turn, _ in list(cluster.sent):
        cluster.end(turn)
    cluster.call(large, 1)
    assert names(cluster) == ["small", "large", "large"]
    cluster.pass_time(5)
    assert cluster.engines[0].hints["small/main"].leased, "1,100 tokens have halved: all fits"
    cluster.call(large, 2)
    cluster.pass_time(5)
    assert not cluster.engines[0].hints["small/main"].leased
    cluster.call(small, 1)
    assert names(cluster)[-1] == "large", "it is held now"


def test_thunderagent_forces_a_call_after_half_an_hour() -> None:
    cluster = FakeCluster(ThunderAgent, workers=1, kv_tokens=1500)
    cluster.call(chain("giant", tokens=2000), 0)
    cluster.pass_time(1799)
    assert cluster.sent == []
    cluster.pass_time(10)
    assert names(cluster) == ["giant"]


def test_thunderagent_forgets_a_program_whose_end_is_marked() -> None:
    cluster = FakeCluster(ThunderAgent, workers=1)
    run = chain("run", calls=1)
    cluster.call(run, 0)
    cluster.pass_time(5)
    cluster.end(cluster.sent[0][0])
    cluster.system.ended(run)
    assert not cluster.system.programs
    assert cluster.engines[0].released == ["run/main"]


def test_the_router_holds_a_program_that_does_not_fit_and_forces_it_after_five_minutes() -> None:
    cluster = FakeCluster(RouterProgram, workers=1, kv_tokens=3000)
    cluster.call(chain("one", tokens=2000), 0)
    cluster.call(chain("two", tokens=2000), 0)
    assert names(cluster) == ["one"]
    cluster.start(cluster.sent[0][0])
    cluster.pass_time(299)
    assert names(cluster) == ["one"]
    cluster.pass_time(2)
    assert names(cluster) == ["one", "two"]


def test_the_router_resumes_the_most_recently_served_first() -> None:
    cluster = FakeCluster(RouterProgram, workers=1, kv_tokens=3000)
    old, late, busy = chain("old", tokens=500), chain("late", tokens=500), chain("busy", tokens=2700)
    for run in (old, late):
        cluster.end(cluster.call(run, 0))
        cluster.pass_time(1)
    running = cluster.call(busy, 0)
    for run in (old, late):
        cluster.call(run, 1)
    assert names(cluster)[2:] == ["busy"]
    cluster.end(running)
    assert names(cluster)[3:] == ["late", "old"]


def test_the_router_admits_nobody_to_a_worker_where_calls_waited_at_the_last_look() -> None:
    cluster = FakeCluster(RouterProgram, workers=1)
    one = cluster.call(chain("one", tokens=500), 0)
    cluster.pass_time(1)  # it still waits in the engine
    cluster.call(chain("two", tokens=500), 0)
    assert names(cluster) == ["one"]
    cluster.start(one)
    cluster.pass_time(1)
    assert names(cluster) == ["one", "two"]


def test_the_router_keeps_a_program_active_for_its_time_to_live_only() -> None:
    cluster = FakeCluster(RouterProgramHinted, workers=1, kv_tokens=3000)
    run, other = chain("run", tokens=1000, gap=1.0), chain("other", tokens=1000)
    for one in (run, other):
        cluster.begin(one)
    cluster.end(cluster.call(run, 0))
    cluster.pass_time(1)
    cluster.end(cluster.call(run, 1))  # its next call is foretold within three seconds
    cluster.call(other, 0)
    assert names(cluster) == ["run", "run"], "2,000 tokens are kept"
    cluster.pass_time(3.5)
    assert names(cluster)[2:] == ["other"]


def test_the_router_drops_a_session_whose_last_call_is_marked() -> None:
    cluster = FakeCluster(RouterProgramHinted, workers=1)
    run = relay("run", rounds=1)
    cluster.begin(run)
    cluster.end(cluster.call(run, 0))
    assert "run/a" not in cluster.system.programs
    assert not cluster.system.on[0]


def progress(gap: float, size: int = 4) -> Progress:
    made = Progress(size)
    for number in range(size):
        made.returned(gap * (1 + number / 10))
        made.ended(Sample(float(number), 100, 500, 2, 1.0))
    return made


def test_a_time_to_live_covers_gaps_that_cost_less_to_wait_for_than_to_lose() -> None:
    assert progress(1.0).ttl(impact=5.0) >= 1.0
    assert progress(9.0).ttl(impact=2.0) == 0.0
    assert Progress(4).ttl(impact=5.0) == 0.0, "nothing is known yet"


def test_growth_is_reserved_for_the_rounds_that_programs_still_have() -> None:
    known = progress(1.0)
    assert known.rounds == 4
    assert known.reserve([3.0, 1.0]) == 500 * (4 + 4)
    assert known.throughput == pytest.approx(1.0)


def test_belady_tells_each_next_use_and_releases_what_has_none() -> None:
    cluster = FakeCluster(Belady, workers=1)
    run = relay("run", rounds=1)
    cluster.dues = {"run/a": 40.0, "run/b": None}
    cluster.end(cluster.call(run, 0))
    assert cluster.engines[0].hints["run/a"].next_use == 40.0
    cluster.dues["run/a"] = 30.0
    cluster.end(cluster.call(run, 1))
    assert cluster.engines[0].hints["run/a"].next_use == 30.0, "what a session waits for may move"
    assert cluster.engines[0].released == ["run/b"]


def test_belady_knows_a_role_by_the_next_of_its_sessions_in_any_run() -> None:
    cluster = FakeCluster(Belady, workers=1)
    one, two = relay("one"), relay("two")
    cluster.dues = {"one/a": 50.0, "one/b": 60.0, "two/a": 40.0, "two/b": 70.0}
    for run in (one, two):
        cluster.end(cluster.call(run, 0))
    hints = cluster.engines[0].hints
    assert [hints[f"role:default/{role}"].next_use for role in "abc"] == [40.0, 60.0, float("inf")]
    cluster.system.ended(two)
    cluster.end(cluster.call(one, 1))
    assert hints["role:default/a"].next_use == 50.0


def test_the_oracle_gate_holds_what_does_not_fit_and_prefers_the_run_with_least_left() -> None:
    cluster = FakeCluster(OracleGate, workers=1, kv_tokens=4000)
    runs = [chain(name, tokens=3000) for name in ("first", "long", "short")]
    cluster.lefts = {"first": 1.0, "long": 9.0, "short": 2.0}
    first = cluster.call(runs[0], 0)
    for run in runs[1:]:
        cluster.call(run, 0)
    assert names(cluster) == ["first"]
    cluster.end(first)
    cluster.system.ended(runs[0])
    assert names(cluster) == ["first", "short"]


def test_the_oracle_gate_revokes_the_lease_of_a_run_that_returns_late() -> None:
    for due, admitted in ((300.0, True), (0.2, False)):
        cluster = FakeCluster(OracleGate, workers=1, kv_tokens=4000)
        away, busy, new = chain("away", tokens=1500), chain("busy", tokens=100), chain("new", tokens=2500)
        cluster.call(busy, 0)  # the worker has something to do
        cluster.dues["away/main"] = due
        cluster.end(cluster.call(away, 0))
        cluster.call(new, 0)
        assert (names(cluster)[-1] == "new") is admitted
        assert cluster.engines[0].hints["away/main"].leased is not admitted


def test_the_oracle_gate_moves_a_held_run_to_a_worker_with_room() -> None:
    cluster = FakeCluster(OracleGate, workers=2, kv_tokens=4000)
    one, two, three = chain("one", tokens=3000), chain("two", tokens=1000), chain("three", tokens=2000)
    for run in (one, two, three):
        cluster.call(run, 0)
    assert cluster.places() == [0, 1]
    cluster.pass_time(2)
    assert cluster.places() == [0, 1, 1]


def test_a_run_larger_than_all_is_admitted_alone() -> None:
    cluster = FakeCluster(OracleGate, workers=1, kv_tokens=2000)
    small, giant = chain("small", tokens=500), chain("giant", tokens=5000)
    cluster.dues["small/main"] = 1000.0
    turn = cluster.call(small, 0)
    cluster.call(giant, 0)
    assert names(cluster) == ["small"]
    cluster.end(turn)
    assert names(cluster) == ["small", "giant"]


def test_a_footprint_counts_shared_prompts_once() -> None:
    root = Piece("root", 100)
    one, two = Piece("one", 10, root), Piece("two", 20, root)
    assert footprint([(one, 0), (two, 5), (root, 0)]) == 135


def test_all_held_calls_of_a_run_pass_with_it() -> None:
    cluster = FakeCluster(OracleGate, workers=1, kv_tokens=4000)
    root = Piece("root", 1500)
    calls = [Call(name, "role", Piece(name, 100, root), 10) for name in ("a", "b")]
    fan, first = Run("fan", "program", calls), chain("first", tokens=3000)
    turn = cluster.call(first, 0)
    for index in (0, 1):
        cluster.call(fan, index)
    cluster.end(turn)
    cluster.system.ended(first)
    assert names(cluster) == ["first", "fan", "fan"]
