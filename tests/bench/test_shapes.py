from __future__ import annotations

import random

import pytest

from bench.shapes import SHAPES, Call, Player, Score, _truth, disturbed, measure, table, timed, warm


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_without_noise_runs_as_its_declared_template_says(shape: str) -> None:
    generate, declared = SHAPES[shape]
    for seed in range(20):
        run = generate(random.Random(seed))
        edges = {(edge.source, edge.target) for edge in declared.edges}
        assert run[0].role in declared.starts
        assert {(one.role, call.role) for call in run for one in call.after} <= edges
        assert all(run.index(one) < i for i, call in enumerate(run) for one in call.after)


def test_noise_keeps_the_first_step_and_the_order_of_the_rest() -> None:
    rng = random.Random(1)
    for _ in range(200):
        run = disturbed(SHAPES["map-reduce 3 to 7"][0](rng), 0.9, ["odd"], rng)
        assert run[0].role == "split"
        assert all(call.after for call in run[1:])
        played = timed(run, rng)
        assert all(one.end < call.start for call in played for one in call.after)


def test_the_truth_counts_the_steps_of_the_way_that_the_run_took() -> None:
    a = Call("a")
    b, c = Call("b", [a]), Call("c", [a])
    run = timed([a, b, c, Call("d", [b, c]), Call("a", [c])], random.Random(1))
    assert _truth(run, a.end) == ({"b": 1, "c": 1, "d": 2, "a": 2}, 4)


def test_a_template_learned_from_a_certain_shape_foresees_it_after_one_run() -> None:
    row = measure("parallel tools", 0.0, seed=3, runs=12, repeats=1)
    assert row["runs_to_95"] <= 2
    assert row["ste_exact_declared"] == 1
    assert row["ste_exact_learned"] > 0.85
    assert row["remaining_error_declared"] == pytest.approx(0, abs=1e-9)
    assert "| parallel tools | 0% |" in table([row])
    score = Score()
    player = Player(SHAPES["tree"][1], score)
    rng = random.Random(0)
    for number in range(6):
        player.play(timed(SHAPES["tree"][0](rng), rng), number)
        if number == 0:
            after_one = dict(score.ste)
    assert after_one["exact learned"] == 0
    exact = score.ste["exact learned"] - after_one["exact learned"]
    assert exact == score.ste["asked learned"] - after_one["asked learned"]


def test_the_role_before_makes_the_interleaved_planner_predictable() -> None:
    row = measure("planner and workers", 0.0, seed=3, runs=12, repeats=1)
    assert row["accuracy_transitions"] > row["accuracy_markov"] + 0.3


def test_a_start_is_warm_from_the_first_run_that_is_as_good_as_the_last_ones() -> None:
    assert warm({n: [n > 1] for n in range(10)}) == 3
    assert warm({n: [True] for n in range(10)}) == 1
