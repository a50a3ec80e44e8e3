"""Weft as a user starts it: `weft serve`, real vLLM on the CPU, real Ray. Started once, shared by all tests."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import orjson
import pytest

WEFT = str(Path(sys.executable).with_name("weft"))
START_SECONDS = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("engine")
            item.add_marker(pytest.mark.timeout(3600 if item.get_closest_marker("proof") else 600))


@dataclass
class Engine:
    """One vLLM server process."""

    worker: str
    pid: int
    port: int
    group: int

    def running(self) -> float:
        """Requests that vLLM itself counts as running or waiting."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, ConnectionError, TimeoutError):  # it starts, or ends
            return math.inf
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.]+)$", text, re.M)
        assert found
        return sum(map(float, found))


@dataclass
class Served:
    """A `weft serve` and what belongs to it."""

    home: Path
    arguments: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    port: int = 0

    def start(self) -> Served:
        """Start the front end and wait until it is ready, with all workers."""
        self.port = self.port or free_port()
        self.out = self.home / f"serve-{time.time_ns()}.out"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [WEFT, "serve", "--port", str(self.port), "--home", str(self.home), *self.arguments],
                stdout=out,
                stderr=self.out.with_suffix(".err").open("wb"),
                env={**os.environ, **self.env},
                cwd=self.cwd or self.home,
            )
        return self

    def ready(self, workers: int) -> Served:
        """Wait until so many workers are up."""
        wait_for(lambda: self.process.poll() is not None or self.up() >= workers, START_SECONDS)
        assert self.process.poll() is None, self.said()
        return self

    def said(self) -> str:
        """Everything on standard output and error."""
        return self.out.read_text() + self.out.with_suffix(".err").read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return orjson.loads(answer.read())

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))

    def up(self) -> int:
        try:
            return sum(worker["state"] == "up" for worker in self.get("/v1/workers")["workers"])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return 0

    def processes(self) -> list[tuple[int, int, str, list[str]]]:
        """(pid, process group, worker, command line) of every process that a worker's server consists of."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    place = (entry / "cwd").readlink()
                    command = (entry / "cmdline").read_text().split("\0")
                    group = os.getpgid(int(entry.name))
                except OSError:
                    continue
                if place.parent.parent == self.home / "workers":
                    found.append((int(entry.name), group, place.name, command))
        return found

    def engines(self) -> list[Engine]:
        """The vLLM servers."""
        return [
            Engine(worker, pid, int(command[command.index("--port") + 1]), group)
            for pid, group, worker, command in sorted(self.processes())
            if "vllm.entrypoints.openai.api_server" in command and "server.supervise" not in command
        ]

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """End the front end."""
        self.process.send_signal(sig)
        return self.process.wait(timeout=120)


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    """Poll until `true()`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
async def sdk(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    """The OpenAI SDK's client of `served`."""
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def served(home: Path) -> Iterator[Served]:
    """The embedded model on two workers. The user's directory holds folders named as our packages."""
    trap = home / "users-project"
    for package in ("scheduler", "kvcache", "server", "bench", "vllm", "ray"):
        (trap / package).mkdir(parents=True)
        (trap / package / "__init__.py").write_text("raise SystemExit('shadowed')")
    arguments = ["--replicas", "2", "--trace-dir", str(home / "trace"), "--log-format", "json"]
    env = {"VLLM_ENABLE_RESPONSES_API_STORE": "1", "PYTHONPATH": ""}
    running = Served(home, arguments, env, cwd=trap).start()
    try:
        yield running.ready(2)
    finally:
        if running.process.poll() is None:
            running.stop()
