"""PNG plots of a group of cells: one axis a figure, one line a system, all systems in each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cells import CLOSED, TRACE
from bench.comparison import BASELINE, GOAL, Group
from bench.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3e9d", "#8c510a", "#4d9221", "#c51b7d",
    "#35978f", "#b2182b", "#4575b4", "#999933", "#666666", "#f768a1", "#1b7837", "#b15928",
)  # fmt: skip
MARKERS = "osD^vP*Xp<>hd8"


def write(group: Group, path: Path) -> None:
    """Write the group's plots as one PNG file. Raises BenchError where matplotlib is not installed."""
    figure = drawn(group)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def drawn(group: Group) -> Figure:
    """The figure: throughput over the baseline's (plain where there is none), tails, hit ratio, objective."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("plots need matplotlib: pip install 'weft[bench]'") from error
    against = BASELINE in group.systems and len(group.systems) > 1
    names = [
        "turns_per_second", "worst_turn_seconds_p90", "session_seconds_p95", "hit_ratio",
        *(["slo_attainment"] if group.cell.arrivals != CLOSED else []),
    ]  # fmt: skip
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(12, 4.2 * rows + 0.6 + 0.05 * len(group.systems)), layout="constrained")
    axes = [figure.add_subplot(rows, 2, place) for place in range(1, len(names) + 1)]
    for axis, name in zip(axes, names, strict=True):
        _axis(axis, group, name, against and name == "turns_per_second")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=9, frameon=False)
    figure.suptitle(title(group), fontsize=11)
    return figure


def title(group: Group) -> str:
    """What the cells of a group have in common, in a line."""
    cell = group.cell
    workers = f"{cell.workers} worker{'s' if cell.workers != 1 else ''}"
    tier = f"host tier {cell.tier:g} x KV" if cell.tier else "no host tier"
    parts = [cell.workload, cell.engine, cell.profile, workers, tier]
    parts += [f"half {cell.half}"] if cell.half else []
    parts += [f"prompts up to {cell.max_context:,}"] if cell.max_context else []
    parts += [f"lengths / {cell.scale:g}"] if cell.scale != 1 else []
    parts += [cell.options.replace(",", ", ")] if cell.options else []
    if cell.arrivals != CLOSED:
        parts.append("arrivals as recorded" if cell.arrivals == TRACE else "Poisson arrivals")
    return ", ".join(parts)


def _axis(axis: Axes, group: Group, name: str, against: bool) -> None:
    for number, system in enumerate(group.systems):
        places, means, below, above = [], [], [], []
        for at in group.columns:
            middle, low, high = _point(group, system, at, name, against)
            if middle is not None:
                places.append(at or 0.0)
                means.append(middle)
                below.append(max(0.0, middle - (middle if low is None else low)))
                above.append(max(0.0, (middle if high is None else high) - middle))
        colour = "black" if system == BASELINE else COLOURS[(number - 1) % len(COLOURS)]
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        style |= {"linewidth": 2.2 if system in (BASELINE, "weft") else 1.3, "capsize": 2, "elinewidth": 0.8}
        axis.errorbar(places, means, yerr=(below, above), label=system, **style)
    axis.set_xlabel(axis_name(group))
    axis.set_ylabel(f"turns_per_second over {BASELINE}" if against else name)
    axis.grid(alpha=0.3)
    if name == "slo_attainment":
        axis.axhline(GOAL, color="grey", linestyle="--", linewidth=0.8)
    if against:
        axis.axhline(1.0, color="grey", linestyle="--", linewidth=0.8)
    elif "seconds" in name:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_ylim(bottom=0)


def axis_name(group: Group) -> str:
    """What the columns of a group are."""
    if group.cell.arrivals == CLOSED:
        return "load (live contexts over the engines' KV)"
    return "runs an hour" if group.cell.rate is not None else "as recorded"


Point = tuple[float | None, float | None, float | None]


def _point(group: Group, system: str, at: float | None, name: str, against: bool) -> Point:
    """The middle and the ends of the bar: of a ratio its interval, of a figure its least and greatest repetition."""
    if against:
        versus = group.versus(system, at, name)
        if versus is None and system == BASELINE and group.spread(system, at, name):
            return (1.0, None, None)
        return (versus.mean, versus.low, versus.high) if versus else (None, None, None)
    spread = group.spread(system, at, name)
    return (spread.mean, spread.low, spread.high) if spread else (None, None, None)
