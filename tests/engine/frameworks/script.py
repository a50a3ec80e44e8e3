"""What the drivers share. They run in the frameworks' own environment, where Weft is not installed."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable

TASK = " ".join(["Find out what lies behind the green door of the old house, in your own words.", *sys.argv[3:]])
SUBTASK = r"Look at the {} of the house and report everything that you notice there\."
ANSWER = "[a-z]{2,9}( [a-z]{2,9}){63,79}"
TOOL_SECONDS = 0.15


def call(tool: str, **arguments: str) -> str:
    """A regular expression for a call of a tool, each argument one of its own."""
    fields = ", ".join(rf'"{name}": "{value}"' for name, value in arguments.items())
    return rf'<tool_call>\n\{{"name": "{tool}", "arguments": \{{{fields}\}}\}}\n</tool_call>'


LOOK = call("look", where="(cellar|garden|attic|kitchen)")


class Script:
    """What the model of one agent says, a random one: vLLM holds it to one regular expression after another.

    `body` is the framework's `extra_body`; it reads the inner dict anew at each call. `turn` is for the agent's tools: it
    takes a while, and once all calls of this answer have run, the next answer is due. The last one stays. An agent that
    was called by another one makes the next answer of its `caller` due with its first tool.
    """

    def __init__(self, *answers: str, caller: Script | None = None) -> None:
        self._answers = list(answers)
        self._caller = caller
        self._lock = threading.Lock()
        self._held: dict[str, str] = {}
        self.body = {"structured_outputs": self._held}
        self._next()

    def turn(self) -> None:
        time.sleep(TOOL_SECONDS)
        self._ran()
        if self._caller:
            self._caller._ran()
            self._caller = None

    def _ran(self) -> None:
        with self._lock:
            self._due -= 1
            if self._due <= 0 and self._answers:
                self._next()

    def _next(self) -> None:
        self._held["regex"] = self._answers.pop(0)
        self._due = self._held["regex"].count("<tool_call>")


def arguments() -> tuple[str, str]:
    """The base URL and the model; what else the command line holds is added to the task."""
    return sys.argv[1] + "/v1", sys.argv[2]


def tell(agents: Iterable[tuple[str, list[list[str]]]], handed: object = (), delegated: object = ()) -> None:
    """Print the truth: for each agent the tools that each of its answers called, then who handed over or delegated."""
    rows = [{"agent": agent, "calls": calls} for agent, calls in agents]
    print(json.dumps({"agents": rows, "handed": handed, "delegated": delegated}))
