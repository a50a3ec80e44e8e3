"""Workers in a real Ray with pretended GPUs; their server is a small fake, so that lives are short."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import ray

from kvcache.plugin.guard import RequireKey
from server import engine
from server.config import ConfigError
from server.engine import EngineSpec
from server.ray_fleet import NAMESPACE, RayFleet, end_workers, list_workers
from server.worker import WorkerActor
from tests.engine.conftest import wait_for

SERVER = (sys.executable, "-P", "-m", "bench.upstream")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=1, num_gpus=4, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=100_000_000,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def fleet(cluster: None, tmp_path: Path) -> Iterator[RayFleet]:
    specs = [EngineSpec(f"big-{i}", "big", "fake", gpus=2, command=SERVER) for i in range(2)]
    made = RayFleet(specs, str(tmp_path), "127.0.0.1", 1)
    yield made
    end_workers(list_workers())


def ready(fleet: RayFleet, worker: str):
    """The worker's location, once it has one."""
    found: list[object] = []

    def look() -> bool:
        found[:] = [asyncio.run(fleet.locate(worker))]
        return found[0] is not None

    wait_for(look, 60)
    return found[0]


def info(worker: str) -> dict:
    return ray.get(ray.get_actor(worker, NAMESPACE).info.remote(), timeout=30)


def environ(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def test_gpus_are_reserved_as_asked_and_what_is_missing_is_named(fleet: RayFleet, tmp_path: Path) -> None:
    fleet.start(exclusive=False)
    for worker in fleet.specs:
        ready(fleet, worker)
    assert ray.available_resources().get("GPU", 0) == 0
    devices = [environ(info(worker)["pid"])["CUDA_VISIBLE_DEVICES"].split(",") for worker in fleet.specs]
    assert sorted(itertools.chain(*devices)) == ["0", "1", "2", "3"]
    more = RayFleet([EngineSpec("huge-0", "huge", "m", gpus=8, command=SERVER)], str(tmp_path), None, 1)
    with pytest.raises(ConfigError, match="need 8 GPU, the Ray cluster has 4"):
        more.start(exclusive=False)


def test_what_is_free_is_named_where_others_hold_the_gpus(
    fleet: RayFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ray_fleet.PLACE_SECONDS", 2)
    fleet.start(exclusive=False)
    more = RayFleet([EngineSpec("more-0", "more", "m", gpus=1, command=SERVER)], str(tmp_path), None, 1)
    with pytest.raises(
        ConfigError, match=r"more-0 needs 0.1 CPU, 1 GPU on one node; free in the Ray cluster: .* 0 GPU"
    ):
        more.start(exclusive=False)
    assert list_workers() == ["big-0", "big-1"]


def test_workers_are_adopted_as_they_are_and_never_taken_from_another(fleet: RayFleet, tmp_path: Path) -> None:
    fleet.start(exclusive=False)
    before = ready(fleet, "big-0")
    said: list[str] = []
    again = RayFleet(list(fleet.specs.values()), str(tmp_path), "127.0.0.1", 1)
    again.start(exclusive=False, report=said.append)
    assert ready(again, "big-0") == before
    assert said == ["adopted big-0", "adopted big-1"]
    other = RayFleet([EngineSpec("big-0", "big", "another", gpus=2, command=SERVER)], str(tmp_path), None, 1)
    with pytest.raises(ConfigError, match="runs with other settings"):
        other.start(exclusive=False)
    assert ready(fleet, "big-0") == before


@pytest.mark.parametrize("victim", ["server", "supervisor", "actor"])
def test_whatever_is_killed_the_worker_comes_back_whole_and_leaves_no_orphan(fleet: RayFleet, victim: str) -> None:
    fleet.start(exclusive=False)
    before = ready(fleet, "big-0")
    supervisor = info("big-0")["pid"]
    (server,) = children(supervisor)
    parent = int(Path(f"/proc/{supervisor}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill({"server": server, "supervisor": supervisor, "actor": parent}[victim], signal.SIGKILL)
    wait_for(lambda: not alive(server) and not alive(supervisor), 10)
    wait_for(lambda: new_life(fleet, before), 60)
    assert ready(fleet, "big-1")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def new_life(fleet: RayFleet, before: object) -> bool:
    found = asyncio.run(fleet.locate("big-0"))
    return found is not None and found.incarnation != before.incarnation  # type: ignore[attr-defined]


def test_a_server_that_cannot_start_is_not_started_again_and_says_why(cluster: None, tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('ValueError: no such flag')")
    fleet = RayFleet([EngineSpec("bad-0", "bad", "m", command=command)], str(tmp_path), "127.0.0.1", 1)
    fleet.start(exclusive=False)
    wait_for(lambda: asyncio.run(fleet.locate("bad-0")) is None and "bad-0" in fleet.failed, 30)
    assert "ValueError: no such flag" in fleet.failed["bad-0"]
    time.sleep(1)
    assert info("bad-0")["state"] == "failed"
    end_workers(["bad-0"])
    assert list_workers() == []


def test_the_command_keeps_the_users_flags_last_and_a_foreign_kv_transfer_config_whole() -> None:
    transfer = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
    spec = EngineSpec("m-0", "m", "org/model", args=("--kv-transfer-config", transfer, "--max-model-len", "9"))
    command = engine.command(spec, "127.0.0.1", 1234, tier=4.0)
    assert command[-4:] == ["--kv-transfer-config", transfer, "--max-model-len", "9"]
    assert command.count("--kv-transfer-config") == 1
    assert engine.environment(spec, "secret", 1)["VLLM_API_KEY"] == "secret"


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_what_a_worker_on_a_gpu_is_started_with_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda: "gpu")
    spec = EngineSpec("m-0", "m", "org/model", args=("--data-parallel-size", "2"), host_tier=8.0)
    assert engine.host_tier(spec, 3) == (4.0, ""), "data-parallel engines share it"
    command = engine.command(spec, "127.0.0.1", 1234, 4.0)
    module, _, name = flag(command, "--scheduler-cls").rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert flag(command, "--scheduling-policy") == "priority"
    module, _, name = flag(command, "--middleware").rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    told = json.loads(flag(command, "--kv-transfer-config"))
    extra = told["kv_connector_extra_config"]
    assert extra["cpu_bytes_to_use"] == 4 << 30
    assert hasattr(importlib.import_module(told["kv_connector_module_path"]), told["kv_connector"])
    assert hasattr(importlib.import_module(extra["spec_module_path"]), extra["spec_name"])
    assert "--kv-transfer-config" not in engine.command(spec, "127.0.0.1", 1234, 0.0)


def test_a_tier_that_nobody_asked_for_fits_the_machine_and_stays_out_of_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tier(*args: str, build: str = "gpu", shm: float = 1e12, **env: str) -> engine.Tier:
        monkeypatch.setattr(engine, "installed", lambda: build)
        monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: SimpleNamespace(free=shm))
        monkeypatch.setattr(engine, "memory_left", lambda: 64 << 30)
        return engine.host_tier(EngineSpec("m-0", "m", "m", args, tuple(env.items()), host_tier=None), 2)

    assert tier() == (8.0, ""), "a quarter, over two workers"
    assert tier(build="cpu") == (0.0, "")
    gib, why = tier(shm=10 * (1 << 30))
    assert gib == 4.0
    assert "/dev/shm, which has 10 GiB left; memory would allow 8 " in why
    assert "--shm-size" in why
    assert tier("--no-enable-prefix-caching") == (0.0, "vLLM has none with --no-enable-prefix-caching")
    gib, why = tier(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    assert gib == 0.0
    assert "expandable_segments" in why


def test_what_memory_is_left_is_no_more_than_the_machine_has() -> None:
    assert 0 < engine.memory_left() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_worker_that_dies_of_a_tier_nobody_asked_for_starts_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server is a script that dies at the first start."""
    script = tmp_path / "server.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nseen = Path(sys.argv[1])\n"
        "if not seen.exists():\n    seen.touch()\n    sys.exit('no tier for this model')\n"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'bench.upstream', *sys.argv[2:]])\n"
    )
    monkeypatch.setattr(engine, "host_tier", lambda spec, workers: engine.Tier(1.0))
    first = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: first)
    command = (sys.executable, str(script), str(tmp_path / "seen"))
    made = WorkerActor(
        EngineSpec("one-0", "one", "fake", command=command, host_tier=None), str(tmp_path), "127.0.0.1", 1, 1
    )
    try:
        wait_for(lambda: made.state != "starting", 60)
        assert made.state == "ready"
        assert made.info()["note"] == f"host_tier: the engine did not start with 1 GiB; what it said: {made.log}.1"
        assert "no tier for this model" in made.log.with_suffix(".log.1").read_text()
    finally:
        made.stop()


async def test_the_workers_guard_asks_for_the_key_everywhere_but_at_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "inner")

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def status(path: str, *headers: tuple[bytes, bytes]) -> int:
        sent: list[dict] = []

        async def send(message: dict) -> None:
            sent.append(message)

        await RequireKey(app)({"type": "http", "path": path, "headers": list(headers)}, None, send)  # type: ignore[arg-type]
        return sent[0]["status"]

    assert await status("/health") == 200
    assert await status("/invocations") == 401
    assert await status("/invocations", (b"authorization", b"Bearer wrong")) == 401
    assert await status("/invocations", (b"authorization", b"Bearer inner")) == 200


async def test_real_servers_of_the_fleet_are_followed(cluster: None, tmp_path: Path) -> None:
    from server.core import Core
    from server.fleet import follow

    fleet = RayFleet([EngineSpec("one-0", "one", "fake", command=SERVER)], str(tmp_path), "127.0.0.1", 1)
    await asyncio.to_thread(fleet.start, False)
    core = Core()
    async with aiohttp.ClientSession() as client:
        following = asyncio.create_task(follow(fleet, core, client))
        async with asyncio.timeout(60):
            while "one-0" not in core.endpoints:
                await asyncio.sleep(0.05)
        following.cancel()
    assert core.endpoints["one-0"].models == ("fake",)
    assert core.scheduler.workers["one-0"].kv_tokens == 16000
    await asyncio.to_thread(end_workers, ["one-0"])
