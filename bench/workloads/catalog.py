"""All workloads by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.workloads import claude_code, coding, kvflow, literature, mini_swe_agent, mooncake, recorded, tenants
from bench.workloads.runs import Workload

TRACES = ("mini-swe-agent", "claude-code", "mooncake", "recorded")
MADE: dict[str, Callable[..., Workload]] = {
    "w1": kvflow.w1,
    "w2": kvflow.w2,
    "w3": kvflow.w3,
    "w4": kvflow.w4,
    "w5": kvflow.w5,
    "w6": coding.w6,
    "w7": coding.w7,
    "w8": tenants.w8,
}
GROWING = ("w6", "w7")
NAMES = (*TRACES, *MADE, *literature.SHAPES)


def load(
    name: str,
    trace: Path | None = None,
    seed: int = 0,
    *,
    max_context: int | None = None,
    half: str | None = None,
    scale: float = 1.0,
    **options: Any,
) -> Workload:
    """The workload of that name, its lengths divided by `scale`; `trace` is the file or directory to read, if any.

    No prompt is longer than `max_context` tokens as played: sessions end before it (mini-swe-agent, w6, w7), or runs
    are left out and counted. `half` of the files ("tune", "report"): claude-code only. `options` go to the reader or
    generator. Raises ValueError for an unknown name, a trace that is missing or cannot be read, and a half that is
    not to be had.
    """
    if name not in NAMES:
        raise ValueError(f"no workload is called {name!r}; known are {', '.join(NAMES)}")
    if half is not None and name != "claude-code":
        raise ValueError(f"half: {name} has no halves, only claude-code has")
    if scale <= 0:
        raise ValueError(f"scale: {scale} is not above 0")
    if name in TRACES:
        return _read(name, trace, seed, max_context, half, scale, options)
    if name in GROWING:
        options["max_context"] = max_context
    if name in literature.SHAPES:
        made = literature.shape(name, seed, scale=scale, **options)
    else:
        made = MADE[name](seed, scale=scale, **options)
    return _fitting(made, max_context)


def _read(
    name: str,
    trace: Path | None,
    seed: int,
    max_context: int | None,
    half: str | None,
    scale: float,
    options: dict[str, Any],
) -> Workload:
    if trace is None:
        raise ValueError(f"{name} needs a trace to read")
    if not trace.exists():
        raise ValueError(f"{trace}: no such file or directory")
    if name == "claude-code":
        found = claude_code.load(trace, max_context=max_context, half=half, scale=scale, **options)
    elif name == "mooncake":
        found = mooncake.load(trace, max_context=max_context, scale=scale, **options)
    elif name == "recorded":
        found = recorded.load(trace, max_context=max_context, scale=scale, **options)
    else:
        kept = {"keep": options.pop("keep", 1 / 3) / scale, "shorten": options.pop("shorten", 4.0) * scale}
        found = mini_swe_agent.load(trace, seed, max_context=max_context, **kept, **options)
    if not found.runs:
        raise ValueError(f"{trace}: no run in it can be played; left out: {dict(found.left_out)}")
    return found


def _fitting(made: Workload, max_context: int | None) -> Workload:
    runs = [r for r in made.runs if not max_context or max(c.prompt.end for c in r.calls) <= max_context]
    left_out = Counter(made.left_out) + Counter({"longer than max_context": len(made.runs) - len(runs)})
    if not runs:
        raise ValueError(f"{made.name}: all runs have prompts above {max_context} tokens")
    return Workload(made.name, runs, left_out)
