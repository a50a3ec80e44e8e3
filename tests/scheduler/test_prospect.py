"""Draws of a run's rest: against what can be reckoned by hand, and against the exact averages."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from scheduler.estimates import TOOL, Estimates, Past, Place
from scheduler.position import Position
from scheduler.prospect import Dice, Game, Line, side_by_side
from scheduler.template import Template
from tests.scheduler.test_foresight import foresight

START = Position(running={"a": 1})


def drawn(position: Position, *edges: Any, draws: int = 4000, **nodes: Any) -> tuple[float, float]:
    """Mean seconds and tokens of the rest; a step takes 1 s and 11 tokens."""
    game, dice = Game(foresight(*edges, **nodes).template), Dice(1)
    rests = [game.draw(position, dice) for _ in range(draws)]
    return mean(one.seconds for one in rests), mean(one.tokens for one in rests)


def test_a_chain_takes_its_steps_and_gaps() -> None:
    seconds, tokens = drawn(START, ("a", "b", 1, 1, 2.0), ("b", "c"))
    assert seconds == pytest.approx(5.0, rel=0.05)
    assert tokens == 33


def test_what_has_passed_of_a_step_counts() -> None:
    seconds, _ = drawn(Position(running={"a": 1}, runs={"a": 0.9}), ("a", "b"))
    assert 1.1 < seconds < 1.6


def test_a_choice_takes_one_way_and_may_end() -> None:
    _, tokens = drawn(Position(finished={"a": 1}), ("a", "b", 0.3), ("a", "c", 0.2))
    assert tokens == pytest.approx(5.5, rel=0.1)


def test_a_loop_goes_round_as_often_as_is_expected() -> None:
    _, tokens = drawn(START, ("a", "a", 0.9), starts=("a",))
    assert tokens == pytest.approx(110, rel=0.1)


def test_a_fan_out_runs_side_by_side_and_an_all_waits_for_the_last() -> None:
    edges = [("a", role) for role in "bcd"] + [(role, "e") for role in "bcd"]
    seconds, tokens = drawn(START, *edges, a={"fork": "all"}, e={"join": "all"})
    assert tokens == 55
    assert 3.2 < seconds < 4.2


def test_an_all_does_not_wait_for_what_cannot_come_any_more() -> None:
    edges = [("a", "b", 0.5), ("a", "c", 0.5), ("b", "d"), ("c", "d")]
    _, tokens = drawn(START, *edges, d={"join": "all"})
    assert tokens == 33


def test_a_race_goes_on_with_the_first() -> None:
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]
    seconds, tokens = drawn(START, *edges, a={"fork": "all"}, d={"join": 2})
    assert tokens == 44
    assert seconds > 3.0


def test_an_endless_loop_ends() -> None:
    _, tokens = drawn(START, ("a", "a", 1.0), draws=2, starts=("a",))
    assert tokens > 1_000


def test_draws_agree_with_the_exact_averages_on_a_mixed_graph() -> None:
    edges = [("a", "b", 0.6, 1, 1.0), ("a", "c", 0.4), ("b", "a", 0.5), ("c", "d", 0.9, 2.5)]
    exact = foresight(*edges, starts=("a",)).remaining(START)
    _, tokens = drawn(START, *edges, draws=20_000, starts=("a",))
    assert tokens == pytest.approx(exact.prompt_tokens + exact.output_tokens + 11, rel=0.05)


def test_a_template_without_roles_has_no_rest() -> None:
    rest = Game(Template("t", {}, (), ())).draw(Position(), Dice(1))
    assert (rest.seconds, rest.tokens) == (0.0, 0.0)


def line(running: bool, steps: int, tokens: int = 100) -> Line:
    """Of a role whose sessions make ten steps, 5 s apart; this one has made some."""
    estimates = Estimates()
    for _ in range(300):
        for done in range(1, 11):
            place = Place("t", "r", (), Past(done, TOOL, TOOL))
            if done < 10:
                estimates.returned(place, 5.0)
            else:
                estimates.never(place)
    place = Place("t", "r", (), Past(steps, TOOL, TOOL))
    return Line(running, estimates.steps_left(place), estimates.gap(place), 2.0, tokens)


def test_a_session_goes_on_as_its_role_does() -> None:
    dice = Dice(2)
    going = line(False, 2)
    assert 5 * 100 < mean(going.draw(dice).tokens for _ in range(1000)) < 16 * 100


def test_a_session_near_its_end_has_less_before_it() -> None:
    dice = Dice(3)
    young, old = line(False, 1), line(False, 9)
    assert old.left.mean() < young.left.mean() - 2
    assert mean(old.draw(dice).seconds for _ in range(500)) < mean(young.draw(dice).seconds for _ in range(500))


def test_the_step_that_runs_is_left_whatever_comes_after_it() -> None:
    dice, last = Dice(4), line(True, 9)
    assert min(last.draw(dice).tokens for _ in range(200)) >= 100


def test_of_sessions_side_by_side_the_longest_counts_and_all_tokens_do() -> None:
    session = line(False, 2)
    one = mean(side_by_side([session], Dice(n)).seconds for n in range(300))
    three = mean(side_by_side([session] * 3, Dice(n)).seconds for n in range(300))
    assert one < three < 3 * one


def test_the_same_seed_draws_the_same() -> None:
    assert [Dice(7)() for _ in range(3)] == [Dice(7)() for _ in range(3)]
    throws = Dice(7)
    assert abs(mean(throws() for _ in range(10_000)) - 0.5) < 0.01
