"""What a proxy adds in front of a worker: Weft and vllm-router against the same fake workers, called directly too.

    python -m bench.overhead --out DIR [--seed S] [--rounds 3]

Writes DIR/overhead.md and DIR/overhead.json, and each process's own output to DIR/logs. Everything runs on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from bench.upstream import MODEL

HOST = "127.0.0.1"
UPSTREAMS = 2
READY_SECONDS = 60.0
STOP_SECONDS = 10.0
CLIENT_SECONDS = 120.0
FEWEST_TICKS = 20
"""CPU time is counted in ticks of 10 ms: below so many the error exceeds 5 %."""

_BIN = Path(sys.executable).parent
_PACKAGES = ("weft", "vllm-router", "uvloop", "uvicorn", "aiohttp", "fastapi")


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load: `per_slot` streams on each of `concurrency` connections, tokens `delay` seconds apart."""

    name: str
    title: str
    concurrency: int
    per_slot: int
    chunks: int
    delay: float
    body_bytes: int


CELLS = (
    Cell("paced-1", "1 stream, 50 chunks 20 ms apart, 4 KB body", 1, 8, 50, 0.02, 4096),
    Cell("paced-16", "16 streams, 50 chunks 20 ms apart, 4 KB body", 16, 4, 50, 0.02, 4096),
    Cell("paced-256", "256 streams, 50 chunks 20 ms apart, 4 KB body", 256, 4, 50, 0.02, 4096),
    Cell("flat-out", "32 streams flat out, 500 chunks back to back, 4 KB body", 32, 20, 500, 0.0, 4096),
    Cell("large-body", "8 streams, 8 chunks 20 ms apart, 400 KB body", 8, 25, 8, 0.02, 400 * 1024),
)
WARM_UP = Cell("warm-up", "", 32, 8, 20, 0.002, 4096)


@dataclass(frozen=True, slots=True)
class System:
    """What is measured: where it listens, and the root of its processes (None: the workers themselves)."""

    name: str
    ports: tuple[int, ...]
    pid: int | None


# Processes


def start(stack: ExitStack, name: str, command: Sequence[str], logs: Path) -> int:
    """Start a process that ends with `stack`; its output goes to a file. Returns its pid."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WEFT_")}
    log = stack.enter_context((logs / f"{name}.log").open("wb"))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    stack.callback(_stop, process)
    return process.pid


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_systems(stack: ExitStack, logs: Path) -> list[System]:
    """Start the fake workers and every proxy in front of them, and wait until all serve."""
    ports = _free_ports(UPSTREAMS + 5)
    workers = [ports.pop() for _ in range(UPSTREAMS)]
    for index, port in enumerate(workers):
        command = [sys.executable, "-m", "bench.upstream", "--host", HOST, "--port", str(port)]
        start(stack, f"upstream-{index}", command, logs)
    systems = [System("direct", tuple(workers), None)]
    _await_ready(systems[0])
    urls = [f"http://{HOST}:{port}" for port in workers]
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-overhead-"))
    port = ports.pop()
    weft = [str(_BIN / "weft"), "serve", "--workers", ",".join(urls), "--port", str(port), "--home", home]
    systems.append(System("weft", (port,), start(stack, "weft", weft, logs)))
    for policy in ("consistent_hash", "cache_aware"):
        port, metrics = ports.pop(), ports.pop()
        router = [str(_BIN / "vllm-router"), "--host", HOST, "--port", str(port), "--worker-urls", *urls]
        router += ["--prometheus-port", str(metrics), "--log-level", "warning", "--policy", policy]
        name = f"vllm-router-{policy.replace('_', '-')}"
        systems.append(System(name, (port,), start(stack, name, router, logs)))
    for system in systems:
        _await_ready(system)
    return systems


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind((HOST, 0))
        return [free.getsockname()[1] for free in sockets]


def _await_ready(system: System) -> None:
    """Wait until the system answers a chat completion. Raises RuntimeError after `READY_SECONDS`."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "ready?"}]}
    deadline = time.monotonic() + READY_SECONDS
    for port in system.ports:
        url = f"http://{HOST}:{port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    break
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{system.name} does not serve: {error}") from None
                time.sleep(0.1)


# CPU time


def tree_ticks(root: int) -> int:
    """CPU ticks that a process and its descendants have used, children that have ended included."""
    children: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for pid, fields in _processes():
        children.setdefault(int(fields[1]), []).append(pid)
        used[pid] = sum(map(int, fields[11:15]))
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        total += used.get(pid, 0)
        todo += children.get(pid, [])
    return total


def own_ticks(pid: int) -> int:
    """CPU ticks that one process has used."""
    return sum(map(int, _stat(pid)[11:13]))


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Each process and its `_stat`."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = _stat(int(entry))
            except OSError:  # it has ended
                continue
            yield int(entry), fields


def _stat(pid: int) -> list[str]:
    """The fields of a process's stat that come after its name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _machine_ticks() -> int:
    """CPU ticks that all processes and interrupts of the machine have used."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal


# Measuring


def measure(system: System, cell: Cell, session: str, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Run one cell against one system. Times in the result are in ms, CPU in microseconds per chunk."""
    streams = cell.concurrency * max(3, round(cell.per_slot * scale))
    command = [sys.executable, "-m", "bench.client", "--host", HOST, "--ports", ",".join(map(str, system.ports))]
    command += ["--concurrency", str(cell.concurrency), "--streams", str(streams), "--chunks", str(cell.chunks)]
    command += ["--delay", str(cell.delay), "--body-bytes", str(cell.body_bytes)]
    command += ["--session", session, "--seed", str(seed)]
    began, machine, ours = time.monotonic(), _machine_ticks(), tree_ticks(os.getpid())
    before = tree_ticks(system.pid) if system.pid else 0
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=CLIENT_SECONDS).stdout
    ticks = tree_ticks(system.pid) - before if system.pid else 0
    seconds, per_second = time.monotonic() - began, os.sysconf("SC_CLK_TCK")
    others = (_machine_ticks() - machine) - (tree_ticks(os.getpid()) - ours)
    result: dict[str, Any] = {"system": system.name, "cell": cell.name, **json.loads(answer)}
    enough = ticks >= FEWEST_TICKS and result["chunks"]
    result["cpu_seconds"] = ticks / per_second
    result["cpu_us_per_chunk"] = round(1e6 * ticks / per_second / result["chunks"], 2) if enough else None
    result["other_cpus"] = round(max(0, others) / per_second / seconds, 2)
    return result


def run_rounds(systems: Sequence[System], rounds: int, seed: int, scale: float) -> list[dict[str, Any]]:
    """All cells on all systems, `rounds` times. Within a cell the systems follow one another, in shuffled order."""
    rng = random.Random(seed)
    results = []
    for number in range(rounds):
        for cell in CELLS:
            for system in rng.sample(systems, len(systems)):
                text_seed = seed + 1000 * number
                result = measure(system, cell, f"r{number}-{cell.name}", text_seed, scale)
                results.append({"round": number, **result})
                print(f"round {number + 1}/{rounds}  {_progress(result)}", flush=True)
    _compare(results)
    return results


def _progress(result: dict[str, Any]) -> str:
    return (
        f"{result['cell']:<10}  {result['system']:<27}  ttft {result['ttft_p50_ms']}/{result['ttft_p99_ms']} ms  "
        f"{result['chunks_per_s']} chunks/s  errors {result['errors']}"
    )


def _compare(results: Sequence[dict[str, Any]]) -> None:
    """Add to each result how much longer its TTFT is than that of `direct` in the same round."""
    direct = {(r["round"], r["cell"]): r for r in results if r["system"] == "direct"}
    for result in results:
        base = direct[result["round"], result["cell"]]
        for share in ("p50", "p99"):
            mine, its = result[f"ttft_{share}_ms"], base[f"ttft_{share}_ms"]
            known = result is not base and mine is not None and its is not None
            result[f"added_{share}_ms"] = round(mine - its, 3) if known else None


# Report

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("TTFT p50 ms", "ttft_p50_ms", ".2f"),
    ("TTFT p99 ms", "ttft_p99_ms", ".2f"),
    ("added p50 ms", "added_p50_ms", ".2f"),
    ("added p99 ms", "added_p99_ms", ".2f"),
    ("chunks/s", "chunks_per_s", ",.0f"),
    ("proxy CPU µs/chunk", "cpu_us_per_chunk", ".1f"),
)
_NOTES = """\
Each figure is the median over the rounds, [min..max]. TTFT: request sent to first event with content. Added: against
`direct` of the same round. A slot is one session on one kept connection and sends its next stream when the last has
ended; paced slots start evenly spread over the length of a stream. TTFT and chunks/s are taken from when every slot
has turned over once until the supply ends; a stream that fails counts as 30 s. CPU is that of the proxy's whole
process tree over the whole load, its share of each request included; - where fewer than 20 ticks of 10 ms were
counted. Workers, proxy and client share the machine, so chunks/s is a floor. The fake workers answer 404 to all but
the routes they need, so cache_aware does not pay for the tokenization that it asks of real ones.
"""


def report(facts: dict[str, Any], systems: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """The Markdown report of a run."""
    other = [r["other_cpus"] for r in results]
    lines = ["# Proxy overhead", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    lines += [f"* CPUs used by others while measuring: median {median(other):.2f}, most {max(other):.2f}", "", _NOTES]
    for cell in CELLS:
        rows = [r for r in results if r["cell"] == cell.name]
        counts = sorted({r["measured"] for r in rows})
        samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines += [f"## {cell.title}", "", f"{samples} streams a round count for TTFT.", ""]
        lines += ["| system | " + " | ".join(title for title, _, _ in _COLUMNS) + " | errors |"]
        lines += ["|---|" + "---:|" * (len(_COLUMNS) + 1)]
        lines += [_row(name, [r for r in rows if r["system"] == name]) for name in systems]
        lines.append("")
    return "\n".join(lines)


def _row(system: str, results: Sequence[dict[str, Any]]) -> str:
    cells = [_spread([r[key] for r in results], form) for _, key, form in _COLUMNS]
    return " | ".join([f"| {system}", *cells, f"{sum(r['errors'] for r in results)} |"])


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    return f"{median(known):{form}} [{min(known):{form}}..{max(known):{form}}]"


def facts(seed: int, rounds: int) -> dict[str, Any]:
    """What must be known to read or repeat a run: machine, versions, seed, command."""
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ": unknown")
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "MemTotal: 0 kB")
    gib = int(memory.split()[1]) / 2**20
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu.partition(':')[2].strip()}, {os.cpu_count()} CPUs, {gib:.0f} GiB, {platform.platform()}",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "versions": ", ".join([f"python {platform.python_version()}", *map(_version, _PACKAGES)]),
        "commit": _commit(),
        "seed": seed,
        "rounds": rounds,
        "command": shlex.join(["python", "-m", "bench.overhead", *sys.argv[1:]]),
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="bench.overhead", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the systems and the prompts' text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="streams per slot, against a full run; for trials")
    arguments = parser.parse_args()
    # Ended from outside, we still end what we started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    known = facts(arguments.seed, arguments.rounds)
    began = time.monotonic()
    with ExitStack() as stack:
        systems = start_systems(stack, logs)
        for system in systems:
            measure(system, WARM_UP, "warm-up", arguments.seed)
            print(f"{system.name} is warm", flush=True)
        results = run_rounds(systems, arguments.rounds, arguments.seed, arguments.scale)
    known["seconds"] = round(time.monotonic() - began)
    raw = {**known, "scale": arguments.scale, "cells": [asdict(cell) for cell in CELLS], "results": results}
    (arguments.out / "overhead.json").write_text(json.dumps(raw, indent=1) + "\n")
    text = report(known, [system.name for system in systems], results)
    (arguments.out / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
