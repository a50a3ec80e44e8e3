"""Makes CPU engines into accelerators that do not disturb each other: each computes on half a core of its own.

An engine's core process gets a cgroup-v1 cpu group with a quota where that is possible, and is pinned to one of the
last cores, two engines to a core; its API server is kept off those. Where there is one core all share it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from bench.rivals.process import descendants

QUOTA_US, PERIOD_US, SHARES = 5_000, 10_000, 8192
ENGINES_A_CORE = PERIOD_US // QUOTA_US
REMOVE_SECONDS = 5.0
PREFIX = "weft-bench-"


class Isolation:
    """Holds the groups that it made. `said` is what was done, for run.json."""

    def __init__(self, engines: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        taken = min(max(1, len(cores) - 1), -(-engines // ENGINES_A_CORE))
        self._engine_cores = cores[-taken:]
        self._other_cores = cores[:-taken] or cores
        self._parent = _cpu_group()
        self._made: list[Path] = []
        self.said: list[str] = []
        if self._parent:
            _remove_orphans(self._parent)

    def isolate(self, server: int, index: int) -> None:
        """Confine engine `index`, whose API server is the process `server`. Both must have started."""
        core = self._engine_cores[index // ENGINES_A_CORE % len(self._engine_cores)]
        _pin(server, self._other_cores)
        workers = [pid for pid in descendants(server) if "resource_tracker" not in _command(pid)]
        group = self._group(index)
        for pid in workers:
            _pin(pid, [core])
            if group:
                (group / "cgroup.procs").write_text(str(pid))
        share = f"quota {QUOTA_US / PERIOD_US:g} core (cgroup v1)" if group else "no quota"
        self.said.append(f"engine {index}: {len(workers)} process(es) on core {core}, {share}")

    def remove(self) -> None:
        """Take the groups away. Their processes must have ended."""
        deadline = time.monotonic() + REMOVE_SECONDS
        for group in self._made:
            while not _removed(group) and time.monotonic() < deadline:  # what was killed has not quite ended
                time.sleep(0.05)
        self._made.clear()
        self.said.clear()

    def _group(self, index: int) -> Path | None:
        if self._parent is None:
            return None
        group = self._parent / f"{PREFIX}{os.getpid()}-{index}"
        try:
            group.mkdir(exist_ok=True)
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
            (group / "cpu.shares").write_text(str(SHARES))
        except OSError:
            _removed(group)
            return None
        self._made.append(group)
        return group


def _cpu_group() -> Path | None:
    """The cgroup-v1 cpu group of this process where we may make groups in it, else None."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            own = next(
                (row.split(":", 2)[2] for row in Path("/proc/self/cgroup").read_text().splitlines()
                 if "cpu" in row.split(":")[1].split(",")), "/",
            )  # fmt: skip
            inside = Path(place) / own.lstrip("/")
            group = inside if inside.is_dir() else Path(place)  # in a container the mount is its own part
            return group if os.access(group, os.W_OK) else None
    return None


def _remove_orphans(parent: Path) -> None:
    """Take away the groups of harnesses that were killed."""
    for group in parent.glob(PREFIX + "*"):
        if not Path("/proc", group.name.removeprefix(PREFIX).partition("-")[0]).exists():
            _removed(group)


def _removed(group: Path) -> bool:
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


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
