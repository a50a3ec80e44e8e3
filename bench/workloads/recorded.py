"""The JSONL traces that Weft itself records (`server/trace.py`), made into runs again.

A segment's hash names the prompt up to its end, so equal hashes are one piece, in all runs of a file; two files have
different secrets and share nothing. A piece's tokens are exact where a prompt ended at it, else as the trace shared
them out. Prompts of the completions API are recorded in segments of fixed length, so the last one of a prompt is not
seen to be repeated. Times are those of the recording: a gap is from the last awaited end to the arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.workloads.blocks import share
from bench.workloads.files import lines
from bench.workloads.runs import ASSISTANT, Call, Piece, Run, Workload

FORMAT = 1
TOOL_STOPS = ("tool_calls", "tool_use")


@dataclass(slots=True, eq=False)
class Step:
    """One line of a trace that ended well. Times are Unix seconds."""

    id: str
    after: list[str]
    tenant: str
    workflow: str
    session: str
    parent: str | None
    role: str
    program: str
    arrived: float
    finished: float
    segments: list[tuple[str, int]]
    prompt: int
    output: int
    stop: str
    file: int = 0
    waits: list[Step] = field(default_factory=list)

    def before(self, other: Step) -> bool:
        """In the same run, and it came earlier."""
        return (self.tenant, self.workflow) == (other.tenant, other.workflow) and self.arrived < other.arrived


def load(path: Path, *, max_context: int | None = None, scale: float = 1.0) -> Workload:
    """The runs of a trace file, or of all `*.jsonl` of a directory; arrivals are seconds since the first of all.

    Left out: steps that failed, were cancelled, or have no prompt (what followed them follows what they followed), and
    runs with a prompt above `max_context` tokens as played. Raises ValueError for what is no trace, by file and line.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no trace (*.jsonl) in it")
    left_out = Counter[str]()
    steps: list[Step] = []
    pieces: dict[Step, Piece] = {}
    for number, file in enumerate(files):
        ours = _read(file, number, left_out)
        tree = _Tree(f"recorded/{number}", ours, scale)
        pieces |= {step: tree.prompt(step) for step in ours}
        steps += ours
    begun = min((step.arrived for step in steps), default=0.0)
    flows: dict[tuple[int, str, str], list[Step]] = {}
    for step in sorted(steps, key=lambda one: one.arrived):
        flows.setdefault((step.file, step.tenant, step.workflow), []).append(step)
    runs = []
    for (number, tenant, workflow), ours in flows.items():
        if max_context and max(pieces[step].end for step in ours) > max_context:
            left_out["longer than max_context"] += 1
            continue
        calls = _calls(ours, pieces, scale)
        runs.append(Run(f"{number}-{workflow}", ours[0].program, calls, tenant, ours[0].arrived - begun))
    share(runs)
    return Workload("recorded", runs, left_out)


def _read(path: Path, number: int, left_out: Counter[str]) -> list[Step]:
    """The steps of one file, in the order they arrived; `after` of what is left out is passed on."""
    steps: list[Step] = []
    instead: dict[str, list[str]] = {}
    headed = False
    for line, row in lines(path, cut=True):
        try:
            if row["kind"] == "header":
                if row["format"] != FORMAT:
                    raise ValueError(f"format {row['format']} is not known")
                headed = True
            elif not headed:
                raise ValueError("no header comes before it")
            elif row["kind"] == "step" and row["state"] == "finished" and row["prompt_tokens"] and row["segments"]:
                steps.append(_step(row, number))
            elif row["kind"] == "step":
                reason = "no prompt" if row["state"] == "finished" else str(row["state"])
                left_out[f"step {reason}"] += 1
                instead[row["step"]] = list(row["after"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {line}: not a line of a trace: {error!r}") from None
    steps.sort(key=lambda step: step.arrived)
    known = {step.id: step for step in steps}
    latest: dict[tuple[str, str, str], Step] = {}
    for step in steps:
        session = (step.tenant, step.workflow, step.session)
        step.waits = _waits(step, known, instead, latest.get(session))
        latest[session] = step
    return steps


def _step(row: Mapping[str, Any], number: int) -> Step:
    segments = [(str(name), int(tokens)) for name, tokens in row["segments"]]
    workflow, session = str(row["workflow"]), str(row["session"])
    role = row["role"] or session
    return Step(
        row["step"], list(row["after"]), row["tenant"], workflow, session, row["parent"], role,
        row["template"] or "recorded", float(row["arrived"]), float(row["finished"]), segments,
        int(row["prompt_tokens"]), max(1, int(row["output_tokens"] or 0)), row["stop"] or "stop", number,
    )  # fmt: skip


def _waits(step: Step, known: Mapping[str, Step], instead: Mapping[str, list[str]], before: Step | None) -> list[Step]:
    """What the step followed and had ended when it came; else the session's step before it."""
    open_, seen, found = list(step.after), set(step.after), list[Step]()
    while open_:
        name = open_.pop()
        if (one := known.get(name)) is not None and one.before(step):
            found.append(one)
        for other in instead.get(name, ()):
            if other not in seen:
                seen.add(other)
                open_.append(other)
    if not found and before is not None:
        found = [before]
    ended = [one for one in found if one.finished <= step.arrived]
    return ended or sorted(found, key=lambda one: one.finished)[:1]


class _Tree:
    """The pieces of one file's prompts."""

    def __init__(self, name: str, steps: Iterable[Step], scale: float) -> None:
        self._name, self._scale = name, scale
        self._exact = {step.segments[-1][0]: step.prompt for step in steps}
        self._made: dict[str, tuple[Piece, int]] = {}

    def prompt(self, step: Step) -> Piece:
        """The last piece of a step's prompt."""
        last: tuple[Piece | None, int] = (None, 0)
        for start, (name, _) in enumerate(step.segments):
            if name not in self._made:
                stop = next(i for i in range(start, len(step.segments)) if step.segments[i][0] in self._exact)
                self._lay(step.segments[start : stop + 1], *last)
            last = self._made[name]
        assert last[0] is not None
        return last[0]

    def _lay(self, segments: list[tuple[str, int]], above: Piece | None, known: int) -> None:
        """Pieces for segments that end where a prompt's tokens are known exactly."""
        total = max(0, self._exact[segments[-1][0]] - known)
        sizes = [tokens for _, tokens in segments]
        weights = sizes if any(sizes) else [1] * len(sizes)
        for (name, _), upto in zip(segments, accumulate(weights), strict=True):
            end = known + total * upto // sum(weights)
            size = round(end / self._scale) - (above.end if above else 0)
            above = Piece(f"{self._name}/{name}", max(0 if above else 1, size), above)
            self._made[name] = above, end


def _calls(steps: list[Step], pieces: Mapping[Step, Piece], scale: float) -> list[Call]:
    begun = steps[0].arrived
    calls: dict[str, Call] = {}
    latest: dict[str, Call] = {}
    for step in steps:
        after = tuple(calls[one.id] for one in step.waits)
        last = max((one.finished for one in step.waits), default=begun)
        prompt, output = pieces[step], max(1, round(step.output / scale))
        tools = ("tool",) if step.stop in TOOL_STOPS else ()
        gap = max(0.0, step.arrived - last)
        call = Call(step.session, step.role, prompt, output, after, None, gap, None, step.stop, tools, step.parent)
        if (before := latest.get(step.session)) is not None and before.answer is None:
            before.answer = _answer(before, prompt)
        calls[step.id] = latest[step.session] = call
    return list(calls.values())


def _answer(call: Call, following: Piece) -> Piece | None:
    """The first piece that the next prompt adds to the whole of this one, if it may be what was generated."""
    piece: Piece | None = following
    while piece is not None and piece.parent is not call.prompt:
        piece = piece.parent
    if piece is None or not call.output / 2 <= piece.tokens <= call.output * 2:
        return None
    piece.speaker = ASSISTANT
    return piece
