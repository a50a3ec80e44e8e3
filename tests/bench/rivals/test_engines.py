"""What the harness starts is confined, and gone when the harness is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.rivals.engines import BLOCK, Build, Engines, kv_bytes, length_for
from bench.rivals.isolation import Isolation
from bench.rivals.process import Process, descendants, environment
from bench.workloads.runs import Call, Piece, Run, Workload
from server import embedded
from server.engine import installed
from tests.bench.rivals.runs import workload


async def started(tmp_path: Path, script: str) -> Process:
    """A shell script that has said that it is ready."""
    process = Process(["sh", "-c", script], tmp_path / "log", environment())
    while "said" not in process.tail():
        await asyncio.sleep(0.02)
    return process


def runs(pid: int) -> bool:
    """Whether it has not ended, whoever has still to hear of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.02)


async def test_a_process_ends_with_all_that_it_started(tmp_path: Path) -> None:
    process = await started(tmp_path, "sleep 100 & sleep 100 & echo said; wait")
    pids = [process.pid, *descendants(process.pid)]
    assert process.alive
    assert len(pids) == 3
    await process.stop()
    assert not process.alive
    wait_for_end(pids)


def test_a_process_ends_when_the_harness_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from bench.rivals.process import Process, environment\n"
        "process = Process(['sleep', '100'], Path(sys.argv[1]), environment())\n"
        "while Path(f'/proc/{process.pid}/comm').read_text() != 'sleep\\n': time.sleep(0.02)\n"
        "print(process.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE) as harness:
        assert harness.stdout
        pid = int(harness.stdout.readline())
        harness.send_signal(signal.SIGKILL)
    wait_for_end([pid])


def test_what_would_set_up_another_weft_is_kept_from_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_PORT", "1")
    assert "WEFT_PORT" not in environment()
    assert environment(HOME="/there")["HOME"] == "/there"


async def test_an_engine_computes_on_a_core_of_its_own(tmp_path: Path) -> None:
    process = await started(tmp_path, "sleep 100 & echo said; wait")
    isolation = Isolation(1)
    try:
        isolation.isolate(process.pid, 0)
        (engine,) = descendants(process.pid)
        cores = sorted(os.sched_getaffinity(0))
        assert os.sched_getaffinity(engine) == {cores[-1]}
        assert os.sched_getaffinity(process.pid) == set(cores[:-1] or cores)
        assert isolation.said == [f"engine 0: 1 process(es) on core {cores[-1]}, the rest on {cores[:-1] or cores}"]
    finally:
        await process.stop()


async def test_an_engine_that_is_not_there_is_not_taken_as_pinned(tmp_path: Path) -> None:
    process = await started(tmp_path, "echo said; exec sleep 100")
    try:
        with pytest.raises(RuntimeError, match="engine 0 has no process"):
            Isolation(1).isolate(process.pid, 0)
    finally:
        await process.stop()


async def test_the_harness_and_what_it_starts_keep_off_the_engines_cores_and_get_them_back(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    isolation = Isolation(1)
    try:
        isolation.confine()
        left = set(cores[:-1] or cores)
        assert os.sched_getaffinity(0) == left
        front = await started(tmp_path, "echo said; exec sleep 100")
        assert os.sched_getaffinity(front.pid) == left
        await front.stop()
    finally:
        isolation.release()
    assert os.sched_getaffinity(0) == set(cores)


def test_where_engines_have_every_core_the_harness_shares_them() -> None:
    cores = os.sched_getaffinity(0)
    isolation = Isolation(len(cores))
    isolation.confine()
    assert os.sched_getaffinity(0) == cores
    assert isolation.said == []


def test_an_engine_must_hold_one_call(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="64 KV tokens"):
        Engines(1, 64, tmp_path, max_len=96)


class Unstarted(Engines):
    """Starts no engine."""

    async def _start(self, build: Build) -> None:
        pass


@pytest.mark.skipif(installed() != "cpu", reason="needs vLLM's CPU build")
async def test_engines_know_their_limits_and_keep_their_logs_out_of_git(tmp_path: Path) -> None:
    assert Engines(1, 4096, tmp_path).limits == (1024, 16)
    assert Engines(1, 4096, tmp_path, args=["--max-num-seqs", "4"]).limits == (1024, 4)
    async with Unstarted(1, 4096, tmp_path / "engines"):
        assert (tmp_path / "engines" / ".gitignore").read_text() == "*\n"


@pytest.mark.skipif(installed() != "cpu", reason="needs vLLM's CPU build")
def test_engines_are_stock_or_have_the_plug_in_and_a_tier_as_large_as_asked(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    (model / "config.json").write_text(json.dumps(config))
    assert kv_bytes(str(model)) == 2 * 2 * 64 * 2
    assert kv_bytes(str(model), "float32") == 2 * 2 * 64 * 4
    engines = Engines(1, 4096, tmp_path, model=str(model), link_gbps=2.0)

    def tier(build: Build) -> dict:
        flags = engines._flags(build, str(model))
        return json.loads(flags[flags.index("--kv-transfer-config") + 1])

    assert "--kv-transfer-config" not in engines._flags(Build(4096))
    stock, ours = tier(Build(4096, 2.0)), tier(Build(4096, 2.0, "saga"))
    assert (stock["kv_connector"], ours["kv_connector"]) == ("OffloadingConnector", "WeftConnector")
    for extra in (stock["kv_connector_extra_config"], ours["kv_connector_extra_config"]):
        assert extra["cpu_bytes_to_use"] == 2 * 4096 * kv_bytes(str(model), embedded.dtype())
        assert extra["link_gbps"] == 2.0
    assert '{"weft_policy": "saga"}' in engines._flags(Build(4096, 0.0, "saga"))
    assert "--scheduler-cls" not in engines._flags(Build(4096, 2.0), str(model))


def test_the_length_of_calls_has_room_for_texts_that_are_longer_than_said() -> None:
    asked = workload()
    longest = max(call.prompt.end + call.output for run in asked.runs for call in run.calls)
    assert longest < length_for(asked) < 3 * longest
    assert length_for(asked) % BLOCK == 0
    long = Piece("long", 10, text="x" * 10_000)
    assert length_for(Workload("long", [Run("r", "p", [Call("main", "agent", long, 5)])])) > 5000
