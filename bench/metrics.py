"""The figures of one cell, from what was written down of its calls and runs. One definition for real and simulated.

All calls and runs that are counted:

- The window is what the player says: in a closed loop from when every slot has turned over once until the supply ends.
- Counted runs are those that are not warm. A run that was cut off counts as at least as long as it lasted until then.
- A call that failed counts as the client's timeout: that is its TTFT, and its run counts as at least its unloaded time
  and one timeout for each such call, so that failing early gains nothing. Where the unloaded time is not known, it
  counts as the time it took and those timeouts.
- A call that was cut off before its first token has at least the TTFT that it had waited by then.

The figures (seconds, tokens; None where nothing was counted):

- `session_seconds_mean|p50|p95`: first call sent to last call done of the counted runs, gaps and holds included.
- `ttft_seconds_p50|p99`: call sent to first chunk, holds included, of the calls sent in the window.
- `worst_turn_seconds_p50|p90|max`: the largest TTFT of each counted run.
- `turns_per_second`, `output_tokens_per_second`: of the calls that finished in the window, over its length.
- `hit_ratio`: cached and hosted tokens over prompt tokens of those calls, each call once.
- `ideal_hit_ratio`: what a cache without limit would have had, over the same prompt tokens.
- `recomputed_tokens`: what the finished calls of the counted runs computed although a cache without limit would have
  had it, in all. Not of the window: a seed gives every system the same runs, so that the sums are of the same calls.
- `longest_hold_seconds`: the longest that any call was held in front of the engines, of those where it is known.
- `slo_attainment`: the share of counted runs that finished within 1.5 times their unloaded time, none of their calls
  failed. Runs cut off before that time was over are left out, and those whose unloaded time is not known.
- `errors`: calls that failed, of all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.records import CallRecord, Played, RunRecord

TIMEOUT = 600.0
"""Seconds a client waits for an answer where the player does not say (`extra["timeout"]`): the OpenAI SDK's default."""

SLACK = 1.5
DIGITS = 6

Metrics = dict[str, float | None]

NAMES = (
    "session_seconds_mean", "session_seconds_p50", "session_seconds_p95", "ttft_seconds_p50", "ttft_seconds_p99",
    "worst_turn_seconds_p50", "worst_turn_seconds_p90", "worst_turn_seconds_max", "turns_per_second",
    "output_tokens_per_second", "hit_ratio", "ideal_hit_ratio", "recomputed_tokens", "longest_hold_seconds",
    "slo_attainment", "errors",
)  # fmt: skip
"""The figures that every cell has."""


def measure(played: Played) -> Metrics:
    """The figures of one cell, rounded to six significant digits."""
    timeout = played.extra.get("timeout", TIMEOUT)
    of_run = _of_run(played.calls)
    begin, end = played.window
    ends = {run.run: end if run.until is None else run.until for run in played.runs}
    counted = [run for run in played.runs if not run.warm]
    seconds = [_seconds(run, of_run[run.run], end, timeout) for run in counted]
    sent = [call for call in played.calls if begin <= call.sent <= end]
    waits = [_first_token(call, ends.get(call.run, end), timeout) for call in sent]
    worst = [
        max(_first_token(call, ends[run.run], timeout) for call in of_run[run.run])
        for run in counted
        if of_run[run.run]
    ]
    done = [c for c in played.calls if c.error is None and c.finished is not None and begin <= c.finished <= end]
    made: Metrics = {
        "session_seconds_mean": mean(seconds),
        "session_seconds_p50": percentile(seconds, 50),
        "session_seconds_p95": percentile(seconds, 95),
        "ttft_seconds_p50": percentile(waits, 50),
        "ttft_seconds_p99": percentile(waits, 99),
        "worst_turn_seconds_p50": percentile(worst, 50),
        "worst_turn_seconds_p90": percentile(worst, 90),
        "worst_turn_seconds_max": max(worst, default=None),
        "turns_per_second": _share(len(done), end - begin),
        "output_tokens_per_second": _share(sum(call.output for call in done), end - begin),
        **_cache(done),
        "recomputed_tokens": _recomputed(call for run in counted for call in of_run[run.run]),
        "longest_hold_seconds": max((call.held for call in played.calls if call.held is not None), default=None),
        "slo_attainment": _attained(counted, of_run, end),
        "errors": sum(call.error is not None for call in played.calls),
    }
    return {name: rounded(value) for name, value in made.items()}


def in_time(played: Played, tenants: str) -> float | None:
    """`slo_attainment` of the tenants whose names begin so; None where none of their runs was counted."""
    runs = [run for run in played.runs if run.tenant.startswith(tenants)]
    names = {run.run for run in runs}
    calls = [call for call in played.calls if call.run in names]
    return measure(replace(played, runs=runs, calls=calls))["slo_attainment"]


def hourly(played: Played) -> float:
    """Runs an hour that ended in the window."""
    begin, end = played.window
    return 3600 * sum(begin <= (run.finished or 0.0) <= end for run in played.runs) / (end - begin)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile by linear interpolation between the two nearest of n sorted values, at (n - 1) percent / 100."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean, exactly summed."""
    return math.fsum(values) / len(values) if values else None


def rounded(value: float | None) -> float | None:
    """Six significant digits; whole numbers stay whole."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}")


def _of_run(calls: Iterable[CallRecord]) -> dict[str, list[CallRecord]]:
    found: dict[str, list[CallRecord]] = defaultdict(list)
    for call in calls:
        found[call.run].append(call)
    return found


def _seconds(run: RunRecord, calls: Sequence[CallRecord], end: float, timeout: float) -> float:
    elapsed = _elapsed(run, end)
    failed = sum(call.error is not None for call in calls)
    if not failed:
        return elapsed
    if run.unloaded is None:
        return elapsed + failed * timeout
    return max(elapsed, run.unloaded + failed * timeout)


def _elapsed(run: RunRecord, end: float) -> float:
    if run.finished is not None:
        return run.finished - run.started
    return max(0.0, (end if run.until is None else run.until) - run.started)


def _first_token(call: CallRecord, cut: float, timeout: float) -> float:
    if call.error is not None:
        return timeout
    return (max(cut, call.sent) if call.first_token is None else call.first_token) - call.sent


def _cache(done: Sequence[CallRecord]) -> Metrics:
    prompt = sum(call.prompt for call in done)
    return {
        "hit_ratio": _share(sum(call.cached + call.hosted for call in done), prompt),
        "ideal_hit_ratio": _share(sum(call.ideal for call in done), prompt),
    }


def _recomputed(calls: Iterable[CallRecord]) -> int:
    ended = (call for call in calls if call.error is None and call.finished is not None)
    return sum(max(0, call.ideal - call.cached - call.hosted) for call in ended)


def _attained(counted: Sequence[RunRecord], of_run: dict[str, list[CallRecord]], end: float) -> float | None:
    known, good = 0, 0
    for run in counted:
        if run.unloaded is None:
            continue
        late = _elapsed(run, end) > SLACK * run.unloaded
        failed = any(call.error is not None for call in of_run[run.run])
        if run.finished is None and not late and not failed:
            continue
        known += 1
        good += not late and not failed
    return _share(good, known)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
