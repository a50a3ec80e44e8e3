from __future__ import annotations

import json
import math
import random

import pytest

from scheduler.chances import Chances, shrunk
from scheduler.estimates import END, LENGTH, OTHER, START, TOOL, Estimates, Past, Place, kind
from scheduler.gaps import DAY, GAPS, Gap
from scheduler.lengths import BINS, STARTS, StepsLeft, depth_bin

AFTER_TOOL = Past().ended(TOOL, 100)
AFTER_END = Past().ended(END, 100)


def place(past: Past = AFTER_TOOL, *tools: str, role: str = "coder", tenant: str = "t") -> Place:
    return Place(tenant, role, tools, past)


def taught(seconds: float, times: int, where: Place) -> Estimates:
    estimates = Estimates()
    for _ in range(times):
        estimates.returned(where, seconds)
    return estimates


def samples(gap: Gap, count: int) -> list[float]:
    draw = random.Random(1)
    drawn = (draw.random() for _ in range(count))
    return [math.inf if u < gap.never else gap.spread.quantile(draw.random()) for u in drawn]


# Kinds of stop and the past of a session.


@pytest.mark.parametrize(
    ("stop", "kinds"),
    [("tool_calls", TOOL), ("function_call", TOOL), ("tool_use", TOOL), ("stop", END), ("end_turn", END),
     ("stop_sequence", END), ("completed", END), ("length", LENGTH), ("max_tokens", LENGTH), ("incomplete", LENGTH),
     ("content_filter", OTHER), ("", OTHER), (None, OTHER)],
)  # fmt: skip
def test_every_api_s_finish_reason_has_a_kind(stop: str | None, kinds: str) -> None:
    assert kind(stop) == kinds


def test_an_answer_that_called_a_tool_stopped_for_it_whatever_it_says() -> None:
    assert kind("completed", ("bash",)) == kind("stop", ("bash",)) == TOOL


def test_a_past_knows_its_last_stops_and_keeps_gaps_after_tools_and_after_humans_apart() -> None:
    past = Past().ended(TOOL, 10).returned(5).ended(END, 20).returned(500).ended(TOOL, 30)
    assert (past.steps, past.stop, past.before, past.gap) == (3, TOOL, END, -1)
    assert list(past.tool_gaps) == [GAPS.bin(5)]
    assert list(past.other_gaps) == [GAPS.bin(500)]
    assert len(past.outputs) == 3
    assert Past().stop == START


# The gap.


def test_with_nothing_known_humans_are_slower_than_tools_and_leave_more_often() -> None:
    tool, human = Estimates().gap(place()), Estimates().gap(place(AFTER_END))
    assert 3 < tool.quantile(0.5) < 20 < human.quantile(0.5)
    assert tool.never < human.never


def test_the_first_gap_of_a_role_already_moves_its_prediction() -> None:
    before = Estimates().gap(place()).quantile(0.5)
    assert taught(300, 1, place()).gap(place()).quantile(0.5) > before


def test_a_role_learns_its_own_gaps_and_a_new_role_starts_from_everybody_s() -> None:
    estimates = taught(300, 200, place(role="slow"))
    for _ in range(200):
        estimates.returned(place(role="fast"), 1)
    assert 200 < estimates.gap(place(role="slow")).quantile(0.5) < 400
    assert 0.7 < estimates.gap(place(role="fast")).quantile(0.5) < 1.5
    new = estimates.gap(place(role="new"))
    assert new.quantile(0.25) < 2 < 200 < new.quantile(0.75)


def test_a_tool_learns_its_own_gaps_within_a_role() -> None:
    estimates = taught(60, 100, place(AFTER_TOOL, "build"))
    for _ in range(100):
        estimates.returned(place(AFTER_TOOL, "read"), 1)
    assert estimates.gap(place(AFTER_TOOL, "build")).quantile(0.5) == pytest.approx(60, rel=0.3)
    assert estimates.gap(place(AFTER_TOOL, "read")).quantile(0.5) == pytest.approx(1, rel=0.3)


def test_a_session_s_own_gaps_tell_most() -> None:
    past = AFTER_TOOL
    for _ in range(10):
        past = past.returned(100).ended(TOOL, 100)
    estimates = taught(5, 500, place())
    assert estimates.gap(place()).quantile(0.5) == pytest.approx(5, rel=0.3)
    assert estimates.gap(place(past)).quantile(0.75) == pytest.approx(100, rel=0.5)


def test_a_gap_that_nobody_knows_teaches_only_that_the_session_went_on() -> None:
    estimates = Estimates()
    before = estimates.gap(place())
    for _ in range(100):
        estimates.returned(place(), None)
    after = estimates.gap(place())
    assert list(after.spread.cdf) == list(before.spread.cdf)
    assert after.never < before.never


def test_the_chance_of_no_return_is_learned() -> None:
    estimates = Estimates()
    for i in range(400):
        if i % 4:
            estimates.returned(place(AFTER_END), 100)
        else:
            estimates.never(place(AFTER_END))
    assert estimates.gap(place(AFTER_END)).never == pytest.approx(0.25, abs=0.03)


def test_a_rare_event_keeps_its_rate_through_a_quiet_run() -> None:
    chances = Chances(1.0, 100)
    for i in range(1000):
        chances.add([("all",), ("all", "loud")], i % 50 == 0)
    for _ in range(50):
        chances.add([("all",), ("all", "quiet")], False)
    assert 0.005 < chances.chance([("all",), ("all", "quiet")], 0.02) < 0.02
    assert shrunk(0, 0, 0.3, 5) == pytest.approx(0.3)


def test_the_longer_a_session_is_idle_the_likelier_it_is_gone() -> None:
    gap = Gap(GAPS.log_normal(20, 1.5), 0.2)
    chances = [gap.never_after(idle) for idle in (0, 10, 100, 1000, 10_000, DAY)]
    assert chances == sorted(chances)
    assert chances[0] == pytest.approx(0.2)
    assert chances[-1] == 1


@pytest.mark.parametrize("idle", [0.0, 3.0, 40.0, 900.0])
def test_what_is_expected_of_an_idle_session_is_what_happens_to_samples(idle: float) -> None:
    gap = Gap(GAPS.log_normal(20, 1.5), 0.2)
    late = [g for g in samples(gap, 60_000) if g > idle]
    for h in (5.0, 60.0, 2000.0):
        assert gap.returns_by(h, idle) == pytest.approx(sum(g <= idle + h for g in late) / len(late), abs=0.02)
        assert gap.mean_within(h, idle) == pytest.approx(sum(min(g - idle, h) for g in late) / len(late), rel=0.03)
    returned = sorted(g - idle for g in late if g < math.inf)
    assert gap.quantile(0.5, idle) == pytest.approx(returned[len(returned) // 2], rel=0.06)
    assert gap.never_after(idle) == pytest.approx(1 - len(returned) / len(late), abs=0.02)


@pytest.mark.parametrize("median", [1.0, 20.0, 400.0])
def test_the_index_is_the_best_ratio_over_all_horizons(median: float) -> None:
    gap = Gap(GAPS.log_normal(median, 1.2), 0.1)
    for idle in (0.0, 0.5, 7.0, 66.0, 1234.0, 40_000.0):
        horizons = (0.02 * 1.05**i for i in range(400))
        best = max(gap.returns_by(h, idle) / gap.mean_within(h, idle) for h in horizons if idle + h <= DAY)
        assert 0.85 * best <= gap.index(idle) <= 1.001 * best


def test_the_index_of_a_session_that_is_late_falls_and_ends_at_zero() -> None:
    gap = Gap(GAPS.log_normal(5, 1.0), 0.05)
    indices = [gap.index(idle) for idle in (5, 50, 500, 5000, DAY, 2 * DAY)]
    assert indices == sorted(indices, reverse=True)
    assert indices[-1] == indices[-2] == 0


@pytest.mark.parametrize("median", [1.0, 20.0, 400.0])
def test_the_curve_that_an_engine_is_told_is_the_index_at_the_start_of_each_bin(median: float) -> None:
    gap = Gap(GAPS.log_normal(median, 1.2), 0.1)
    curve = gap.curve()
    for edge in GAPS.edges[:-1]:
        assert curve.index(edge * 1.0001) == pytest.approx(gap.index(edge), rel=0.02, abs=1e-4)
    assert len(curve.values) == 4 * GAPS.count


# Output lengths.


def test_an_answer_s_length_depends_on_role_and_session() -> None:
    estimates = Estimates()
    for _ in range(200):
        estimates.output(place(role="terse"), 20)
        estimates.output(place(role="verbose"), 2000)
    assert estimates.output_tokens(place(role="terse")).quantile(0.5) < 60
    assert estimates.output_tokens(place(role="verbose")).quantile(0.5) > 1000
    past = AFTER_TOOL
    for _ in range(16):
        past = past.ended(TOOL, 8000)
    assert estimates.output_tokens(place(past, role="terse")).mean() > 1000


# Steps left.


def test_every_depth_lies_in_the_bin_that_starts_at_or_before_it() -> None:
    for depth in range(1, 5000):
        i = depth_bin(depth)
        assert STARTS[i] <= depth
        assert i == BINS - 1 or depth < STARTS[i + 1]


@pytest.mark.parametrize("depth", [0, 1, 7, 30, 5000])
def test_the_steps_left_are_those_of_a_walk_through_the_chances(depth: int) -> None:
    hazards = [0.02 + 0.01 * (i % 5) for i in range(BINS)]
    left = StepsLeft(hazards, depth, 0.1)
    alive, total, quantiles = 0.9, 0.0, {0.05: 0, 0.5: None, 0.9: None}
    for step in range(1, 2000):
        total += alive
        alive *= 1 - hazards[depth_bin(depth + step)]
        for q in quantiles:
            if quantiles[q] is None and alive <= 1 - q:
                quantiles[q] = step
    assert left.mean() == pytest.approx(total, rel=1e-6)
    assert {q: left.quantile(q) for q in quantiles} == quantiles


def test_sessions_of_one_length_are_foreseen() -> None:
    estimates = Estimates()
    for _ in range(150):
        past = Past()
        for step in range(1, 6):
            past = past.ended(TOOL, 100)
            estimates.never(place(past)) if step == 5 else estimates.returned(place(past), 3)
            past = past.returned(3)
    for step in range(1, 4):
        past = Past(steps=step, stop=TOOL, before=TOOL)
        assert estimates.steps_left(place(past)).quantile(0.5) == 5 - step
    assert estimates.steps_left(place(Past())).quantile(0.5) == 5
    assert estimates.steps_left(place(role="new")).mean() == pytest.approx(4, abs=1.5)  # one in five ends


# Calibration, bounds, restart.


def play(estimates: Estimates, sessions: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(sessions):
        past, own = Past(), draw.gauss(2, 0.7)
        while True:
            tokens = round(math.exp(draw.gauss(5, 1)))
            estimates.output(place(past), tokens)
            past = past.ended(TOOL if draw.random() < 0.9 else END, tokens)
            if draw.random() < 0.05:
                estimates.never(place(past))
                break
            seconds = math.exp(draw.gauss(own, 0.8))
            estimates.returned(place(past), seconds)
            past = past.returned(seconds)


def test_predictions_are_calibrated_once_taught() -> None:
    estimates = Estimates()
    play(estimates, 300, 1)
    scores = estimates.calibration()
    for name in ("gap", "output"):
        assert scores[f"{name}_below_p50_ratio"] == pytest.approx(0.5, abs=0.05)
        assert scores[f"{name}_below_p90_ratio"] == pytest.approx(0.9, abs=0.03)
        assert scores[f"{name}_below_p99_ratio"] == pytest.approx(0.99, abs=0.01)
        assert 0 < scores[f"{name}_log_error"] < 1
    assert scores["never_brier"] < 0.06
    assert 0 < scores["steps_left_error"] < 30
    assert scores["steps_left_error_ratio"] > 0


def test_nothing_is_scored_before_it_happens() -> None:
    estimates = Estimates()
    estimates.gap(place()).index(3)
    assert estimates.calibration() == {}


def test_what_was_learned_survives_a_restart_as_json() -> None:
    estimates, other = Estimates(), Estimates()
    play(estimates, 50, 2)
    other.load(json.loads(json.dumps(estimates.dump())))
    for past in (Past(), AFTER_TOOL, AFTER_END, AFTER_TOOL.returned(9)):
        assert list(other.gap(place(past)).spread.cdf) == pytest.approx(
            list(estimates.gap(place(past)).spread.cdf), abs=0.02
        )
        assert other.gap(place(past)).never == pytest.approx(estimates.gap(place(past)).never)
        assert other.steps_left(place(past)).mean() == pytest.approx(estimates.steps_left(place(past)).mean())
        assert other.output_tokens(place(past)).mean() == pytest.approx(
            estimates.output_tokens(place(past)).mean(), rel=0.05
        )


@pytest.mark.parametrize(
    "change",
    [
        {"layout": 0},
        {"lengths": [[0, 0], ["t", "r", [1.0]]]},
        {"never": [[["tool"], 2, 1]]},
        {"gaps": None},
        {"gaps": [1]},
    ],
)
def test_a_dump_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    estimates = taught(300, 50, place())
    before = estimates.dump()
    with pytest.raises(ValueError, match=r"layout|lengths|of"):
        estimates.load(Estimates().dump() | change)
    assert estimates.dump() == before


def test_memory_is_bounded_whatever_clients_call_themselves() -> None:
    estimates = Estimates(keys=50)
    for i in range(500):
        where = place(AFTER_TOOL, f"tool-{i}", role=f"role-{i}")
        estimates.output(where, 10)
        estimates.returned(where, 1)
        estimates.never(where)
    assert len(estimates._gaps) == len(estimates._outputs) == len(estimates._never) == 50
    assert len(estimates._lengths._roles) == 50
