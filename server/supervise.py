"""Runs one command and ends it with everything it started: when the command ends, when told to, or when the
parent dies (its end of our standard input closes).

    python -m server.supervise COMMAND [ARGUMENT ...]

SIGTERM ends the command gracefully, then by force after `GRACE_SECONDS`. The exit status is the command's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import NoReturn

GRACE_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> NoReturn:
    """Run `command` in our own process group and never outlive it, nor let anything of it outlive us."""
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    libc = ctypes.CDLL(None, use_errno=True)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    signal.signal(signal.SIGTERM, lambda *_: _stop(child))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    status = child.wait()
    _end_group(status)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    timer = threading.Timer(GRACE_SECONDS, _end_group, (128 + signal.SIGTERM,))
    timer.daemon = True
    timer.start()


def _die_with_parent() -> None:
    while os.read(0, 1024):
        pass
    _end_group(128 + signal.SIGKILL)


def _end_group(status: int) -> NoReturn:
    """Kill what is left of our group. That includes us, unless nothing else is left."""
    group = os.getpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else None
    if _others(group):
        os.killpg(group, signal.SIGKILL)
    os._exit(status if status >= 0 else 128 - status)


def _others(group: int) -> bool:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if os.getpgid(int(entry)) == group:
                    return True
            except (ProcessLookupError, PermissionError):
                continue
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
