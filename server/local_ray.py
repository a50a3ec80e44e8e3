"""A Ray of our own on this machine: outlives a front end that was killed, ends with one that stops.

Ray reads its credentials when it is imported, so that nothing here imports it before they are in the environment.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from server.config import ConfigError
from server.engine import free_port

NAMESPACE = "weft"
START_SECONDS = 60.0
OBJECT_STORE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class LocalRay:
    """The Ray that `weft serve` on one port started. `pid` is its head process, `front` the front end's; each with
    its start in clock ticks since boot, since pids are used again.

    Ray listens beyond loopback and runs whatever it is sent, so that it gets a `token` that only this user can read.
    """

    address: str
    folder: str
    token: str
    pid: int
    started: int
    front: int
    front_started: int

    def alive(self) -> bool:
        """Whether the head process still runs."""
        return _runs(self.pid, self.started)

    def front_alive(self) -> bool:
        """Whether the front end that uses this Ray runs."""
        return _runs(self.front, self.front_started)


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
    found = read(home, port)
    if found is None:
        found = _start(home, port)
    else:
        found = replace(found, front=os.getpid(), front_started=_start_time(os.getpid()))
        _write(home, port, found)
    try:
        join(found.address)
    except BaseException:
        end(home, port, found)
        raise
    return found


def join(address: str) -> None:
    """Connect this process to a Ray cluster. Raises ConfigError where there is none."""
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"address: cannot join the Ray cluster at {address!r}: {error}") from None


def end(home: Path, port: int, local: LocalRay) -> None:
    """Stop the Ray, by force if it does not end in time, and forget it."""
    import ray

    ray.shutdown()
    for sig, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        if local.alive():
            os.killpg(local.pid, sig)
        deadline = time.monotonic() + seconds
        while local.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
    shutil.rmtree(local.folder, ignore_errors=True)
    record_path(home, port).unlink(missing_ok=True)


def await_front(local: LocalRay, seconds: float = 120.0) -> None:
    """Wait until the front end has ended."""
    deadline = time.monotonic() + seconds
    while local.front_alive() and time.monotonic() < deadline:
        time.sleep(0.1)


def _write(home: Path, port: int, local: LocalRay) -> None:
    record = record_path(home, port)
    record.touch(mode=0o600)
    record.write_text(json.dumps(asdict(local)))


def _start(home: Path, port: int) -> LocalRay:
    head_port = free_port("127.0.0.1")
    # Not Ray's own: there it would become the cluster that every other program of this user joins. Short, for sockets.
    folder = tempfile.mkdtemp(prefix="weft-ray-", dir="/tmp")
    home.mkdir(parents=True, exist_ok=True)
    logs = home / f"ray-{port}.log"
    with logs.open("wb") as log:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={head_port}"),
                *("--disable-usage-stats", "--include-dashboard=false", f"--temp-dir={folder}"),
                f"--object-store-memory={OBJECT_STORE_BYTES}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            # Ray would run its workers, and so the engines, at the lowest priority.
            env={**os.environ, "RAY_worker_niceness": "0"},
            start_new_session=True,
        )
    address, token, front = f"127.0.0.1:{head_port}", os.environ["RAY_AUTH_TOKEN"], os.getpid()
    local = LocalRay(address, folder, token, head.pid, _start_time(head.pid), front, _start_time(front))
    try:
        _write(home, port, local)
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in logs.read_text(errors="replace"):
            if time.monotonic() > deadline or head.poll() is not None:
                raise ConfigError(f"Ray did not start; see {logs}")
            time.sleep(0.1)
    except BaseException:
        end(home, port, local)
        raise
    return local


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _runs(pid: int, started: int) -> bool:
    return started != 0 and _start_time(pid) == started
