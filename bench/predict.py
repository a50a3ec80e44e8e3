"""Scores what the core learns about a step's end on real Claude Code sessions, against simpler estimators.

    python -m bench.predict --traces claude_code_sessions.tar.xz --out DIR

Half A are the files of even index in the sorted names, half B the others; constants were chosen on A. Files that begin
with the same three calls are copies of one session: the longest is kept. A sub-agent is a session of its own, in its
file's half. The trace has no time of day, so a file starts every ten minutes; everything is predicted first and learned
when its event has come, a session's end an hour after its last step. The trace rounds gaps to about a second; after a
step whose end it did not record (one in eleven) the gap is neither scored nor learned.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import random
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.estimators import Markov, Predictor, Saga, Weft
from scheduler.estimates import Estimates, Past, Place, kind

START_EVERY, GIVEN_UP_AFTER = 600.0, 3600.0  # seconds
QUANTILES = (0.5, 0.9, 0.99)
GRID = tuple(i / 20 for i in range(1, 20))
RESAMPLES, SEED = 1000, 1
ARRIVAL, END, GONE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Call:
    """One LLM call. `end` is None where the trace did not record it; both times in seconds."""

    start: float
    end: float | None
    tokens: int
    stop: str
    role: str


@dataclass(frozen=True, slots=True)
class Session:
    """The calls of one session, in order; `file` is what it is resampled with."""

    file: str
    begins: float
    calls: list[Call]


def read_trace(path: Path) -> Iterator[tuple[str, list[list[Call]]]]:
    """(file, sessions) in the order of the names; the main session first, then its sub-agents."""
    documents: dict[str, Any] = {}
    with lzma.open(path) as packed, tarfile.open(fileobj=packed) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".json") and (file := archive.extractfile(member)):
                requests = json.load(file)["requests"]
                agents = [(r["subagent_type"], r["t"], r["requests"]) for r in requests if r["type"] == "subagent"]
                documents[member.name] = [calls(*agent) for agent in [("main", 0.0, requests), *agents]]
    for name in sorted(documents):
        yield name, [session for session in documents[name] if session]


def calls(agent: str, began: float, requests: Iterable[dict[str, Any]]) -> list[Call]:
    """The calls of one agent that began so many seconds into its file. Its role is what it is, with its model."""
    return [
        Call(
            start=began + row["t"],
            end=began + row["t"] + row["api_time"] if "api_time" in row else None,
            tokens=row["out"],
            stop=kind(row["stop"]),
            role=f"{agent}/{row['model']}",
        )
        for row in requests
        if row["type"] != "subagent"
    ]


def halves(trace: Iterable[tuple[str, list[list[Call]]]]) -> tuple[list[Session], list[Session], int]:
    """Half A, half B and the number of files left out as copies."""
    files = list(trace)
    longest: dict[tuple[Any, ...], int] = {}
    for index, (_, sessions) in enumerate(files):
        opening = tuple((call.start, call.tokens, call.stop) for call in sessions[0][:3])
        best = longest.setdefault(opening, index)
        if len(sessions[0]) > len(files[best][1][0]):
            longest[opening] = index
    split: list[list[Session]] = [[], []]
    for index in sorted(longest.values()):
        name, sessions = files[index]
        split[index % 2] += [Session(name, START_EVERY * (index // 2), session) for session in sessions]
    return split[0], split[1], len(files) - len(longest)


class Scores:
    """Per predictor and measure: the sum and the number of scores of each file."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        )
        self.chances: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        self.ratios: dict[str, list[float]] = defaultdict(list)

    def add(self, who: str, measure: str, file: str, value: float) -> None:
        """One score."""
        cell = self.sums[measure][who][file]
        cell[0] += value
        cell[1] += 1

    def quantity(self, who: str, name: str, file: str, grid: dict[float, float], truth: float) -> None:
        """Score one prediction in log units: pinball losses of its quantiles, and CRPS, twice their mean on a grid."""
        for q in QUANTILES:
            self.add(who, f"{name} below p{q * 100:g}", file, truth <= grid[q])
            self.add(who, f"{name} pinball p{q * 100:g}", file, pinball(q, grid[q], truth))
        self.add(who, f"{name} CRPS", file, 2 * sum(pinball(q, grid[q], truth) for q in GRID) / len(GRID))

    def left(self, who: str, file: str, median: float, high: float, truth: int) -> None:
        """Score a prediction of the steps left."""
        self.add(who, "steps left below p50", file, truth <= median)
        self.add(who, "steps left below p90", file, truth <= high)
        self.add(who, "steps left MAE", file, abs(truth - median))
        self.ratios[who].append(abs(truth - median) / max(truth, 1))

    def never(self, who: str, file: str, chance: float, ended: bool) -> None:
        """Score a chance that the session is over."""
        self.add(who, "never Brier", file, (chance - ended) ** 2)
        self.add(who, "never log loss", file, -math.log(max(chance if ended else 1 - chance, 1e-9)))
        self.chances[who].append((chance, ended))


def pinball(q: float, predicted: float, truth: float) -> float:
    """The loss whose minimum is the quantile, in natural log units of value."""
    off = math.log(max(truth, 0.01) / max(predicted, 0.01))
    return max(q * off, (q - 1) * off)


def events(sessions: list[Session]) -> list[tuple[float, int, int, int]]:
    """(time, session, call, what happens) in order of time; a session's own events stay in their order."""
    found = []
    for number, session in enumerate(sessions):
        now = session.begins
        for i, call in enumerate(session.calls):
            for what, at in (ARRIVAL, call.start), (END, call.end):
                now = now if at is None else max(now, session.begins + at)
                found.append((now, number, i, what))
        found.append((now + GIVEN_UP_AFTER, number, len(session.calls), GONE))
    return sorted(found)


def play(sessions: list[Session], predictors: dict[str, Predictor], scores: Scores | None) -> None:
    """Run the sessions' events past the predictors: each predicts, is scored, and learns when the truth arrives."""
    pasts: dict[int, Past] = defaultdict(Past)
    for _, number, i, what in events(sessions):
        session, past = sessions[number], pasts[number]
        before = session.calls[i - 1]
        if what == ARRIVAL:
            if i:
                arrive(predictors, Place("t", before.role, (), past), gap_of(session, i))
                gap = gap_of(session, i)
                past = pasts[number] = past if gap is None else past.returned(gap)
        elif what == END:
            call = session.calls[i]
            answer(predictors, session, Place("t", call.role, (), past), i, scores)
            pasts[number] = past.ended(call.stop, call.tokens)
            if scores:
                judge(predictors, session, Place("t", call.role, (), pasts[number]), i, scores)
        else:
            for predictor in predictors.values():
                predictor.never(Place("t", before.role, (), past))


def gap_of(session: Session, i: int) -> float | None:
    """Seconds from the end of the call before to this one, if its end is known."""
    end = session.calls[i - 1].end
    return None if end is None else max(session.calls[i].start - end, 0.01)


def arrive(predictors: dict[str, Predictor], place: Place, gap: float | None) -> None:
    """The next call has arrived."""
    for predictor in predictors.values():
        predictor.returned(place, gap)


def answer(predictors: dict[str, Predictor], session: Session, place: Place, i: int, scores: Scores | None) -> None:
    """The answer has its length: score what was predicted at its arrival, and learn it."""
    tokens = session.calls[i].tokens
    for who, predictor in predictors.items():
        if scores:
            quantile = predictor.output(place)
            grid = {q: quantile(q) for q in (*GRID, *QUANTILES)}
            scores.quantity(who, "output", session.file, grid, max(tokens, 1))
        predictor.answered(place, tokens)


def judge(predictors: dict[str, Predictor], session: Session, place: Place, i: int, scores: Scores) -> None:
    """Score what is predicted at the end of a call: the gap, whether there is one, and the calls left."""
    left = len(session.calls) - i - 1
    gap = gap_of(session, i + 1) if left else None
    for who, predictor in predictors.items():
        quantile, never = predictor.gap(place)
        if gap is not None:
            grid = {q: quantile(q) for q in (*GRID, *QUANTILES)}
            scores.quantity(who, "gap", session.file, grid, gap)
        scores.never(who, session.file, never, not left)
        steps = predictor.steps_left(place)
        scores.left(who, session.file, steps(0.5), steps(0.9), left)


def auc(chances: list[tuple[float, bool]]) -> float:
    """The chance that an ended session got the higher probability than one that went on; ties count half."""
    ranks: dict[float, list[int]] = defaultdict(lambda: [0, 0])
    for chance, ended in chances:
        ranks[chance][ended] += 1
    below = wins = 0.0
    for chance in sorted(ranks):
        on, over = ranks[chance]
        wins += over * (below + on / 2)
        below += on
    over = sum(ended for _, ended in chances)
    return wins / (over * below) if over and below else math.nan


def report(scores: Scores) -> dict[str, dict[str, Any]]:
    """Per measure: each predictor's mean and, for the others, Weft's difference with its 95 % interval over files."""
    rows: dict[str, dict[str, Any]] = {}
    for measure, by in scores.sums.items():
        means = {who: mean(cells.values()) for who, cells in by.items()}
        rows[measure] = {"mean": means, "n": int(sum(n for _, n in by["weft"].values()))}
        rows[measure]["difference"] = {who: interval(by["weft"], by[who]) for who in by if who != "weft"}
    medians = {who: sorted(values)[len(values) // 2] for who, values in scores.ratios.items()}
    rows["steps left median relative error"] = {"mean": medians}
    rows["never AUC"] = {"mean": {who: auc(chances) for who, chances in scores.chances.items()}}
    return rows


def mean(cells: Iterable[list[float]]) -> float:
    """The mean over all scores of the given files."""
    total = count = 0.0
    for value, n in cells:
        total, count = total + value, count + n
    return total / count if count else math.nan


def interval(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> tuple[float, float]:
    """95 % bootstrap interval, over files, of the difference of the means (ours - theirs), paired."""
    files = sorted(ours)
    draw = random.Random(SEED)
    found = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(files, k=len(files))
        found.append(mean(ours[f] for f in drawn) - mean(theirs[f] for f in drawn))
    found.sort()
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = list(next(iter(rows.values()))["mean"])
    lines = ["| measure | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for measure, row in rows.items():
        cells = []
        for who in names:
            span = row.get("difference", {}).get(who) if " below " not in measure else None
            cells.append(f"{row['mean'][who]:.4g}" + (f" ({span[0]:+.2g} to {span[1]:+.2g})" if span else ""))
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(sessions: list[Session]) -> dict[str, float]:
    """Mean microseconds a call of each method of a taught `Estimates`."""
    estimates = Estimates()
    weft = Weft(estimates)
    play(sessions, {"weft": weft}, None)
    places: list[tuple[Place, Call, float]] = []
    for session in sessions:
        past = Past()
        for i, call in enumerate(session.calls[:-1]):
            past = past.ended(call.stop, call.tokens)
            gap = gap_of(session, i + 1) or 1.0
            places.append((Place("t", call.role, (), past), call, gap))
            past = past.returned(gap)
    work: dict[str, Callable[[Place, Call, float], object]] = {
        "gap": lambda p, c, g: estimates.gap(p),
        "gap and index": lambda p, c, g: estimates.gap(p).index(g),
        "returned": lambda p, c, g: estimates.returned(p, g),
        "output_tokens": lambda p, c, g: estimates.output_tokens(p),
        "output": lambda p, c, g: estimates.output(p, c.tokens),
        "steps_left and median": lambda p, c, g: estimates.steps_left(p).quantile(0.5),
        "never": lambda p, c, g: estimates.never(p),
    }
    spent = {}
    for name, call_it in work.items():
        began = time.perf_counter()
        for place, call, gap in places:
            call_it(place, call, gap)
        spent[name] = (time.perf_counter() - began) / len(places) * 1e6
    return spent


def main(arguments: list[str] | None = None) -> None:
    """Read, play, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    half_a, half_b, copies = halves(read_trace(options.traces))
    runs: dict[str, Any] = {}
    for name, taught, scored in (("B, taught by A", half_a, half_b), ("B, cold", [], half_b), ("A, cold", [], half_a)):
        print(name, file=sys.stderr, flush=True)
        predictors: dict[str, Predictor] = {"weft": Weft(Estimates()), "markov": Markov(), "saga": Saga()}
        play(taught, predictors, None)
        scores = Scores()
        play(scored, predictors, scores)
        runs[name] = report(scores)
        print(f"\n### {name}\n\n{table(runs[name])}")
    result = {
        "runs": runs,
        "sessions": {"A": len(half_a), "B": len(half_b)},
        "calls": {name: sum(len(s.calls) for s in half) for name, half in (("A", half_a), ("B", half_b))},
        "copies_left_out": copies,
        "microseconds": cost(half_b),
        "seed": SEED,
        "python": platform.python_version(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "predict.json").write_text(json.dumps(result, indent=1))
    print("\n" + json.dumps({name: value for name, value in result.items() if name != "runs"}))


if __name__ == "__main__":
    main()
