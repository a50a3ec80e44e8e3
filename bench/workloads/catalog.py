"""All workloads by name."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.workloads import claude_code, coding, kvflow, literature, mini_swe_agent, mooncake, recorded, tenants
from bench.workloads.runs import Workload

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
READERS: dict[str, Callable[..., Workload]] = {
    "mini-swe-agent": mini_swe_agent.load,
    "claude-code": claude_code.load,
    "mooncake": mooncake.load,
    "recorded": recorded.load,
}
TRACES = tuple(READERS)
NAMES = (*TRACES, *MADE, *literature.SHAPES)
OURS = ("name", "path", "seed", "max_context", "half", "scale")
"""Arguments of readers and generators that are not a workload's own options."""

KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


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
    generator. Raises ValueError for an unknown name or option, a trace that is missing or cannot be read, and a half
    that is not to be had.
    """
    if name not in NAMES:
        raise ValueError(f"no workload is called {name!r}; known are {', '.join(NAMES)}")
    if half is not None and name != "claude-code":
        raise ValueError(f"half: {name} has no halves, only claude-code has")
    if scale <= 0:
        raise ValueError(f"scale: {scale} is not above 0")
    _check(name, options)
    if name in TRACES:
        return _read(name, trace, seed, max_context, half, scale, options)
    if name in GROWING:
        options["max_context"] = max_context
    if name in literature.SHAPES:
        made = literature.shape(name, seed, scale=scale, **options)
    else:
        made = MADE[name](seed, scale=scale, **options)
    return _fitting(made, max_context)


def _check(name: str, options: Mapping[str, Any]) -> None:
    made = READERS.get(name) or MADE.get(name) or literature.shape
    known = {one.name: str(one.annotation) for one in inspect.signature(made).parameters.values()}
    own = {option: kind for option, kind in known.items() if option not in OURS}
    for option, value in options.items():
        if option not in own:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(own) or 'none'}")
        if type(value) not in KINDS[own[option]]:
            raise ValueError(f"{name}: {option}={value} is no {own[option]}")


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
    if name == "mini-swe-agent":
        kept = {"keep": options.pop("keep", 1 / 3) / scale, "shorten": options.pop("shorten", 4.0) * scale}
        found = mini_swe_agent.load(trace, seed, max_context=max_context, **kept, **options)
    else:
        halves = {"half": half} if name == "claude-code" else {}
        found = READERS[name](trace, max_context=max_context, scale=scale, **halves, **options)
    if not found.runs:
        raise ValueError(f"{trace}: no run in it can be played; left out: {dict(found.left_out)}")
    return found


def _fitting(made: Workload, max_context: int | None) -> Workload:
    if not made.runs:
        raise ValueError(f"{made.name}: with these options it has no run")
    runs = [r for r in made.runs if not max_context or max(c.prompt.end for c in r.calls) <= max_context]
    left_out = Counter(made.left_out) + Counter({"longer than max_context": len(made.runs) - len(runs)})
    if not runs:
        raise ValueError(f"{made.name}: all runs have prompts above {max_context} tokens")
    return Workload(made.name, runs, left_out)
