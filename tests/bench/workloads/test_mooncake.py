from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from bench.workloads.mooncake import load
from bench.workloads.runs import common


def row(time: int, tokens: int, ids: list[int], output: int = 100) -> dict[str, Any]:
    return {"timestamp": time, "input_length": tokens, "output_length": output, "hash_ids": ids}


ROWS = [
    row(0, 1300, [0, 1, 2]),
    row(1000, 900, [0, 5]),
    row(30_000, 2000, [0, 1, 6, 7]),
    row(40_000, 950, [0, 8]),
    row(50_000, 1200, [0, 1, 9]),
    row(90_000, 2600, [0, 1, 6, 10, 11, 12]),
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    data = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.xz"])
def test_requests_that_extend_one_another_are_a_run_with_its_arrival(tmp_path: Path, name: str) -> None:
    runs = load(write(tmp_path / name)).runs
    assert [[call.prompt.end for call in run.calls] for run in runs] == [[1300, 2000, 2600], [900], [950], [1200]]
    assert [run.arrival for run in runs] == [0, 1, 40, 50]
    assert [call.gap for call in runs[0].calls] == [0, 30, 60]
    assert common(runs[0].calls[0].prompt, runs[0].calls[1].prompt) == 1300
    assert common(runs[0].calls[1].prompt, runs[0].calls[2].prompt) == 2000
    assert [call.answer and call.answer.tokens for call in runs[0].calls] == [100, 100, None]
    assert common(runs[0].calls[2].prompt, runs[3].calls[0].prompt) == 1024


def test_the_block_that_all_have_is_shared(tmp_path: Path) -> None:
    runs = load(write(tmp_path / "t.jsonl")).runs
    system = runs[0].calls[0].prompt.path()[0]
    assert (system.tokens, system.shared, system.speaker) == (512, True, "system")
    assert all(run.calls[0].prompt.path()[0] is system for run in runs)
    assert not any(piece.shared for piece in runs[1].calls[0].prompt.path()[1:])


def test_speed_and_scale_divide_times_and_lengths(tmp_path: Path) -> None:
    runs = load(write(tmp_path / "t.jsonl"), speed=10, scale=100).runs
    assert [call.prompt.end for call in runs[0].calls] == [13, 20, 26]
    assert [call.gap for call in runs[0].calls] == [0, 3, 6]
    assert runs[1].arrival == 0.1


def test_long_chains_are_left_out_and_counted(tmp_path: Path) -> None:
    found = load(write(tmp_path / "t.jsonl"), max_context=1500)
    assert [[call.prompt.end for call in run.calls] for run in found.runs] == [[900], [950], [1200]]
    assert found.left_out == {"longer than max_context": 1}


@pytest.mark.parametrize("bad", [{"timestamp": 1}, row(0, 2000, [0]), {**row(0, 1, []), "input_length": "x"}])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"t\.jsonl: line 2: not a Mooncake request"):
        load(write(tmp_path / "t.jsonl", [ROWS[0], bad]))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl")
    path.write_text(path.read_text() + "\n{")
    with pytest.raises(ValueError, match=r"t\.jsonl: line 7: not JSON"):
        load(path)
