"""How well the shapes of agent programs are foreseen while they are being learned. Seeded, no clock, no network.

    python -m bench.shapes --seed 0 --out DIR

Each shape is a generator of runs: steps with a role, the steps they follow, the tools they call, and times. Noise
replaces a step by one of another role, leaves it out, or adds one, each with a third of the rate per step, and abandons
the run with a third of the rate. The runs of a shape are played one after the other into `Transitions`, `Learned` and
`Progress`, as the core does it: every figure is of a prediction made before its answer was seen.

* next role: at the end of a step, against the role of the first step that follows it (or the end of its line).
  Accuracy and log loss (nats), of `Transitions` and of first-order Markov counts over roles with a pseudo count of 1.
* STE: at the end of a step, for each role that runs again and does not run now, the predicted steps-to-execution
  against the steps on the way to it in the run graph; an infinite prediction counts as 10 steps. Edges of a
  probability under 0.1 do not count. A template that is learned is rendered once a run, before it.
* remaining: the expected number of further steps against their number, mean absolute error, in steps.
* cold start: the first run whose next-role accuracy (mean over repetitions, over 3 runs) is 95 % of that of the last
  half of the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.expectation import Expectation
from scheduler.foresight import Foresight
from scheduler.learned import Learned
from scheduler.position import Progress
from scheduler.template import Template
from scheduler.transitions import Context, Transitions

INFINITE = 10.0
UNSEEN = 1e-3
FLOOR = 0.1


@dataclass(slots=True, eq=False)
class Call:
    """One step of a run: what it follows, and when it runs (seconds since the run began)."""

    role: str
    after: list[Call] = field(default_factory=list)
    tools: frozenset[str] = frozenset()
    start: float = 0.0
    end: float = 0.0


Run = list[Call]
Ready = Mapping[str, tuple[Foresight, Expectation]]


def _react(rng: random.Random) -> Run:
    run = [Call("act")]
    while rng.random() < 0.8:
        run.append(Call("act", [run[-1]]))
    for call in run[:-1]:
        call.tools = frozenset({rng.choice(["read", "write"])})
    return run


def _fan(run: Run, source: Call, roles: list[str]) -> list[Call]:
    calls = [Call(role, [source]) for role in roles]
    run += calls
    return calls


def _tools(rng: random.Random) -> Run:
    run = [Call("plan")]
    calls = _fan(run, run[0], ["search", "read", "compute"])
    return [*run, Call("answer", calls)]


def _map_reduce(rng: random.Random) -> Run:
    run = [Call("split")]
    maps = _fan(run, run[0], ["map"] * rng.randint(3, 7))
    return [*run, Call("reduce", maps)]


def _tree(rng: random.Random) -> Run:
    run = [Call("root")]
    leaves = [leaf for branch in _fan(run, run[0], ["branch"] * 2) for leaf in _fan(run, branch, ["leaf"] * 2)]
    return [*run, Call("merge", leaves)]


def _loop(rng: random.Random) -> Run:
    run = [Call("write")]
    run.append(Call("judge", [run[-1]]))
    while rng.random() < 0.6:
        run[-1].tools = frozenset({"reject"})
        run.append(Call("write", [run[-1]]))
        run.append(Call("judge", [run[-1]]))
    run.append(Call("publish", [run[-1]]))
    return run


def _race(rng: random.Random) -> Run:
    run = [Call("ask")]
    calls = _fan(run, run[0], ["fast", "slow"])
    return [*run, Call("answer", [calls[rng.random() < 0.2]])]


def _quorum(rng: random.Random) -> Run:
    run = [Call("ask")]
    calls = _fan(run, run[0], ["voter1", "voter2", "voter3"])
    return [*run, Call("judge", rng.sample(calls, 2))]


def _interleaved(rng: random.Random) -> Run:
    run = [Call("plan")]
    for role in ("search", "code", "test"):
        run.append(Call(role, [run[-1]]))
        run.append(Call("plan", [run[-1]]))
    return run


def _peer(rng: random.Random) -> Run:
    run: Run = []
    while not run or rng.random() < 0.5:
        for role in ("planner", "executor", "expresser", "reviewer"):
            run.append(Call(role, run[-1:]))
    return run


def _cascade(rng: random.Random) -> Run:
    run = [Call("small")]
    if rng.random() < 0.3:
        run.append(Call("large", [run[-1]]))
    run.append(Call("check", [run[-1]]))
    return run


def _declared(edges: str, joins: Mapping[str, str | float] | None = None, start: str | None = None) -> Template:
    """`edges` are "from to probability count" with commas between them."""
    parsed = [(*edge.split(), "1", "1")[:4] for edge in edges.split(",")]
    roles = dict.fromkeys(role for edge in parsed for role in edge[:2])
    listed = [{"from": s, "to": t, "probability": float(p), "count": float(n)} for s, t, p, n in parsed]
    nodes = {role: {"join": (joins or {}).get(role, "any")} for role in roles}
    return Template.parse("declared", {"nodes": nodes, "edges": listed, "starts": [start or next(iter(roles))]})


SHAPES: dict[str, tuple[Callable[[random.Random], Run], Template]] = {
    "react chain": (_react, _declared("act act 0.8")),
    "parallel tools": (
        _tools,
        _declared("plan search,plan read,plan compute,search answer,read answer,compute answer", {"answer": "all"}),
    ),
    "map-reduce 3 to 7": (_map_reduce, _declared("split map 1 5,map reduce", {"reduce": "all"})),
    "tree": (_tree, _declared("root branch 1 2,branch leaf 1 2,leaf merge", {"merge": "all"})),
    "loop with exit": (_loop, _declared("write judge,judge write 0.6,judge publish 0.4")),
    "race (OR join)": (_race, _declared("ask fast,ask slow,fast answer 0.8,slow answer 0.2")),
    "2 of 3": (
        _quorum,
        _declared(
            "ask voter1,ask voter2,ask voter3,voter1 judge 0.67,voter2 judge 0.67,voter3 judge 0.67", {"judge": 2}
        ),
    ),
    "planner and workers": (
        _interleaved,
        _declared("plan search 0.25,plan code 0.25,plan test 0.25,search plan,code plan,test plan"),
    ),
    "PEER loop": (
        _peer,
        _declared("planner executor,executor expresser,expresser reviewer,reviewer planner 0.5"),
    ),
    "cascade": (_cascade, _declared("small large 0.3,small check 0.7,large check")),
}


def disturbed(run: Run, rate: float, roles: list[str], rng: random.Random) -> Run:
    """The run with steps replaced, left out and added, and perhaps abandoned. The first step stays."""
    if rng.random() < rate / 3:
        run = run[: rng.randint(1, len(run))]
    stands_for: dict[Call, list[Call]] = {}
    played: Run = []
    for call in run:
        call.after = list(dict.fromkeys(one for old in call.after for one in stands_for[old]))
        kind = rng.choice(["replaced", "left out", "added"]) if call.after and rng.random() < rate else ""
        if kind == "left out":
            stands_for[call] = call.after
            continue
        if kind == "replaced":
            call.role = rng.choice(roles)
        if kind == "added":
            played.append(Call(rng.choice(roles), call.after))
            call.after = [played[-1]]
        stands_for[call] = [call]
        played.append(call)
    return played


def timed(run: Run, rng: random.Random) -> Run:
    """Steps of about 4 s, half a second after the last of those that they follow; siblings come together."""
    for call in run:
        call.start = max((one.end for one in call.after), default=0.0) + (0.5 if call.after else 0.0)
        call.end = call.start + rng.lognormvariate(math.log(4.0), 0.4)
    return run


@dataclass(slots=True)
class Score:
    """Sums over the predictions of one shape: hits and log losses, and errors in steps."""

    asked: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    loss: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    ste: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    remaining: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    curve: dict[int, list[bool]] = field(default_factory=lambda: defaultdict(list))


class Player:
    """Plays runs into the learners, and scores what they say first."""

    def __init__(self, declared: Template, score: Score) -> None:
        self.score = score
        self.declared = declared
        self.learned = Learned("learned")
        self.transitions = Transitions()
        self.markov: dict[str, Counter[str | None]] = defaultdict(Counter)

    def play(self, run: Run, number: int) -> None:
        """One run, event by event."""
        templates = {"learned": self.learned.template(), "declared": self.declared}
        ready = {who: (Foresight(one, FLOOR), Expectation(one)) for who, one in templates.items()}
        progress, follower = Progress(), _followers(run)
        events = sorted([(call.start, 1, i) for i, call in enumerate(run)] + [(c.end, 0, i) for i, c in enumerate(run)])
        name = {call: str(i) for i, call in enumerate(run)}
        for now, kind, i in events:
            call = run[i]
            if kind:
                roles, siblings = progress.came(str(i), call.role, [name[one] for one in call.after])
                if roles:
                    self.learned.follows(roles, call.role, siblings)
                else:
                    self.learned.begins(call.role)
                for one in call.after:
                    self.learned.gap(one.role, call.role, now - one.end)
                continue
            progress.finished(str(i))
            self.learned.spent(call.role, 1000, 100, call.end - call.start)
            self._next_role(call, follower[call], number)
            self._far(run, now, ready, progress)
        for role in progress.leaves():
            self.learned.ended(role)

    def _next_role(self, call: Call, follower: Call | None, number: int) -> None:
        context = Context(call.role, call.tools, call.after[0].role if call.after else None)
        came = follower.role if follower else None
        counts = self.markov[call.role]
        outcomes = dict.fromkeys(role for one in self.markov.values() for role in one)
        prior = {role: 1 / (len(outcomes) + 1) for role in outcomes}
        first_order = {role: (counts[role] + p) / (counts.total() + 1) for role, p in prior.items()}
        self.score.asked += 1
        for who, predicted in (("transitions", self.transitions.predict(context)), ("markov", first_order)):
            hit = bool(predicted) and max(predicted, key=lambda role: predicted[role]) == came
            self.score.hits[who] += hit
            self.score.loss[who] += -math.log(max(UNSEEN, predicted.get(came, 0.0)))
            if who == "transitions":
                self.score.curve[number].append(hit)
        self.transitions.observe(context, came)
        counts[came] += 1

    def _far(self, run: Run, now: float, ready: Ready, progress: Progress) -> None:
        truth, left = _truth(run, now)
        for who, (foresight, expectation) in ready.items():
            position = progress.position(foresight.template)
            self.score.remaining[who] += abs(expectation.remaining(position).steps - left)
            self.score.remaining["asked " + who] += 1
            predicted = foresight.steps_to_execution(position)
            for role, steps in truth.items():
                error = abs(min(INFINITE, predicted.get(role, INFINITE)) - steps)
                self.score.ste["asked " + who] += 1
                self.score.ste["exact " + who] += not error
                self.score.ste["error " + who] += error


def _followers(run: Run) -> dict[Call, Call | None]:
    first: dict[Call, Call | None] = dict.fromkeys(run)
    for call in reversed(run):
        first.update(dict.fromkeys(call.after, call))
    return first


def _truth(run: Run, now: float) -> tuple[dict[str, float], int]:
    """Steps until each role that is to run again and does not run now, and the number of steps to come."""
    far = {call: 0.0 for call in run if call.start < now}
    steps: dict[str, float] = {}
    running = {call.role for call in far if call.end > now}
    for call in run:
        if call not in far:
            far[call] = 1 + max(far[one] for one in call.after)
            steps[call.role] = min(steps.get(call.role, INFINITE), far[call])
    return {role: n for role, n in steps.items() if role not in running}, sum(c.start >= now for c in run)


def measure(shape: str, noise: float, seed: int, runs: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    generate, declared = SHAPES[shape]
    score = Score()
    for repeat in range(repeats):
        rng = random.Random(f"{seed}/{shape}/{noise}/{repeat}")
        player = Player(declared, score)
        for number in range(runs):
            run = disturbed(generate(rng), noise, list(declared.nodes), rng)
            player.play(timed(run, rng), number)
    row: dict[str, Any] = {"shape": shape, "noise": noise}
    for who in ("transitions", "markov"):
        row[f"accuracy_{who}"] = score.hits[who] / score.asked
        row[f"log_loss_{who}"] = score.loss[who] / score.asked
    for who in ("learned", "declared"):
        asked = max(1, score.ste["asked " + who])
        row[f"ste_exact_{who}"] = score.ste["exact " + who] / asked
        row[f"ste_error_{who}"] = score.ste["error " + who] / asked
        row[f"remaining_error_{who}"] = score.remaining[who] / max(1, score.remaining["asked " + who])
    return {**row, "runs_to_95": warm(score.curve)}


def warm(curve: Mapping[int, list[bool]]) -> int:
    """The first run (from 1) from which 3 in a row are as accurate as 95 % of the last half."""
    half = len(curve) // 2
    final = statistics.fmean(hit for number in range(half, len(curve)) for hit in curve[number])
    for number in range(len(curve) - 2):
        if statistics.fmean(hit for n in range(number, number + 3) for hit in curve[n]) >= 0.95 * final:
            return number + 1
    return len(curve)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = [name for name in rows[0] if name not in ("shape", "noise", "runs_to_95")]
    head = ["shape", "noise", *(name.replace("_", " ") for name in names), "runs to 95 %"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        figures = [f"{row[name]:.2f}" for name in names]
        lines.append([row["shape"], f"{row['noise']:.0%}", *figures, str(row["runs_to_95"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure all shapes at three rates of noise, print the table and write it with the rows as JSON."""
    parser = argparse.ArgumentParser(description="How well the shapes of agent programs are foreseen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [measure(shape, noise, args.seed, args.runs, args.repeats) for shape in SHAPES for noise in (0.0, 0.1, 0.3)]
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "shapes.md").write_text(table(rows) + "\n")
        (args.out / "shapes.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
