"""A command that the harness starts: it and everything that it starts end with the harness, however that ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STOP_SECONDS = 30.0
TAIL_BYTES = 3000


class Process:
    """One command in a process group of its own, under `server.supervise`; its output goes to the file `log`."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.supervise", *command],
                stdin=subprocess.PIPE,  # closes when we die, however we die
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The command's own process; the supervisor's where it has none."""
        return next(iter(children(self._supervisor.pid)), self._supervisor.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._supervisor.poll() is None

    def tail(self) -> str:
        """The end of what it said."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            return log.read().decode("utf-8", "replace")

    async def stop(self) -> None:
        """End it, by force if it does not end in time."""
        self._supervisor.terminate()
        try:
            await asyncio.to_thread(self._supervisor.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._supervisor.pid, signal.SIGKILL)
            self._supervisor.wait()
        if self._supervisor.stdin:
            self._supervisor.stdin.close()


def environment(**more: str) -> dict[str, str]:
    """Ours, without what would set up another Weft."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")} | more


def children(pid: int) -> list[int]:
    """The processes that a process started and that still run; empty where it has ended."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found
