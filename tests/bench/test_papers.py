"""The papers' comparisons: what is played, and what stands in the tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench import papers
from bench.papers import CLASSES, CODING, TENANTS, Case, cases, play, tables, tenants
from bench.workloads import catalog
from tests.bench.test_sessions import write
from tests.bench.workloads.test_mini_swe_agent import grown


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "t.tar.xz", {"a": grown("x", 9), "b": grown("y", 7)})


def test_ten_tenants_share_the_runs_by_class_and_nothing_else(trace: Path) -> None:
    made = tenants(catalog.load(CODING, trace, 1, **papers.WHOLE), 1)
    kinds = Counter(run.tenant.partition("-")[0] for run in made.runs)
    assert {kind: count / len(made.runs) for kind, count in kinds.items()} == {k: s for k, (_, s) in CLASSES.items()}
    assert len(made.runs) == papers.OPEN_RUNS * papers.TENANT_SUPPLY
    assert len({run.tenant for run in made.runs}) == 10
    own = [piece for run in made.runs for piece in {p for c in run.calls for p in c.prompt.path()} if not piece.shared]
    assert len(own) == len(set(own))


def test_every_class_of_tenants_has_its_share_in_time(trace: Path) -> None:
    profile = replace(papers.L70, kv_tokens=4096)
    found = play(Case("tenants", "stock", TENANTS, profile, 1, 1), trace)
    assert set(found["in_time"]) == set(CLASSES)
    assert all(0.0 <= share <= 1.0 for share in found["in_time"].values())


def test_where_lru_evicts_each_agent_just_before_its_turn_foresight_is_faster(trace: Path) -> None:
    """E1, a tenth of its size: ten agents, room for six."""
    small = replace(papers.H100_32B, kv_tokens=2560)
    case = Case("e1", "stock", "w1", small, 1, 1, live=1, options=(("fixed", 410), ("runs", 10)), supply=5, tier=1.0)
    seconds = {}
    for name in ("stock", "kvflow"):
        figures = play(replace(case, system=name), trace)["metrics"]
        seconds[name] = figures["session_seconds_mean"]
    assert seconds["kvflow"] < seconds["stock"]


def test_each_table_has_every_system_beside_what_was_published() -> None:
    rows = []
    for number, case in enumerate(cases([1, 2])):
        figures = {"session_seconds_mean": 10.0 + number % 7, "recomputed_tokens": 5.0, "slo_attainment": 0.5}
        rows.append((case, {"metrics": figures, "in_time": dict.fromkeys(CLASSES, 0.25)}))
    text = "\n".join(tables(rows))
    assert all(f"`{name}`" in text for name in {case.system for case in cases([1])})
    for published in ("3.01", "1.47", "2.84", "99.2", "1.42 / 1.24", "2.19"):
        assert published in text
    assert "25.0 %" in text
