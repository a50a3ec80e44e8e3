"""Keeps CPU engines apart: each engine's core process is pinned to a core of its own, as far as there are so many.

API servers, the harness and the fronts that it starts share the cores that are left; where none is left, all of them. A
share of a core by quota would leave more room beside the engines, but a throttled engine took 25 ms of CPU for a step
that takes 14 ms.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from bench.rivals.process import descendants


class Isolation:
    """Says in `said` what was done, for run.json."""

    def __init__(self, engines: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        taken = min(len(cores), engines)
        self._cores, self._engine_cores = cores, cores[-taken:]
        self._other_cores = cores[:-taken] or cores
        self.said: list[str] = []

    def isolate(self, server: int, index: int) -> None:
        """Confine engine `index`, whose API server is the process `server`. RuntimeError where none has started."""
        core = self._engine_cores[index % len(self._engine_cores)]
        _pin(server, self._other_cores)
        workers = [pid for pid in descendants(server) if "resource_tracker" not in _command(pid)]
        if not workers:
            raise RuntimeError(f"engine {index} has no process beside its API server: nothing to pin")
        for pid in workers:
            _pin(pid, [core])
        self.said.append(f"engine {index}: {len(workers)} process(es) on core {core}, the rest on {self._other_cores}")

    def confine(self) -> None:
        """Keep the harness, and what it starts from now on, off the engines' cores, where there are others."""
        if self._other_cores != self._cores:
            _pin(os.getpid(), self._other_cores)
            self.said.append(f"the harness and the fronts on {self._other_cores}")

    def release(self) -> None:
        """Give the harness all cores again: engines are started as the first ones were."""
        _pin(os.getpid(), self._cores)
        self.said.clear()


def _pin(pid: int, cores: list[int]) -> None:
    with suppress(OSError):  # a thread may end meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                os.sched_setaffinity(int(task.name), cores)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""
