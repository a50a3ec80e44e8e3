"""The owners' order inside real vLLM, against stock vLLM doing the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server import embedded
from tests.engine import trouble

ROOT = Path(__file__).parents[2]


ENV = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def ran(module: str, *arguments: object, **env: str) -> str:
    """What a module prints, in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENV, **env}, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def played(game: str, model: Path, *arguments: object) -> dict[str, Any]:
    """What a module of `tests.engine` says."""
    return json.loads(ran(f"tests.engine.{game}", model, *arguments).splitlines()[-1])


def test_of_agents_in_turn_lru_finds_nothing_and_the_order_learned_from_two_loops_what_belady_would(
    home: Path, tmp_path: Path
) -> None:
    """KVFlow's case with the real core: nothing is declared, the clients name their run."""
    embedded.ensure(home)
    (tmp_path / "weft").symlink_to(home)
    agents, room, loops, fixed = 8, 4, 8, 224
    options = f"agents={agents},passes={loops},fixed={fixed},dynamic=32,output=2"
    share = room * 9 * 32 / (agents * (fixed + 32 * loops)) + 1e-6
    settings = (
        "--workload", "w2", "--options", options, "--runs", 1, "--room", share, "--modes", "stock,weft-named",
    )  # fmt: skip
    for out, more in ("whole", ()), ("modelless", ("--no-model",)):
        ran("bench.sequence", *settings, *more, "--out", tmp_path / out, XDG_CACHE_HOME=str(tmp_path))
    told, modelless = (json.loads((tmp_path / out / "sequence.json").read_text()) for out in ("whole", "modelless"))
    assert modelless["calls"] == told["calls"], "without a model as much is found"
    found = {name.partition(",")[0]: [call[1] for call in calls] for name, calls in told["calls"].items()}
    assert sum(found["stock"]) == 0
    late = found["weft-named"][2 * agents :]
    assert sum(late) / (fixed * len(late)) >= 0.95 * (room - 1) / (agents - 1)
    assert {row["same"] for row in told["rows"]} == {agents * loops}


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


@pytest.mark.proof
@pytest.mark.parametrize("mode", ["ours", "tier"])
def test_under_concurrency_answers_differ_from_stock_only_where_two_tokens_were_as_likely(
    home: Path, mode: str
) -> None:
    """Batches differ, so sums are rounded otherwise: the first difference of a call is a near tie, or there is none."""
    model = embedded.ensure(home)
    stock, ours = played("together", model, "stock"), played("together", model, mode)
    assert stock.keys() == ours.keys()
    gaps = []
    for name, (_, tokens, sure) in stock.items():
        _, others, _ = ours[name]
        first = next((at for at, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1]), None)
        if first is not None:
            gaps.append(sure[first][0] - sure[first][1])
    found = [sum(call[0] for call in calls.values()) for calls in (stock, ours)]
    print(f"{mode}: {len(stock)} calls, {len(gaps)} differ, by at most {max(gaps, default=0):.2g}; found {found}")
    assert all(gap <= 1e-3 for gap in gaps)
