"""A worker: a Ray actor that starts one vLLM server, watches it, and lives and dies with it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.util

from server import engine
from server.engine import EngineSpec

LOG_TAIL_BYTES = 8192
RESTART_PAUSE_SECONDS = 5.0


class WorkerActor:
    """Runs on the node that Ray chose. When the server dies the actor exits, so that Ray restarts both.

    A server that dies before it ever answered is not restarted: its flags are wrong, and `info` says what it said. But
    one with a host tier that nobody asked for is started once more without.
    """

    def __init__(self, spec: EngineSpec, home: str, host: str | None, cpu_share: int, workers: int) -> None:
        self.spec = spec
        self.host = host = host or ray.util.get_node_ip_address()
        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.incarnation = uuid.uuid4().hex
        self.api_key = secrets.token_urlsafe(24)
        self.state = "starting"
        self.port = engine.free_port(host)
        self.directory = Path(home) / spec.name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / "vllm.log"
        self._cpu_share = cpu_share
        self._tier = engine.host_tier(spec, workers)
        self._start()
        threading.Thread(target=self._wait, daemon=True).start()
        threading.Thread(target=self._await_ready, daemon=True).start()

    def _start(self) -> None:
        command = engine.command(self.spec, self.host, self.port, self._tier.gib)
        if self.log.exists():
            self.log.replace(self.directory / "vllm.log.1")
        with self.log.open("wb") as log:
            log.write(f"--- {time.strftime('%FT%TZ', time.gmtime())} {' '.join(command)}\n".encode())
            self.server = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.supervise", *command],
                stdin=subprocess.PIPE,  # closes when we die, however we die
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine.environment(self.spec, self.api_key, self._cpu_share),
                cwd=self.directory,
                start_new_session=True,
            )

    def info(self) -> dict[str, Any]:
        """Where the server is and how it does: `starting`, `ready`, `failed` (with the end of its log) or `stopped`.

        `note` is what an operator should know of how it was started.
        """
        return {
            "state": self.state,
            "url": f"http://{_in_url(self.host)}:{self.port}",
            "api_key": self.api_key,
            "incarnation": self.incarnation,
            "spec": self.spec,
            "pid": self.server.pid,
            "log": str(self.log),
            "note": f"host_tier: {self._tier.why}" if self._tier.why else "",
            "log_tail": self._tail() if self.state == "failed" else "",
        }

    def stop(self) -> None:
        """End the server gracefully; the actor stays until it is killed."""
        self.state = "stopped"
        self.server.terminate()
        try:
            self.server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._kill()

    def _wait(self) -> None:
        self.server.wait()
        self._kill()
        if self.state == "starting" and self._tier.gib and self.spec.host_tier is None:
            # Nobody asked for one, and some models start with none.
            why = f"the engine did not start with {self._tier.gib:.2g} GiB; what it said: {self.log}.1"
            self._tier = engine.Tier(0.0, why)
            self._start()
            self.server.wait()
            self._kill()
        if self.state == "ready":
            os._exit(1)
        if self.state == "starting" and self.restarted:
            time.sleep(RESTART_PAUSE_SECONDS)
            os._exit(1)
        if self.state == "starting":
            self.state = "failed"

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)

    def _await_ready(self) -> None:
        url = f"http://{_in_url(self.host)}:{self.port}/health"
        while self.state == "starting":
            try:
                with urllib.request.urlopen(url, timeout=2):
                    self.state = "ready"
            except (urllib.error.URLError, ConnectionError, TimeoutError, OSError):
                time.sleep(0.25)

    def _tail(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
