from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.metrics import NAMES, TIMEOUT, measure, percentile
from tests.bench.records import call, played, run


def test_exactly_the_named_figures_are_made() -> None:
    figures = measure(played([call("a", 0, 1, 5)], [run("a", 0, 5)]))
    assert tuple(figures) == NAMES
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_session_lasts_from_its_first_call_to_its_last_and_warm_ones_do_not_count() -> None:
    runs = [run("a", 10, 20), run("b", 10, 40), run("warm", 0, 99, warm=True)]
    figures = measure(played([], runs))
    assert (figures["session_seconds_mean"], figures["session_seconds_p50"]) == (20, 20)
    assert figures["session_seconds_p95"] == 29  # 10 + 0.95 * 20


def test_a_run_that_was_cut_off_counts_as_long_as_it_lasted() -> None:
    assert measure(played([], [run("a", 10, None, until=70.0)]))["session_seconds_mean"] == 60
    assert measure(played([], [run("a", 10, None)]))["session_seconds_mean"] == 90


def test_a_failed_call_counts_as_the_clients_timeout_however_early_it_failed() -> None:
    calls = [call("a", 0, None, None, error="500"), call("b", 0, 1, 10)]
    figures = measure(played(calls, [run("a", 0, 2), run("b", 0, 10)]))
    assert figures["worst_turn_seconds_max"] == TIMEOUT
    assert figures["session_seconds_mean"] == (10 + TIMEOUT + 10) / 2
    assert (figures["errors"], figures["slo_attainment"]) == (1, 0.5)


def test_the_player_may_say_what_the_clients_timeout_is() -> None:
    what = played([call("a", 0, None, None, error="x")], [run("a", 0, 2)])
    what.extra["timeout"] = 30.0
    assert measure(what)["ttft_seconds_p50"] == 30


def test_ttft_is_of_the_calls_sent_in_the_window_and_one_without_token_waits_till_it_is_cut_off() -> None:
    calls = [call("a", 5, 50, 60), call("a", 20, 22, 30), call("b", 90, None, None)]
    figures = measure(played(calls, [run("a", 0, 60), run("b", 90, None, until=96.0)], (10.0, 100.0)))
    assert figures["ttft_seconds_p50"] == 4
    assert figures["ttft_seconds_p99"] == pytest.approx(5.96)


def test_the_worst_turn_is_a_runs_largest_ttft_holds_included() -> None:
    calls = [call("a", 0, 1, 2), call("a", 2, 9, 10, held=5.0), call("b", 0, 3, 4), call("c", 0, 40, 41)]
    runs = [run("a", 0, 10), run("b", 0, 4), run("c", 0, 41, warm=True)]
    figures = measure(played(calls, runs))
    assert (figures["worst_turn_seconds_p50"], figures["worst_turn_seconds_max"]) == (5, 7)
    assert figures["worst_turn_seconds_p90"] == pytest.approx(6.6)
    assert figures["longest_hold_seconds"] == 5


def test_rates_count_what_finished_in_the_window() -> None:
    calls = [call("a", 0, 1, 5), call("a", 5, 6, 15, output=30), call("b", 12, 13, 110)]
    figures = measure(played(calls, [run("a", 0, 15), run("b", 12, 110)], (10.0, 20.0)))
    assert (figures["turns_per_second"], figures["output_tokens_per_second"]) == (0.1, 3)


def test_hits_are_cached_and_hosted_tokens_over_prompts_each_call_once() -> None:
    calls = [
        call("a", 0, 1, 5, prompt=100, ideal=0),
        call("a", 5, 6, 9, prompt=300, ideal=100, cached=60, hosted=20),
        call("a", 9, 10, 12, prompt=400, ideal=300, cached=320),
        call("b", 9, None, None, prompt=999, error="gone"),
    ]
    figures = measure(played(calls, [run("a", 0, 12), run("b", 9, None)]))
    assert (figures["hit_ratio"], figures["ideal_hit_ratio"]) == (0.5, 0.5)
    assert figures["recomputed_tokens"] == 20  # what a call had beyond the ideal makes up for no other


def test_recomputed_tokens_are_of_all_counted_runs_and_not_of_the_window() -> None:
    calls = [
        call("warm", 20, 21, 25, ideal=70),
        call("a", 20, 21, 25, ideal=50, cached=20),
        call("a", 30, 31, 90, ideal=50),
    ]
    what = played(calls, [run("warm", 0, 25, warm=True), run("a", 20, 90)], (10.0, 60.0))
    assert measure(what)["recomputed_tokens"] == 30 + 50


def test_where_nobody_knows_how_long_a_run_takes_alone_the_objective_is_unknown() -> None:
    calls = [call("a", 0, None, None, error="gone")]
    figures = measure(played(calls, [run("a", 0, 4, unloaded=None), run("b", 0, 10, unloaded=None)]))
    assert figures["slo_attainment"] is None
    assert figures["session_seconds_mean"] == (4 + TIMEOUT + 10) / 2
    some = measure(played(calls, [run("a", 0, 4, unloaded=None), run("b", 0, 10)]))
    assert some["slo_attainment"] == 1


def test_the_longest_hold_is_of_the_calls_whose_hold_is_known() -> None:
    seen, hidden = call("a", 0, 1, 2, held=3.0), call("a", 2, 9, 10, held=None)
    assert measure(played([seen, hidden], [run("a", 0, 10)]))["longest_hold_seconds"] == 3
    assert measure(played([hidden], [run("a", 0, 10)]))["longest_hold_seconds"] is None


def test_the_objective_is_one_and_a_half_times_the_unloaded_time() -> None:
    runs = [run("a", 0, 15), run("b", 0, 15.1), run("c", 0, 8)]
    assert measure(played([], runs))["slo_attainment"] == pytest.approx(0.666667)


def test_a_run_cut_off_early_says_nothing_of_the_objective_and_one_cut_off_late_missed_it() -> None:
    runs = [run("a", 0, 10), run("young", 95, None, until=99.0), run("old", 0, None, until=99.0)]
    assert measure(played([], runs))["slo_attainment"] == 0.5


def test_nothing_counted_has_no_figure_rather_than_a_zero() -> None:
    figures = measure(played([], [], (5.0, 5.0)))
    nothing = [name for name in NAMES if figures[name] is None]
    assert {"session_seconds_mean", "ttft_seconds_p99", "turns_per_second", "hit_ratio", "slo_attainment"} <= {*nothing}
    assert figures["errors"] == 0


def test_figures_have_six_significant_digits() -> None:
    figures = measure(played([call("a", 0, 1 / 3, 2)], [run("a", 0, 2)]))
    assert figures["ttft_seconds_p50"] == 0.333333


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_interpolate_as_the_standard_library_does(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 95, 99):
        found = percentile(values, percent)
        assert found is not None
        assert math.isclose(found, cuts[percent - 1], rel_tol=1e-9, abs_tol=1e-6)


def test_a_single_value_is_every_percentile() -> None:
    assert percentile([3.0], 99) == 3
    assert percentile([], 50) is None
