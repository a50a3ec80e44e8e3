"""Fronts that hold nothing, the semaphore and the routers, driven by hand; and every system from end to end."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from bench.simulation.cluster import simulate
from bench.simulation.profile import CPU
from bench.simulation.system import System
from bench.simulation.systems import SYSTEMS
from bench.simulation.systems.router import RouterCacheAware, RouterConsistentHash
from bench.simulation.systems.semaphore import Semaphore
from bench.simulation.systems.stock import Stock, StockHash, StockLeastLoaded, StockRelease, StockRoundRobin
from bench.workloads.runs import Call, Piece, Run, Workload
from tests.bench.simulation.fronts import FakeCluster, chain, relay


def test_stock_keeps_all_sessions_of_a_run_on_one_worker() -> None:
    cluster = FakeCluster(Stock)
    one, two = relay("one"), chain("two")
    for run in (one, two):
        cluster.call(run, 0)
    for index in (1, 2):
        cluster.call(one, index)
    assert cluster.places() == [0, 1, 0, 0]


def test_stock_places_a_run_where_the_fewest_are_live() -> None:
    cluster = FakeCluster(Stock)
    first, second, third = chain("1"), chain("2"), chain("3")
    cluster.call(first, 0)
    cluster.call(second, 0)
    cluster.system.ended(first)
    cluster.call(third, 0)
    assert cluster.places() == [0, 1, 0]


def test_round_robin_takes_the_next_worker_for_each_call() -> None:
    cluster = FakeCluster(StockRoundRobin, workers=3)
    for index in (0, 1, 2, 0):
        cluster.call(chain("run"), index)
    assert cluster.places() == [0, 1, 2, 0]


def test_least_loaded_takes_the_worker_with_the_fewest_calls_and_of_equals_the_one_chosen_longest_ago() -> None:
    cluster = FakeCluster(StockLeastLoaded)
    run = chain("run")
    one = cluster.call(run, 0)
    cluster.call(run, 1)
    cluster.call(run, 2)
    cluster.end(one)
    cluster.end(cluster.sent[2][0])
    cluster.call(run, 0)
    assert cluster.places() == [0, 1, 0, 0]


@pytest.mark.parametrize("system", [StockHash, RouterConsistentHash])
def test_a_hash_sends_a_run_to_the_same_worker_whatever_else_runs(system: type[System]) -> None:
    places = []
    for others in (0, 5):
        cluster = FakeCluster(system, workers=4)
        for number in range(others):
            cluster.call(chain(f"other-{number}"), 0)
        cluster.call(chain("run"), 0)
        places.append(cluster.places()[-1])
    assert places[0] == places[1]


def test_a_hash_spreads_runs_over_all_workers() -> None:
    cluster = FakeCluster(StockHash, workers=4)
    for number in range(400):
        cluster.call(chain(f"run-{number}"), 0)
    assert min(Counter(cluster.places()).values()) > 50


def test_release_frees_all_sessions_of_a_run_that_has_ended() -> None:
    cluster = FakeCluster(StockRelease)
    run = relay("run", rounds=1)
    for index in range(3):
        cluster.end(cluster.call(run, index))
    assert cluster.engines[0].released == []
    cluster.system.ended(run)
    assert cluster.engines[0].released == ["run/a", "run/b", "run/c"]


def test_the_semaphore_lets_in_as_many_runs_as_have_room_and_the_next_in_order_of_arrival() -> None:
    cluster = FakeCluster(Semaphore, workers=1, kv_tokens=2500)
    runs = [chain(f"run-{number}") for number in range(4)]
    turns = [cluster.call(run, 0) for run in runs[:2]]
    for run in runs[2:]:
        cluster.call(run, 0)
    assert [turn.run for turn, _ in cluster.sent] == runs[:2]
    for turn in turns:
        cluster.end(turn)
    assert len(cluster.sent) == 2, "a run keeps its place through its gaps"
    cluster.system.ended(runs[1])
    assert [turn.run for turn, _ in cluster.sent] == runs[:3]


def test_the_semaphore_counts_the_host_tier() -> None:
    assert FakeCluster(Semaphore, kv_tokens=1000, tier=2, mean=1000).system.places == 6
    assert FakeCluster(Semaphore, workers=4, kv_tokens=100, mean=1000).system.places == 4


def test_cache_aware_follows_the_longest_known_prefix_if_it_is_long_enough() -> None:
    cluster = FakeCluster(RouterCacheAware)
    shared = Piece("system", 100, shared=True)
    whole = Run("a", "p", [Call("s", "r", Piece("a", 50, shared), 10), Call("s", "r", Piece("b", 900, shared), 10)])
    cluster.call(whole, 0)
    cluster.call(whole, 0)
    cluster.call(whole, 1)
    assert cluster.places() == [0, 0, 1], "of the last prompt only a tenth is known"


def test_cache_aware_balances_where_the_load_differs_much() -> None:
    cluster = FakeCluster(RouterCacheAware)
    run = chain("run")
    for _ in range(66):
        cluster.call(run, 0)
    assert cluster.places() == [0] * 65 + [1]


TINY = replace(CPU, kv_tokens=4096)


def agents() -> Workload:
    """Runs of one session and runs of several, that share prompts, with gaps."""
    chains = [chain(f"chain-{n}", calls=4 + n % 3, tokens=300 + 40 * n, output=20, gap=0.2 + n / 7) for n in range(8)]
    relays = [relay(f"relay-{n}", fixed=200, rounds=2) for n in range(4)]
    return Workload("agents", [*chains, *relays])


@pytest.mark.parametrize("tier", [0.0, 2.0])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_serves_every_call_under_pressure(name: str, tier: float) -> None:
    played = simulate(agents(), SYSTEMS[name], TINY, workers=2, load=2.0, tier=tier, seed=3)
    assert all(call.finished is not None and call.error is None for call in played.calls)
    assert all(run.finished is not None for run in played.runs)


def fingerprint() -> str:
    """A digest of all that every system does."""
    digest = hashlib.sha256()
    for name, system in SYSTEMS.items():
        played = simulate(agents(), system, TINY, workers=2, load=1.5, tier=1.0, seed=5, supply=2)
        digest.update(name.encode() + repr(played.calls).encode())
    return digest.hexdigest()


def test_no_system_depends_on_the_seed_of_string_hashes() -> None:
    code = "from tests.bench.simulation.test_systems import fingerprint; print(fingerprint())"
    made = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert made[0].stdout, made[0].stderr
    assert made[0].stdout == made[1].stdout
