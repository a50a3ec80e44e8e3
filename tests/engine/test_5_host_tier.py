"""The host tier inside real vLLM on the CPU, with copies that take as long as a link would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server import embedded

ROOT = Path(__file__).parents[2]


def played(home: Path, *mode: str) -> dict:
    """What `tests.engine.tier` says, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.engine.tier", str(embedded.ensure(home)), *mode]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3500, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_sessions_find_all_they_wrote_on_the_host_and_go_on_as_without_it(home: Path) -> None:
    ours, none = played(home, "turns"), played(home, "none")
    assert ours["outputs"] == none["outputs"]
    assert sum(found for _, found in none["cached"]) == 0
    # Generated tokens as well as prompts: all full blocks of the turn before.
    assert all(found == whole for whole, found in ours["cached"])


def test_a_small_tier_and_the_device_keep_together_what_neither_could_with_the_next_agent_prefetched(
    home: Path,
) -> None:
    play = played(home, "small")
    assert sum(play["found"]) >= 0.82 * play["most"] * len(play["found"])
    gauges = play["gauges"]
    assert gauges["prefetch_used_total"] > 0.8 * gauges["prefetch_blocks_total"] > 0
    assert gauges["host_saves_total"] > 0


@pytest.mark.parametrize("examples", ["10", pytest.param("200", marks=pytest.mark.proof)])
def test_nothing_is_lost_doubled_or_read_before_it_is_loaded_whatever_happens(home: Path, examples: str) -> None:
    play = played(home, "machine", examples)
    gauges = play["gauges"]
    assert min(play[what] for what in ("ended", "aborts", "resets", "preempted", "filled")) > 0
    assert gauges["host_ranked"] == 1
    assert min(gauges[f"{what}_total"] for what in ("host_late_saves", "prefetch_used")) > 0
    assert play["race"]["same"]
    assert play["race"]["cached"] > 0
    assert play["race"]["used"] > 0
