"""The report of a directory of cells: Markdown, JSON and plots.

Every figure is the mean over repetitions with [least..greatest]; behind it stands its ratio to the baseline (of a share
the difference), paired by seed, code and machine, with the 95 % interval over the pairs. `better` and `worse` are said
only where the whole interval is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.cells import CLOSED, REAL, Done, Ledger, commands, write_json
from bench.comparison import BASELINE, DIRECTION, GOAL, OURS, PAIRS, Column, Compared, Group, Versus, document, grouped
from bench.errors import BenchError
from bench.machine import DIRTY
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
PLAYED = (
    ("load as played", "load_played"),
    ("starved slots", "starved"),
    ("front, CPUs", "front_cpus"),
    ("client, CPUs", "client_cpus"),
    ("API servers, CPUs", "servers_cpus"),
    ("engines, CPUs", "engines_cpus"),
)
"""What is told of real cells beside their figures."""


def write(directory: Path) -> None:
    """Write DIR/report.md, report.json and plots/*.png from DIR/cells.jsonl. Raises BenchError without cells."""
    if not directory.is_dir():
        raise BenchError(f"there is no directory {directory}")
    ledger = Ledger(directory)
    done = list(ledger.read().values())
    if not done:
        raise BenchError(f"{directory} has no finished cells (cells.jsonl)")
    groups = grouped(done)
    told = commands(directory)
    write_json(directory / "report.json", {"commands": told, "origin": _origin(done), "groups": document(groups)})
    (directory / "report.md").write_text(markdown(done, told, ledger.unread))
    for number, group in enumerate(groups, 1):
        plots.write(group, directory / _picture(number, group))


def markdown(done: Sequence[Done], told: Sequence[Mapping[str, Any]], unread: int = 0) -> str:
    """The report of finished cells, in Markdown; `told` is what run.json tells of each command, the newest last.

    `unread` lines of cells.jsonl were not understood.
    """
    groups = grouped(done)
    compared = [one for group in groups for one in group.compared([name for name in TITLES if name in DIRECTION])]
    lines = [*_head(done, told, unread), *_meaning(compared), *_behind(groups, compared), *_lost(groups, compared)]
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


def _origin(done: Sequence[Done]) -> Mapping[str, Any]:
    machines = {json.dumps(one.machine, sort_keys=True) for one in done}
    return {"revisions": sorted({one.revision for one in done}), "machines": [json.loads(m) for m in sorted(machines)]}


def _head(done: Sequence[Done], told: Sequence[Mapping[str, Any]], unread: int) -> list[str]:
    origin = _origin(done)
    revisions, machines = origin["revisions"], origin["machines"]
    lines = ["# Report", ""]
    lines += [f"- Command: `{run['command']}`" for run in told if "command" in run]
    lines += [f"- Cells: {len(done)}; code: {', '.join(revisions)}"]
    if any(revision.endswith(DIRTY) for revision in revisions):
        lines.append(f"- **The code was dirty**: where a revision ends in `{DIRTY}`, files differed from that commit.")
    for machine in machines:
        accelerators = ", ".join(machine.get("accelerators") or ["no accelerator"])
        lines.append(
            f"- Machine: {machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB, "
            f"{accelerators}, {machine.get('system')}"
        )
    if len(revisions) > 1 or len(machines) > 1:
        lines.append("- **Cells of more than one code or machine**: means may mix them, pairs do not.")
    if unread:
        lines.append(f"- **{unread} lines of cells.jsonl were not understood** and are left out.")
    lines += dict.fromkeys(_versions(run["versions"]) for run in told if "versions" in run)
    lines += dict.fromkeys(_left_out(run["left_out"]) for run in told if run.get("left_out"))
    return lines


def _versions(versions: Mapping[str, str]) -> str:
    return "- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _left_out(counts: Mapping[str, int]) -> str:
    return "- Left out of the workload: " + ", ".join(f"{number} {reason}" for reason, number in counts.items())


def _meaning(compared: Sequence[Compared]) -> list[str]:
    judged = sum(one.versus.n >= PAIRS for one in compared)
    return [
        f"- Comparisons: {len(compared)}, of them {judged} of at least {PAIRS} pairs. Were there no differences at "
        f"all, 5 % of those (about {0.05 * judged:.0f}) would fall outside their interval by chance.",
        "",
        f"Each figure: mean [least..greatest] over repetitions, then its ratio to `{BASELINE}` (of a share the "
        "difference), paired by seed, code and machine: the mean over the pairs and its 95 % interval (Student's t). "
        "**worse** and better are said where the whole interval is on one side. Definitions: `bench/metrics.py`.",
        "",
    ]


def _behind(groups: Sequence[Group], compared: Sequence[Compared]) -> list[str]:
    """Every figure in which a system is certainly worse than the baseline; single pairs that are behind apart."""
    lines = [f"## Losses against {BASELINE}", ""]
    if not any(BASELINE in group.systems for group in groups):
        return [*lines, f"`{BASELINE}` was not played: nothing to compare with.", ""]
    return [*lines, *_losses([one for one in compared if one.against == BASELINE])]


def _lost(groups: Sequence[Group], compared: Sequence[Compared]) -> list[str]:
    """Every figure in which one of our systems is worse than one that a user could run instead."""
    if not any(system.startswith(OURS) for group in groups for system in group.systems):
        return []
    lines = ["## Where weft loses", ""]
    ours = [one for one in compared if one.system.startswith(OURS)]
    if not ours:
        return [*lines, "It was played beside no rival of the same code and machine: nothing to compare with.", ""]
    return [*lines, *_losses(ours)]


def _losses(compared: Sequence[Compared]) -> list[str]:
    certain = [_loss(one) for one in compared if one.worse]
    behind = [_loss(one) for one in compared if one.only_behind]
    lines = certain or ["None that the interval bears out."]
    if behind:
        lines += ["", f"Behind in the mean, of fewer than {PAIRS} repetitions:", "", *behind]
    return [*lines, ""]


def _loss(one: Compared) -> str:
    against = "" if one.against == BASELINE else f" against {one.against}"
    where = f"{one.system}{against}, {plots.title(one.group)}, {_column(one.group, one.at)}"
    return f"- {where}: {one.name} {_judged(one.versus, one.name)}"


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
    return lines + (_as_played(group) if group.cell.engine == REAL else [])


def _as_played(group: Group) -> list[str]:
    """What was seen of real cells beside their figures, means over repetitions; nothing where nothing was."""
    rows = []
    for system in group.systems:
        for at in group.columns:
            seen = [group.extra(system, at, name) for _, name in PLAYED]
            if any(seen):
                texts = ("-" if spread is None else number(spread.mean) for spread in seen)
                rows.append(f"| {system} | {_column(group, at)} | " + " | ".join(texts) + " |")
    if not rows:
        return []
    head = "| system | | " + " | ".join(heading for heading, _ in PLAYED) + " |"
    return ["### As played", "", head, "|---|---|" + "---:|" * len(PLAYED), *rows, ""]


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
    return _judged(versus, name)


def _judged(versus: Versus, name: str) -> str:
    verdict = {"": "", "better": " better", "worse": " **worse**"}[versus.verdict(DIRECTION[name])]
    return f"{versus}{verdict}"


def _column(group: Group, at: Column) -> str:
    if at is None:
        return "as recorded"
    return f"load {at:g}" if group.cell.arrivals == CLOSED else f"{at:g}/h"


def _picture(place: int, group: Group) -> str:
    return f"plots/{place:02d}-{re.sub(r'[^a-z0-9.]+', '-', plots.title(group).lower()).strip('-')}.png"
