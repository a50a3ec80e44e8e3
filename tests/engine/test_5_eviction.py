"""The owners' order inside real vLLM, against stock vLLM doing the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from server import embedded
from tests.engine import trouble
from tests.engine.cycle import AGENTS, BLOCK, TOKENS

ROOT = Path(__file__).parents[2]


def played(game: str, model: Path, *arguments: object) -> dict[str, Any]:
    """What a module of `tests.engine` says, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", f"tests.engine.{game}", str(model), *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_of_agents_in_turn_lru_finds_nothing_and_the_declared_order_what_belady_would(home: Path) -> None:
    model, room = embedded.ensure(home), 4
    stock, ours = (played("cycle", model, mode, room) for mode in ("stock", "declared"))
    most = TOKENS - BLOCK  # of a prompt that lies in the cache as a whole, the last block is computed all the same
    best = (room - 1) / (AGENTS - 1)
    assert sum(stock["found"]) == 0
    assert sum(ours["found"]) / (most * len(ours["found"])) >= 0.95 * best
    assert stock["outputs"] == ours["outputs"]


def test_preemption_abort_and_resets_leave_nothing_behind_and_nothing_stale_is_read(home: Path) -> None:
    model = embedded.ensure(home)
    stock, ours = (played("trouble", model, mode) for mode in ("stock", "ours"))
    assert min(stock["preempted"], ours["preempted"]) > 0
    nothing = [0, 0, 0]
    assert stock["audits"] == ours["audits"] == [nothing, False, nothing, True, nothing, True, nothing]
    assert ours["found"] == stock["found"]
    most = trouble.TOKENS - trouble.BLOCK
    assert [found for found, _ in ours["found"]][1:] == [most, 0, most]
    assert (ours["steps"], ours["why"]) == (0, [])
