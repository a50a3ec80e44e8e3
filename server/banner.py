"""What `weft serve` says on its terminal: at most 15 lines, then silence but for the log."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version

from rich.console import Console

from server import embedded
from server.config import Settings
from server.core import Core
from server.fleet import Fleet


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process."""


class Banner:
    """Writes to standard output. On a terminal the workers' start is one live line; elsewhere, a line per change."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._console.print(f"[bold]Weft {version('weft')}[/bold]")

    def line(self, text: str) -> None:
        """One line."""
        with suppress(OSError):  # a terminal that has gone must not keep us from ending what runs
            self._console.print(f"  {text}", markup=False)

    async def announce(self, core: Core, fleet: Fleet) -> bool:
        """Show the workers' start, then how to call us. False where no worker can ever start; says why."""
        began = time.monotonic()
        with self._console.status("workers: starting") as status:
            while not core.endpoints:
                if len(fleet.failed) == len(fleet.states):
                    break
                await asyncio.sleep(0.1)
                counts = Counter(fleet.states.values())
                shown = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
                status.update(f"workers: {shown}, {time.monotonic() - began:.0f} s")
        if not core.endpoints:
            name, reason = next(iter(fleet.failed.items()))
            self.line(f"worker {name} did not start:")
            for text in reason.splitlines():
                self.line(f"  {text}")
            return False
        self._say_ready(core, time.monotonic() - began)
        return True

    def _say_ready(self, core: Core, seconds: float) -> None:
        settings, workers = self._settings, core.scheduler.workers
        up, model = len(core.endpoints), core.default_model()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{settings.port}"
        self.line(f"{up} of {len(workers)} workers up after {seconds:.0f} s, serving {model} at {url}")
        if not settings.models and not settings.workers:
            self.line(f"{embedded.NAME} has random weights: its replies are noise")
        body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
        needs_key = settings.keys is not None
        shown = "$KEY" if needs_key else "none"
        auth = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
        self.line(f"curl {url}/v1/chat/completions{auth} -H 'Content-Type: application/json' -d '{body}'")
        self.line(f"OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={shown} python your_agent.py")
        self.line(f"ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={shown} ANTHROPIC_MODEL={model} claude")
