"""What tells the engines what to keep, and steals or orders work: SAGA, KVFlow, Continuum, the index, Weft."""

from __future__ import annotations

import pytest

from bench.simulation.systems.continuum import Continuum
from bench.simulation.systems.index import Index
from bench.simulation.systems.kvflow import KVFlow, StepGraph
from bench.simulation.systems.saga import Latencies, Saga
from bench.simulation.systems.weft import Weft, WeftAttached, WeftHinted, WeftNoEvict, WeftNoRelease
from bench.workloads.runs import Call, Piece, Run
from kvcache.policy import Policy
from tests.bench.simulation.fronts import FakeCluster, chain, relay

STAGES = {
    "nodes": {"a": {}, "b": {}, "c": {}},
    "edges": [{"from": "a", "to": "b"}, {"from": "b", "to": "c"}],
    "starts": ["a"],
}


def test_latencies_forget_the_oldest_and_know_nothing_at_first() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.95) == 300.0
    for seconds in range(1, 301):
        latencies.add(float(seconds))
    assert latencies.quantile(0.0) == 45.0
    assert latencies.quantile(0.95) == 288.0


def test_saga_holds_a_session_for_as_long_as_its_tool_usually_takes() -> None:
    cluster = FakeCluster(Saga)
    run = chain("run", calls=4)
    cluster.begin(run)
    for index in range(2):
        cluster.end(cluster.call(run, index))
        cluster.pass_time(4)
    cluster.end(cluster.call(run, 2))
    assert cluster.engines[0].hints["run/main"].reuse == 0.95
    cluster.system.ended(run)
    assert cluster.engines[0].released == ["run/main"]
    again = chain("again")
    cluster.begin(again)
    cluster.end(cluster.call(again, 0))
    assert cluster.engines[0].hints["again/main"].hold == pytest.approx(4.0)


def test_saga_lets_an_idle_worker_take_the_oldest_call_of_the_longest_queue() -> None:
    cluster = FakeCluster(Saga, workers=2)
    runs = [chain(f"run-{number}") for number in range(3)]
    for run in runs:
        cluster.begin(run)
    turns = [cluster.call(runs[0], 0), cluster.call(runs[1], 0), cluster.call(runs[2], 0)]
    assert cluster.places() == [0, 1, 0]
    cluster.end(turns[1])
    cluster.pass_time(0.35)
    assert cluster.sent[-1] == (turns[0], 1)
    assert turns[0].record.held == 0.0, "it waited in an engine, not before"
    cluster.end(turns[0])
    cluster.call(runs[0], 1)
    assert cluster.places()[-1] == 1, "its run has moved with it"


def test_saga_orders_by_work_left_over_time_left() -> None:
    cluster = FakeCluster(Saga, workers=1)
    urgent, easy = chain("urgent"), chain("easy")
    for run in (urgent, easy):
        cluster.begin(run)
    cluster.lefts = {"urgent": 50.0, "easy": 1.0}
    keys = [cluster.system.key(cluster.call(run, 0)) for run in (urgent, easy)]
    assert keys[0] < keys[1]


def test_saga_fetches_from_the_host_when_half_of_the_calls_of_a_tool_have_returned() -> None:
    cluster = FakeCluster(Saga, tier=1)
    first, second = chain("first"), chain("second")
    for run in (first, second):
        cluster.begin(run)
    cluster.end(cluster.call(first, 0))
    cluster.pass_time(2)
    cluster.call(first, 1)
    cluster.end(cluster.call(second, 0))
    cluster.pass_time(1.5)
    assert cluster.engines[1].prefetched == []
    cluster.pass_time(1)
    assert cluster.engines[1].prefetched == [second.calls[0].answer]


def test_a_session_that_goes_on_is_one_step_away() -> None:
    run = chain("run")
    graph = StepGraph(run)
    graph.began(run.calls[0])
    assert graph.steps() == ({"agent": 0.0}, {"main": 0.0})
    graph.ended(run.calls[0])
    assert graph.steps() == ({"agent": 1.0}, {"main": 1.0})


def test_a_join_is_one_step_behind_what_it_waits_for() -> None:
    before = [Call(name, name, Piece(name, 10), 1) for name in "abc"]
    after = Call("late", "late", Piece("late", 10), 1, (before[0],))
    everyone = Call("all", "all", Piece("all", 10), 1, (*before, after))
    anyone = Call("any", "any", Piece("any", 10), 1, (*before, after), need=1)
    graph = StepGraph(Run("run", "p", [*before, after, everyone, anyone]))
    for call in before:
        graph.began(call)
    graph.ended(before[0])
    roles, _ = graph.steps()
    assert roles == {"b": 0.0, "c": 0.0, "late": 1.0, "all": 2.0, "any": 1.0}


def test_a_declared_template_foretells_the_steps_even_where_the_run_goes_otherwise() -> None:
    run = relay("run", "acb", rounds=1, hints={"template": STAGES})
    graph = StepGraph(run)
    graph.began(run.calls[0])
    graph.ended(run.calls[0])
    roles, sessions = graph.steps()
    assert (roles["b"], roles["c"]) == (1.0, 2.0)
    assert sessions["b"] == 1.0


def test_calls_that_were_made_before_the_simulation_began_are_over() -> None:
    run = chain("run", calls=5)
    graph = StepGraph(run)
    graph.began(run.calls[3])
    assert graph.steps()[1] == {"main": 0.0}
    graph.ended(run.calls[3])
    assert graph.steps()[1] == {"main": 1.0}


def test_kvflow_tells_each_role_the_least_steps_of_all_runs_and_prefetches_who_is_next() -> None:
    cluster = FakeCluster(KVFlow, workers=1, tier=1)
    one, two = relay("one"), relay("two")
    for run in (one, two):
        cluster.begin(run)
    for index in range(3):
        cluster.end(cluster.call(one, index))
    turn = cluster.call(one, 3)
    hints = cluster.engines[0].hints
    assert [hints[f"role:default/{role}"].steps for role in "abc"] == [0.0, 1.0, 2.0]
    assert hints["one/b"].steps == 1.0
    assert [piece.name for piece in cluster.engines[0].prefetched[-1:]] == ["one/b"]
    cluster.end(turn)
    cluster.call(two, 0)
    assert [hints[f"role:default/{role}"].steps for role in "abc"] == [0.0, 1.0, 2.0]
    cluster.system.ended(one)
    cluster.system.ended(two)
    assert [hints[f"role:default/{role}"].steps for role in "abc"] == [None, None, None]


def test_continuum_serves_the_program_that_began_first() -> None:
    cluster = FakeCluster(Continuum, workers=1)
    old, new = chain("old"), chain("new")
    cluster.begin(old)
    cluster.pass_time(5)
    cluster.begin(new)
    young = cluster.call(new, 0)
    cluster.pass_time(5)
    assert cluster.system.key(cluster.call(old, 1)) < cluster.system.key(young)


def test_the_index_learns_how_soon_sessions_come_back() -> None:
    cluster = FakeCluster(Index, workers=1)
    for number in range(30):
        run = chain(f"run-{number}", calls=2)
        cluster.end(cluster.call(run, 0))
        cluster.pass_time(2)
        cluster.end(cluster.call(run, 1))
        cluster.system.ended(run)
    tool, end = cluster.engines[0].hints["run-29/main"], chain("last")
    cluster.end(cluster.call(end, 0))
    back = cluster.engines[0].hints["last/main"].gap
    assert back is not None
    assert tool.gap is not None
    assert back.index(0.0) > 5 * tool.gap.index(0.0), "after a tool call it returns, after the last answer never"


def test_attached_weft_keeps_each_session_on_the_worker_where_the_core_placed_it() -> None:
    cluster = FakeCluster(WeftAttached)
    runs = [chain(f"run-{number}") for number in range(4)]
    for index in range(3):
        for run in runs:
            cluster.end(cluster.call(run, index))
    assert cluster.places() == [0, 1, 0, 1] * 3
    assert type(cluster.system.policy()) is Policy
    assert cluster.engines[0].hints == {}
    cluster.system.scheduler.check()


def test_weft_foretells_a_session_by_the_gap_that_the_core_has_learned() -> None:
    cluster = FakeCluster(Weft, workers=1)
    for number in range(20):
        run = chain(f"run-{number}", calls=4)
        for index in range(4):
            cluster.end(cluster.call(run, index))
            cluster.pass_time(2)
    turn = cluster.call(chain("run", calls=4), 0)
    cluster.end(turn)
    ended = cluster.now
    cluster.pass_time(0.2)
    hint = cluster.engines[0].hints["run/main"]
    step = cluster.system.scheduler.graph.root_of("default", "run/main").sessions["run/main"].branches[0]
    assert hint.since == ended
    assert hint.gap.quantile(0.5) == cluster.system.scheduler.knowledge.gap(step).quantile(0.5)
    assert 1.5 < hint.gap.quantile(0.5) < 2.7


def test_weft_foretells_roles_from_a_declared_template_and_forgets_what_does_not_come() -> None:
    cluster = FakeCluster(WeftHinted, workers=1)
    for number in range(3):  # the template does not say how long a step takes
        run = relay(f"run-{number}", rounds=1, hints={"template": STAGES})
        cluster.begin(run)
        for index in range(3):
            turn = cluster.call(run, index)
            cluster.pass_time(5)
            cluster.end(turn)
    run = relay("run", rounds=1, hints={"template": STAGES})
    cluster.begin(run)
    cluster.call(run, 0)
    cluster.pass_time(0.1)
    now, hints = cluster.now, cluster.engines[0].hints
    assert hints["role:default/b"].next_use == pytest.approx(now + 5, abs=1)
    assert hints["role:default/c"].next_use == pytest.approx(now + 10, abs=1)
    cluster.pass_time(60)
    assert hints["role:default/b"].next_use is None


def test_only_hinted_weft_hears_that_a_run_has_ended() -> None:
    for system, released in ((Weft, []), (WeftHinted, ["run/main"])):
        cluster = FakeCluster(system, workers=1)
        run = chain("run", calls=1)
        cluster.end(cluster.call(run, 0))
        cluster.system.ended(run)
        cluster.pass_time(0.2)
        assert cluster.engines[0].released == released
        graph = cluster.system.scheduler.graph
        workflow = graph.get("default", "run") or graph.root_of("default", "run/main")
        assert workflow.finished is bool(released)


def test_weft_without_a_mechanism_does_not_pass_its_advice_on() -> None:
    for system, hinted, released in ((WeftNoEvict, False, True), (WeftNoRelease, True, False)):
        cluster = FakeCluster(system, workers=1)
        cluster.end(cluster.call(chain("run"), 0))
        cluster.pass_time(0.2)
        assert bool(cluster.engines[0].hints) is hinted
        cluster.pass_time(4000)
        assert bool(cluster.engines[0].released) is released


def test_weft_fetches_ahead_from_a_tier_what_runs_next() -> None:
    cluster = FakeCluster(WeftHinted, workers=1, tier=2)
    run = relay("run", rounds=2, hints={"template": STAGES})
    cluster.begin(run)
    for index in range(3):
        turn = cluster.call(run, index)
        cluster.pass_time(5)
        cluster.end(turn)
    assert cluster.engines[0].prefetched == []
    turn = cluster.call(run, 3)
    cluster.system.first_token(turn)
    assert run.calls[1].prompt in cluster.engines[0].prefetched
