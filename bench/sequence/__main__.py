"""Plays settings side by side and tells what each kept.

    python -m bench.sequence --workload w1 --options fixed=512,dynamic=32,output=4 --runs 12 --room 0.25,0.5,0.75

`live` runs are played at once, each call when it is due by the model of a CPU worker's costs, none while another runs:
counts are then the same at every play. `room` is the KV memory over what the live runs ever hold, `tier` the host
memory over the KV memory. Prompts are token ids made from the names of pieces; what was generated is repeated where a
later prompt holds it.

`weft` is the real core over the plug-in, told what `weft serve` knows of clients that send a session's id and a system
prompt; with `weft-named` they name the run, too; with `weft-hinted` they declare templates and mark ends besides.
`lru`, `saga` and `kvflow` are the plug-in with another policy, the last two with the hints of `weft-hinted`. `belady`
and `unlimited` are reckoned from the blocks that the calls of the first mode asked for, with both tiers as one.
`weft-stale` is `weft-hinted` whose messages come 5 s late, so that what they foretell has often passed.
`lying` tells the engine the contrary of the truth: who has just run is dead, who ran longest ago is needed at once.
With `weft-liar` every other run is of a tenant that declares that all its agents run again at once; the others are
those of whom that is not so, in all modes.

`--no-model` has tokens made up in place of a model: the same counts several times sooner, no seconds, no host tier.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cells import Cell, write_json
from bench.comparison import paired
from bench.machine import origin
from bench.sequence.engine import BLOCK, POLICIES, Figures, Setting, play
from bench.sequence.offline import belady, unlimited

MODES = ("stock", *POLICIES)


@dataclass(frozen=True, slots=True)
class Row:
    """One mode at one place. Tokens; `recomputed` over that of the first mode, of all runs and of every other one that
    never lies; `same` outputs as that generated.

    Of calls with the same prompt and another output, `tie` is how far the likeliest token was ahead of the next one, as
    logarithms, where they first differed: the most of all such calls. 0: there are none. `took` is what all calls took
    on the engine, in seconds, at each play.
    """

    room: float
    tier: float
    mode: str
    prompt: int
    device: int
    host: int
    recomputed: int
    ratio: float
    others: float | None
    same: int
    tie: float
    took: list[float]


def apart(setting: Setting) -> tuple[Figures, int]:
    """Play a setting, with a model in a process of its own: vLLM gives its memory back with that."""
    if not setting.model:
        return play(setting)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(play, (setting,))


def rows(settings: list[Setting], calls: dict[str, list[list[int]]], reps: int = 1) -> list[Row]:
    """All modes of one place, the first as what the others are compared with, and what could be had offline.

    `calls` gets the tokens of each call of each mode: prompt, found on the device, in the host tier. Played `reps`
    times, in turns: counts and outputs are the same each time, seconds are not.
    """
    made: list[Row] = []
    first: Figures | None = None
    blocks = 0
    for setting in settings:
        figures, blocks = apart(setting)
        first = first or figures
        calls[f"{setting.mode}, room {setting.room:g}, tier {setting.tier:g}"] = figures.steps
        same = sum(figures.answers[name].tokens == one.tokens for name, one in first.answers.items())
        made.append(_row(setting, setting.mode, figures, first, same, tie(first, figures)))
        print(made[-1], file=sys.stderr, flush=True)
    for rep in range(1, reps):
        for place in random.Random(rep).sample(range(len(settings)), len(settings)):
            made[place].took.append(apart(settings[place])[0].seconds)
    assert first is not None
    at = settings[0]
    for name, found in (
        ("belady", belady(first.asked, int(blocks * (1 + at.tier)))), ("unlimited", unlimited(first.asked)),
    ):  # fmt: skip
        made.append(_row(at, name, Figures(first.prompt, sum(found) * BLOCK), first, len(first.answers), 0.0))
    return made


def tie(one: Figures, other: Figures) -> float:
    """Where calls with the same prompt first differ: the most by which the first one's token was ahead of another."""
    found = [0.0]
    for name, mine in one.answers.items():
        its = other.answers[name]
        if mine.prompt == its.prompt:
            pairs = zip(mine.tokens, its.tokens, mine.ahead, strict=True)
            found += [ahead for a, b, ahead in pairs if a != b][:1]
    return round(max(found), 6)


def _row(at: Setting, mode: str, figures: Figures, first: Figures, same: int, tied: float) -> Row:
    found, prompt = figures.device + figures.host, figures.prompt
    ratio = round((prompt - found) / first.recomputed, 4)
    took = [figures.seconds] if figures.seconds and at.model else []
    theirs = first.recomputed_of_others
    others = round(figures.recomputed_of_others / theirs, 4) if figures.answers and theirs else None
    return Row(
        at.room, at.tier, mode, prompt, figures.device, figures.host, prompt - found, ratio, others, same, tied, took
    )  # fmt: skip


def table(made: list[Row], calls: int) -> str:
    """As Markdown."""
    names = ("room", "tier", "mode", "device hits", "host hits", "recomputed tokens", "over the first", "the others'",
             "same outputs", "near tie", "seconds", "over the first")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    first = made[0]
    for r in made:
        if (r.room, r.tier) != (first.room, first.tier):
            first = r
        lines.append(
            f"| {r.room:g} | {r.tier:g} | `{r.mode}` | {r.device / r.prompt:.1%} | {r.host / r.prompt:.1%} | "
            f"{r.recomputed:,} | {r.ratio:.3f} | {_ratio(r.others)} | {r.same} of {calls} | {r.tie:.2g} | "
            f"{_seconds(r, first)} |"
        )
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _seconds(row: Row, first: Row) -> str:
    """What the calls took, and that over the first mode's, with its 95 % interval."""
    if not row.took:
        return "- | -"
    over = paired(list(zip(row.took, first.took, strict=True)))
    assert over is not None
    interval = f" [{over.low:.3f}..{over.high:.3f}]" if over.low is not None else ""
    return f"{sum(row.took) / len(row.took):.1f} | {over.mean:.3f}{interval}"


def main() -> None:
    """Read the command line, play, tell."""
    parser = _parser()
    args = parser.parse_args()
    if not args.model and (any(args.tier) or args.reps > 1):
        parser.error("--no-model: has no host tier, and takes no seconds that could be compared")
    cell = Cell(
        args.workload, "", 1.0, 1, 0.0, 0, args.seed, scale=args.scale, options=args.options,
        max_context=args.max_context,
    )  # fmt: skip
    made: list[Row] = []
    calls: dict[str, list[list[int]]] = {}
    for room, tier in itertools.product(args.room, args.tier):
        settings = [
            Setting(mode, cell, args.trace, args.runs, args.live, room, tier, args.model) for mode in args.modes
        ]
        made += rows(settings, calls, args.reps)
    told = table(made, len(next(iter(calls.values()))))
    print(told)
    if args.out:
        about = {**origin("bench.sequence"), "calls": calls, "rows": [asdict(row) for row in made]}
        write_json(args.out / "sequence.json", about)
        (args.out / "sequence.md").write_text(f"`{about['command']}`\n\n{told}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.sequence", description=__doc__)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--options", default="")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--live", type=int, default=1)
    parser.add_argument("--room", type=_numbers, default=[0.5])
    parser.add_argument("--tier", type=_numbers, default=[0.0])
    parser.add_argument("--modes", type=lambda text: _known(text.split(",")), default=list(MODES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reps", type=int, default=1, help="plays of each, for their seconds")
    parser.add_argument("--no-model", dest="model", action="store_false", help="counts alone, several times sooner")
    parser.add_argument("--out", type=Path)
    return parser


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _known(modes: list[str]) -> list[str]:
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise argparse.ArgumentTypeError(f"no mode is called {unknown[0]!r}; there are {', '.join(MODES)}")
    return modes


if __name__ == "__main__":
    main()
