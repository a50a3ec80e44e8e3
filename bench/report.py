"""The report of a directory of cells: Markdown, JSON and plots.

Every figure is the mean over repetitions with [least..greatest]; behind it stands its ratio to the baseline (of a share
the difference), paired by seed, with the 95 % interval over the pairs. `better` and `worse` are said only where the
whole interval is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.cells import CLOSED, Done, Ledger, write_json
from bench.comparison import BASELINE, DIRECTION, GOAL, PAIRS, Column, Group, document, grouped
from bench.errors import BenchError
from bench.metrics import SLACK

TITLES = {
    "turns_per_second": "Turns a second",
    "session_seconds_mean": "Session completion, mean, s",
    "session_seconds_p50": "Session completion, p50, s",
    "session_seconds_p95": "Session completion, p95, s",
    "ttft_seconds_p50": "TTFT, p50, s",
    "ttft_seconds_p99": "TTFT, p99, s",
    "worst_turn_seconds_p90": "A run's worst turn, p90, s",
    "hit_ratio": "Prompt tokens found in a cache",
    "ideal_hit_ratio": "What a cache without limit would have",
    "recomputed_tokens": "Tokens recomputed that a cache without limit would have",
    "longest_hold_seconds": "Longest hold, s",
    "slo_attainment": f"Runs within {SLACK:g} times their unloaded time",
    "errors": "Errors",
}
SHORT = (
    ("turns/s", "turns_per_second"),
    ("session mean s", "session_seconds_mean"),
    ("p95 s", "session_seconds_p95"),
    ("TTFT p50 s", "ttft_seconds_p50"),
    ("p99 s", "ttft_seconds_p99"),
    ("worst turn p90 s", "worst_turn_seconds_p90"),
    ("hit", "hit_ratio"),
    ("ideal", "ideal_hit_ratio"),
    ("recomputed", "recomputed_tokens"),
    ("within SLO", "slo_attainment"),
    ("errors", "errors"),
)
GAINS = (
    ("turns/s", "turns_per_second"),
    ("session mean", "session_seconds_mean"),
    ("session p95", "session_seconds_p95"),
    ("TTFT p50", "ttft_seconds_p50"),
    ("TTFT p99", "ttft_seconds_p99"),
    ("worst turn p90", "worst_turn_seconds_p90"),
    ("recomputed", "recomputed_tokens"),
)
WHOLE = ("recomputed_tokens", "errors")


def write(directory: Path) -> None:
    """Write DIR/report.md, report.json and plots/*.png from DIR/cells.jsonl. Raises BenchError without cells."""
    if not directory.is_dir():
        raise BenchError(f"there is no directory {directory}")
    done = list(Ledger(directory).read().values())
    if not done:
        raise BenchError(f"{directory} has no finished cells (cells.jsonl)")
    groups = grouped(done)
    run = _run(directory)
    write_json(directory / "report.json", {"run": run, "origin": _origin(done), "groups": document(groups)})
    (directory / "report.md").write_text(markdown(done, run))
    for number, group in enumerate(groups, 1):
        plots.write(group, directory / _picture(number, group))


def markdown(done: Sequence[Done], run: Mapping[str, Any]) -> str:
    """The report of finished cells, in Markdown; `run` is what run.json says."""
    groups = grouped(done)
    lines = [*_head(done, run), *_behind(groups)]
    for number, group in enumerate(groups, 1):
        lines += _section(group, _picture(number, group))
    return "\n".join(lines) + "\n"


def compact(groups: Sequence[Group]) -> Iterator[str]:
    """The chief figures as aligned text: a line for each system at each load, ratios to the baseline in brackets."""
    for group in groups:
        rows = [
            [_column(group, at), system, *(_short(group, system, at, name) for _, name in SHORT)]
            for at in group.columns
            for system in group.systems
        ]
        yield plots.title(group)
        yield from aligned([["", "system", *(head for head, _ in SHORT)], *rows])
        if group.cell.rate is not None:
            for system in group.systems:
                yield f"{system}: {group.capacity(system) or '-'} runs an hour at {GOAL:.0%} within SLO"
        yield ""


def gains(groups: Sequence[Group]) -> Iterator[str]:
    """What each system would change over the baseline, in per cent of its figure, as aligned text."""
    yield f"What you would gain over {BASELINE} (less is better but for turns/s):"
    rows = []
    for group in groups:
        for at in group.columns:
            for system in group.systems:
                if system != BASELINE:
                    changes = [_change(group, system, at, name) for _, name in GAINS]
                    size = f"{group.cell.workers} workers, tier {group.cell.tier:g}"
                    rows.append([f"{size}, {_column(group, at)}", system, *changes])
    yield from aligned([["", "system", *(head for head, _ in GAINS)], *rows])


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of text in columns, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        texts = zip(row, widths, strict=True)
        yield "  ".join(t.ljust(w) if place < 2 else t.rjust(w) for place, (t, w) in enumerate(texts)).rstrip()


def _change(group: Group, system: str, at: Column, name: str) -> str:
    ours, base = group.spread(system, at, name), group.spread(BASELINE, at, name)
    if ours is None or base is None:
        return "-"
    if not base.mean:
        return "0" if not ours.mean else f"0 -> {number(ours.mean, name)}"
    return f"{ours.mean / base.mean - 1:+.1%}"


def number(value: float, name: str = "") -> str:
    """A figure with four significant digits, or whole with thousands set apart where it counts things."""
    if name in WHOLE:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(group: Group, system: str, at: Column, name: str) -> str:
    if (spread := group.spread(system, at, name)) is None:
        return "-"
    text = number(spread.mean, name)
    versus = group.versus(system, at, name)
    return f"{text} ({versus.brief})" if versus else text


def _run(directory: Path) -> Mapping[str, Any]:
    try:
        read: Mapping[str, Any] = json.loads((directory / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return read


def _origin(done: Sequence[Done]) -> Mapping[str, Any]:
    machines = {json.dumps(one.machine, sort_keys=True) for one in done}
    return {"revisions": sorted({one.revision for one in done}), "machines": [json.loads(m) for m in sorted(machines)]}


def _head(done: Sequence[Done], run: Mapping[str, Any]) -> list[str]:
    origin = _origin(done)
    lines = ["# Report", ""]
    if "command" in run:
        lines.append(f"- Command: `{run['command']}`")
    lines += [f"- Cells: {len(done)}; code: {', '.join(origin['revisions'])}"]
    for machine in origin["machines"]:
        accelerators = ", ".join(machine.get("accelerators") or ["no accelerator"])
        lines.append(
            f"- Machine: {machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB, "
            f"{accelerators}, {machine.get('system')}"
        )
    if "versions" in run:
        lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()))
    left_out = run.get("left_out") or {}
    if left_out:
        lines.append("- Left out of the workload: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items()))
    lines += [
        "",
        f"Each figure: mean [least..greatest] over repetitions, then its ratio to `{BASELINE}` (of a share the "
        "difference), paired by seed: the mean over the pairs and its 95 % interval (Student's t). **worse** and "
        "better are said where the whole interval is on one side. Definitions: `bench/metrics.py`.",
        "",
    ]
    return lines


def _behind(groups: Sequence[Group]) -> list[str]:
    """Every figure in which a system is certainly worse than the baseline; single pairs that are behind apart."""
    certain, single = [], []
    for group in groups:
        for system in group.systems:
            for at in group.columns:
                for name, direction in DIRECTION.items():
                    versus = group.versus(system, at, name) if name in TITLES else None
                    if versus is None:
                        continue
                    where = f"- {system}, {plots.title(group)}, {_column(group, at)}"
                    line = f"{where}: {name} {_versus(group, system, at, name)}"
                    if versus.verdict(direction) == "worse":
                        certain.append(line)
                    elif versus.n < PAIRS and versus.behind(direction):
                        single.append(line)
    lines = [f"## Losses against {BASELINE}", ""]
    if not any(BASELINE in group.systems for group in groups):
        return [*lines, f"`{BASELINE}` was not played: nothing to compare with.", ""]
    lines += certain or ["None that the interval bears out."]
    if single:
        lines += ["", f"Behind in the mean, of fewer than {PAIRS} repetitions:", "", *single]
    return [*lines, ""]


def _section(group: Group, picture: str) -> list[str]:
    seeds = ", ".join(map(str, group.seeds))
    facts = f"Repetitions: {group.reps}; seeds: {seeds}; trace: {group.cell.trace or 'none, generated'}."
    lines = [f"## {plots.title(group)}", "", facts, ""]
    if group.reps < PAIRS:
        lines += [f"Fewer than {PAIRS} repetitions: nothing here is said to be better or worse.", ""]
    lines += [f"![{plots.title(group)}]({picture})", ""]
    if group.cell.rate is not None:
        lines += [f"### Runs an hour at which {GOAL:.0%} keep to {SLACK:g} times their unloaded time", ""]
        lines += ["| system | runs an hour |", "|---|---:|"]
        lines += [f"| {system} | {group.capacity(system) or '-'} |" for system in group.systems] + [""]
    for name, heading in TITLES.items():
        lines += [f"### {heading} (`{name}`)", "", *_table(group, name), ""]
    return lines


def _table(group: Group, name: str) -> Iterator[str]:
    yield "| system | " + " | ".join(_column(group, at) for at in group.columns) + " |"
    yield "|---|" + "---:|" * len(group.columns)
    for system in group.systems:
        yield f"| {system} | " + " | ".join(_text(group, system, at, name) for at in group.columns) + " |"


def _text(group: Group, system: str, at: Column, name: str) -> str:
    spread = group.spread(system, at, name)
    if spread is None:
        return "-"
    text = number(spread.mean, name)
    if spread.n > 1 and spread.low != spread.high:
        text += f" [{number(spread.low, name)}..{number(spread.high, name)}]"
    return f"{text} {_versus(group, system, at, name)}".rstrip()


def _versus(group: Group, system: str, at: Column, name: str) -> str:
    if (versus := group.versus(system, at, name)) is None:
        return ""
    verdict = {"": "", "better": " better", "worse": " **worse**"}[versus.verdict(DIRECTION[name])]
    return f"{versus}{verdict}"


def _column(group: Group, at: Column) -> str:
    if at is None:
        return "as recorded"
    return f"load {at:g}" if group.cell.arrivals == CLOSED else f"{at:g}/h"


def _picture(place: int, group: Group) -> str:
    return f"plots/{place:02d}-{re.sub(r'[^a-z0-9.]+', '-', plots.title(group).lower()).strip('-')}.png"
