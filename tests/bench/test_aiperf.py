"""AIPerf's files: what we write for it, and what is read of its own."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from bench.aiperf import OURS, THEIRS, lines, played, reported, table
from bench.errors import BenchError
from bench.rivals.texts import Texts
from bench.workloads import catalog
from tests.bench import records
from tests.bench.test_sessions import write
from tests.bench.workloads.test_mini_swe_agent import grown

TEXTS = Texts(word=1.0, message=4.0, tail=3)


def test_a_session_becomes_its_turns_with_the_bodies_that_our_player_sends(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.tar.xz", {"a": grown("x", 6), "b": grown("y", 5)})
    runs = catalog.load("mini-swe-agent", trace, 1).runs
    rows = [orjson.loads(line) for line in lines(runs, TEXTS, "m")]
    assert [row["session_id"] for row in rows] == ["a"] * 6 + ["b"] * 5
    calls = [call for run in runs for call in run.calls]
    assert [row["payload"]["max_tokens"] for row in rows] == [call.output for call in calls]
    assert all(row["payload"]["stream"] and row["payload"]["stream_options"]["include_usage"] for row in rows)
    assert ["delay" in row for row in rows] == [bool(call.after) for call in calls]
    assert rows[1]["delay"] == pytest.approx(1000 * calls[1].gap)
    assert rows[1]["payload"]["messages"][: len(rows[0]["payload"]["messages"])] == rows[0]["payload"]["messages"]


def test_a_run_with_sub_agents_is_no_list_of_turns() -> None:
    for name in ("parallel-tools", "w1"):
        with pytest.raises(BenchError, match="no list of turns"):
            list(lines(catalog.load(name, seed=1).runs, TEXTS, "m"))


def test_the_figures_of_both_players_are_of_the_same_things(tmp_path: Path) -> None:
    """Two sessions, a second apart: calls of two seconds whose first token takes half a second."""
    calls = [
        records.call(run, start, start + 0.4, start + 2.0, prompt=100, output=10, cached=60, first_text=start + 0.5)
        for run, start in (("a", 0.0), ("a", 3.0), ("b", 1.0))
    ]
    ours = played(records.played(calls, [records.run("a", 0.0, 5.0), records.run("b", 1.0, 3.0)]))
    values = {"usage_prompt_tokens": 100, "usage_completion_tokens": 10, "usage_prompt_cache_read_tokens": 60}
    rows = [
        {
            "metadata": {
                "conversation_id": call.run, "request_start_ns": call.sent * 1e9, "request_end_ns": call.finished * 1e9,
            },
            "metrics": {tag: {"value": value, "unit": "tokens"} for tag, value in values.items()},
        }
        for call in calls
        if call.finished is not None
    ]  # fmt: skip
    (tmp_path / "profile_export.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "time_to_first_token": {"unit": "ms", "avg": 500.0, "p50": 500.0, "p90": 500.0, "p99": 500.0},
        "request_latency": {"unit": "ms", "avg": 2000.0, "p50": 2000.0, "p99": 2000.0},
        "request_throughput": {"unit": "requests/sec", "avg": 3 / 5},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 30 / 5},
    }
    (tmp_path / "profile_export_aiperf.json").write_text(json.dumps(summary))
    theirs = reported(tmp_path)
    assert theirs == pytest.approx(ours)
    assert ours["session_mean"] == pytest.approx(3.5)
    assert "| text_p50 | 0.5 | 0.5 | 1.000 |" in table({OURS: [ours], THEIRS: [theirs]})
