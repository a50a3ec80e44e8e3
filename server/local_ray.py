"""A Ray of our own on this machine: outlives a front end that was killed, ends with one that stops.

Ray reads its credentials when it is imported, so that nothing here imports it before they are in the environment.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from server.config import ConfigError

NAMESPACE = "weft"
START_SECONDS = 60.0
OBJECT_STORE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class LocalRay:
    """The Ray that `weft serve` on one port started. `pid` is its head process, `front` the front end's.

    Ray listens beyond loopback and runs whatever it is sent, so that it gets a `token` that only this user can read.
    """

    address: str
    token: str
    pid: int
    front: int

    def alive(self) -> bool:
        """Whether the head process still runs, and is Ray's."""
        return _runs(self.pid, "ray")


def record_path(home: Path, port: int) -> Path:
    """Where the Ray of the front end on `port` is written down."""
    return home / f"ray-{port}.json"


def read(home: Path, port: int) -> LocalRay | None:
    """The Ray that a front end on `port` left or uses; None where there is none."""
    try:
        found = LocalRay(**json.loads(record_path(home, port).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.alive() else None


def prepare(home: Path, port: int) -> LocalRay | None:
    """Put the credentials of this port's Ray into the environment; to be called before Ray is imported."""
    found = read(home, port)
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": found.token if found else secrets.token_hex(32)})
    return found


def start_or_join(home: Path, port: int) -> LocalRay:
    """Join the Ray that an earlier front end on this port left, or start one. Raises ConfigError where that fails."""
    found = replace(read(home, port) or _start(home), front=os.getpid())
    record = record_path(home, port)
    record.touch(mode=0o600)
    record.write_text(json.dumps(asdict(found)))
    join(found.address)
    return found


def join(address: str) -> None:
    """Connect this process to a Ray cluster. Raises ConfigError where there is none."""
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"address: cannot join the Ray cluster at {address!r}: {error}") from None


def end(home: Path, port: int, local: LocalRay) -> None:
    """Stop the Ray and forget it."""
    import ray

    ray.shutdown()
    if local.alive():
        os.kill(local.pid, signal.SIGTERM)
        deadline = time.monotonic() + 15
        while local.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
    record_path(home, port).unlink(missing_ok=True)


def front_alive(local: LocalRay) -> bool:
    """Whether the front end that uses this Ray runs."""
    return _runs(local.front, "weft")


def await_front(local: LocalRay, seconds: float = 120.0) -> None:
    """Wait until the front end has ended."""
    deadline = time.monotonic() + seconds
    while front_alive(local) and time.monotonic() < deadline:
        time.sleep(0.1)


def _start(home: Path) -> LocalRay:
    port = _free_port()
    logs = home / "ray.log"
    logs.parent.mkdir(parents=True, exist_ok=True)
    with logs.open("wb") as log:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
                *("--disable-usage-stats", "--include-dashboard=false", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            # Ray would run its workers, and so the engines, at the lowest priority.
            env={**os.environ, "RAY_worker_niceness": "0"},
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and head.poll() is None:
        if "Ray runtime started" in logs.read_text(errors="replace"):
            return LocalRay(f"127.0.0.1:{port}", os.environ["RAY_AUTH_TOKEN"], head.pid, os.getpid())
        time.sleep(0.1)
    raise ConfigError(f"Ray did not start; see {logs}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _runs(pid: int, word: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and word in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
