from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
from pathlib import Path

import pytest

from bench.sessions import Answer, _common, read_trace, summary


def write(path: Path, sessions: dict[str, list[str]]) -> Path:
    with lzma.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, prompts in sessions.items():
            rows = [{"session_id": name, "input": prompt, "output": "out"} for prompt in prompts]
            random.Random(1).shuffle(rows)
            data = "\n".join(map(json.dumps, rows)).encode()
            member = tarfile.TarInfo(f"trace/{name}.jsonl")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_scrambled_session_is_read_in_the_order_it_grew(tmp_path: Path) -> None:
    prompts = ["a" * length for length in range(1, 9)]
    read = read_trace(write(tmp_path / "t.tar.xz", {"one": prompts, "two": ["b"]}))
    assert [prompt for prompt, _ in read["one"]] == prompts
    assert read["two"] == [("b", "out")]


def test_a_session_that_does_not_grow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not extend"):
        read_trace(write(tmp_path / "t.tar.xz", {"one": ["ab", "xyz"]}))


def test_the_summary_counts_what_missed() -> None:
    answers = [
        Answer("a", "w0", None, 100, 64, 64, 0.1, 1.0),
        Answer("a", "w1", None, 100, 0, 96, 0.2, 1.0),
        Answer("b", "w0", "boom", 0, 0, 0, 0.0, 1.0),
    ]
    told = summary(answers, 2.0)
    assert (told["calls"], told["errors"], told["calls_below_ideal"]) == (3, ["boom"], 1)
    assert (told["sessions"], told["sessions_on_one_worker"]) == (2, 1)
    assert (told["hit_ratio"], told["ideal_hit_ratio"]) == (0.32, 0.8)


def test_common_prefixes_are_counted_in_tokens() -> None:
    assert _common([], [1]) == 0
    assert _common([1, 2, 3], [1, 2, 4]) == 2
    assert _common([1, 2], [1, 2, 3]) == 2
