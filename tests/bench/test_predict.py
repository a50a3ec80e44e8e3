from __future__ import annotations

import io
import json
import lzma
import math
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bench.estimators import LogNormal, Markov, Saga, Weft, empirical, geometric
from bench.predict import (
    ARRIVAL,
    GONE,
    Call,
    Scores,
    Session,
    auc,
    events,
    gap_of,
    halves,
    main,
    play,
    read_trace,
    report,
)
from scheduler.estimates import Estimates, Past, Place


def request(t: float, out: int, stop: str = "tool_use", **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "model": "m", "in": 1000, "out": out, "stop": stop, "api_time": 2.0} | more


def made_session(seed: int) -> list[dict[str, Any]]:
    draw, t, rows = random.Random(seed), 0.0, []
    for _ in range(draw.randint(3, 12)):
        rows.append(request(t, draw.randint(20, 800), draw.choice(["tool_use", "tool_use", "end_turn"])))
        t = round(t + 2 + math.exp(draw.gauss(2, 1)))
    return rows


def write(path: Path, sessions: dict[str, list[dict[str, Any]]]) -> Path:
    with lzma.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, rows in sessions.items():
            data = json.dumps({"id": name, "requests": rows}).encode()
            member = tarfile.TarInfo(f"made/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_sub_agent_is_a_session_of_its_own_at_its_own_time(tmp_path: Path) -> None:
    agent = {
        "t": 10.0,
        "type": "subagent",
        "subagent_type": "Explore",
        "requests": [request(1, 5), request(4, 6, "end_turn")],
    }
    path = write(tmp_path / "t.tar.xz", {"a": [request(0, 1), agent, request(30, 2, "end_turn")]})
    [(name, [main_session, explore])] = read_trace(path)
    assert name == "made/a.json"
    assert [(c.start, c.end, c.tokens, c.stop, c.role) for c in explore] == [
        (11, 13, 5, "tool", "Explore/m"),
        (14, 16, 6, "end", "Explore/m"),
    ]
    assert [c.start for c in main_session] == [0, 30]


def test_copies_are_left_out_and_the_rest_is_halved_by_place_in_the_sorted_names(tmp_path: Path) -> None:
    first = made_session(1)
    sessions = {"d": made_session(4), "b": [*first, request(1e4, 5)], "a": first, "c": made_session(3)}
    half_a, half_b, copies = halves(read_trace(write(tmp_path / "t.tar.xz", sessions)))
    assert copies == 1
    assert [s.file for s in half_a] == ["made/c.json"]
    assert [s.file for s in half_b] == ["made/b.json", "made/d.json"]


def calls(*times: tuple[float, float | None]) -> list[Call]:
    return [Call(start, end, 10, "tool", "r") for start, end in times]


def test_events_come_in_order_of_time_and_a_session_s_own_stay_in_their_order() -> None:
    slow = Session("a", 0.0, calls((0, 5), (4, 9), (20, None)))
    found = events([slow, Session("b", 3.0, calls((0, 1)))])
    assert found == sorted(found)
    assert [(i, what) for _, number, i, what in found if number == 0] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (3, GONE),
    ]
    assert found[-1] == (20 + 3600, 0, 3, GONE)


def test_a_gap_is_known_only_after_a_recorded_end() -> None:
    session = Session("a", 0.0, calls((0, 5), (4, None), (20, 21)))
    assert gap_of(session, 1) == 0.01
    assert gap_of(session, 2) is None


class Spy(Markov):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def gap(self, place: Place) -> Any:
        self.log.append(("gap", place.past.steps))
        return super().gap(place)

    def returned(self, place: Place, seconds: float | None) -> None:
        self.log.append(("returned", place.past.steps))
        super().returned(place, seconds)

    def never(self, place: Place) -> None:
        self.log.append(("never", place.past.steps))
        super().never(place)


def test_everything_is_predicted_before_it_is_learned() -> None:
    spy = Spy()
    play([Session("a", 0.0, calls((0, 1), (5, 6)))], {"weft": spy}, Scores())
    told = [entry for i, entry in enumerate(spy.log) if entry not in spy.log[:i]]
    assert told == [("gap", 1), ("returned", 1), ("gap", 2), ("never", 2)]


def test_all_predictors_are_scored_on_the_same_truths() -> None:
    sessions = [Session(f"f{i}", 60.0 * i, calls((0, 1), (5, 6), (9, 10))) for i in range(6)]
    scores = Scores()
    predictors = {"weft": Weft(Estimates()), "markov": Markov(), "saga": Saga()}
    play(sessions, predictors, scores)
    for by in scores.sums.values():
        assert {who: {f: n for f, (_, n) in cells.items()} for who, cells in by.items()} == {
            who: {f: n for f, (_, n) in by["weft"].items()} for who in predictors
        }
    rows = report(scores)
    assert rows["gap CRPS"]["n"] == 12
    assert rows["never Brier"]["n"] == 18
    low, high = rows["gap CRPS"]["difference"]["saga"]
    assert low <= rows["gap CRPS"]["mean"]["weft"] - rows["gap CRPS"]["mean"]["saga"] <= high


def test_auc_counts_ties_half() -> None:
    assert auc([(0.1, False), (0.9, True)]) == 1
    assert auc([(0.5, False), (0.5, True)]) == 0.5
    assert auc([(0.9, False), (0.1, True)]) == 0


def test_the_rivals_estimate_what_they_should() -> None:
    assert empirical([1.0, 2.0, 3.0], 9.0)(0.5) == 2
    assert empirical([], 9.0)(0.5) == 9
    assert geometric(0.2, 0.1)(0.1) == 0
    assert geometric(0.0, 0.5)(0.74) == 2
    fit, draw = LogNormal(1, 10), random.Random(1)
    assert fit.quantile(0.95) == pytest.approx(10, rel=0.01)
    for _ in range(500):
        fit.add(math.exp(draw.gauss(3, 0.5)))
    assert fit.mu == pytest.approx(3, abs=0.5)
    assert fit.variance == pytest.approx(0.25, abs=0.15)
    assert Saga().steps_left(Place("t", "r", (), Past()))(0.5) == 20


def test_the_whole_runs_on_a_made_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.tar.xz", {f"s{i:02d}": made_session(i) for i in range(12)})
    main(["--traces", str(path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert set(result["runs"]) == {"B, taught by A", "B, cold", "A, cold"}
    assert result["sessions"] == {"A": 6, "B": 6}
    assert "| gap CRPS |" in capsys.readouterr().out
    assert ARRIVAL == 0
