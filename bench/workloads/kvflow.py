"""W1 to W5: the workloads of the KVFlow paper, of PEER and of ScaleSim, with what their sources leave open chosen.

An agent here has a fixed prompt and a dynamic part that is new each time it runs; what the agent before it said is in
the dynamic part, so its KV does not help.
"""

from __future__ import annotations

import random
from itertools import pairwise

from bench.workloads.drafts import Draft, Shelf, template
from bench.workloads.runs import Call, Run, Workload

EXECUTORS = ("executor-1", "executor-2", "executor-3")
OTHERS = ("scout", "coder", "critic")
GRAPH = (
    "planner executor-1,planner executor-2,planner executor-3,executor-1 expresser,executor-2 expresser,"
    "executor-3 expresser,expresser reviewer,reviewer planner 0.5"
)


def w1(
    seed: int,
    *,
    scale: float = 1.0,
    runs: int = 100,
    stages: int = 10,
    branches: int = 1,
    fixed: int = 4096,
    dynamic: int = 32,
    output: int = 32,
) -> Workload:
    """KVFlow's E1: agents one after the other, `branches` of them to choose from at each stage, which share half of
    their fixed prompts. A run is one pass; the fixed prompts are the same in all runs."""
    rng, shelf = random.Random(seed), Shelf("w1", scale)
    made = []
    for number in range(runs):
        draft = Draft(shelf, number, "w1")
        for stage in range(stages):
            role = f"agent-{stage}" if branches == 1 else f"agent-{stage}-{rng.randrange(branches)}"
            half = shelf.shared(f"stage-{stage}", fixed // 2)
            prompt = draft.say(shelf.shared(role, fixed - fixed // 2, half), dynamic)
            draft.call(role, role, prompt, output, draft.calls[-1:])
        made.append(draft.run({"template": _stages(stages, branches)}))
    return Workload("w1", made)


def _stages(stages: int, branches: int) -> dict[str, object]:
    names = [[f"agent-{s}-{b}" if branches > 1 else f"agent-{s}" for b in range(branches)] for s in range(stages)]
    edges = [f"{one} {two} {1 / branches}" for ones, twos in pairwise(names) for one in ones for two in twos]
    return template(",".join(edges))


def w2(
    seed: int,
    *,
    scale: float = 1.0,
    runs: int = 64,
    agents: int = 10,
    passes: int = 5,
    fixed: int = 1024,
    dynamic: int = 256,
    output: int = 256,
) -> Workload:
    """KVFlow's E2: many workflows at once that share nothing. A run is one workflow: `passes` over its own agents, each
    time with new dynamic parts. The seed changes nothing."""
    del seed
    shelf, made = Shelf("w2", scale), []
    roles = [f"agent-{number}" for number in range(agents)]
    declared = template(",".join(f"{one} {two} {1 if two != roles[0] else 1 - 1 / passes}" for one, two in
                                 zip(roles, [*roles[1:], roles[0]], strict=True)))  # fmt: skip
    for number in range(runs):
        draft = Draft(shelf, number, "w2")
        prompts = [draft.say(None, fixed, "system") for _ in roles]
        for _ in range(passes):
            for role, prompt in zip(roles, prompts, strict=True):
                draft.call(role, role, draft.say(prompt, dynamic), output, draft.calls[-1:])
        made.append(draft.run({"template": declared}))
    return Workload("w2", made)


def w3(seed: int, *, scale: float = 1.0, runs: int = 256, apps: int = 64, again: float = 0.5) -> Workload:
    """PEER: planner, executor, expresser and reviewer in a loop; prompts of 30 to 600 tokens after the app's header."""
    rng, shelf = random.Random(seed), Shelf("w3", scale)
    roles = ("planner", "executor", "expresser", "reviewer")
    lengths = {(app, role): rng.randint(30, 600) for app in range(apps) for role in roles}
    declared = template(f"planner executor,executor expresser,expresser reviewer,reviewer planner {again}")
    made = []
    for number in range(runs):
        app, draft = rng.randrange(apps), Draft(shelf, number, "w3")
        header = shelf.shared(f"app-{app}", 100)
        while not draft.calls or rng.random() < again:
            for role in roles:
                fixed = shelf.shared(f"app-{app}/{role}", lengths[app, role], header)
                draft.call(role, role, draft.say(fixed, rng.randint(50, 400)), rng.randint(50, 400), draft.calls[-1:])
        made.append(draft.run({"template": declared}))
    return Workload("w3", made)


def w4(
    seed: int,
    *,
    scale: float = 1.0,
    runs: int = 100,
    misprediction: float = 0.1,
    again: float = 0.5,
    fixed: int = 4096,
    output: int = 256,
) -> Workload:
    """AND and OR graphs, half of the runs each: a planner, three executors, an expresser that waits for all or for the
    first of them, a reviewer that sends it round again with probability `again`.

    The declared template is wrong about a run with probability `misprediction`: other executors work then, and nobody
    reviews.
    """
    rng, shelf = random.Random(seed), Shelf("w4", scale)
    kinds = {"w4-and": None, "w4-or": 1}
    made = []
    for number in range(runs):
        program = list(kinds)[number % 2]
        draft = Draft(shelf, number, program)
        wrong = rng.random() < misprediction
        while not draft.calls or (not wrong and rng.random() < again):
            _team(draft, shelf, rng, wrong, kinds[program], fixed, output)
        made.append(draft.run({"template": template(GRAPH, expresser="all" if program == "w4-and" else "any")}))
    return Workload("w4", made)


def _team(
    draft: Draft, shelf: Shelf, rng: random.Random, wrong: bool, need: int | None, fixed: int, output: int
) -> None:
    """Once round the graph of W4."""

    def step(role: str, waits: list[Call], need: int | None = None) -> Call:
        said, told = rng.randint(64, 512), rng.uniform(0.5, 2.0) * output
        return draft.call(role, role, draft.say(shelf.shared(role, fixed), said), told, waits, need=need)

    planned = step("planner", draft.calls[-1:])
    executed = [step(role, [planned]) for role in (OTHERS if wrong else EXECUTORS)]
    expressed = step("expresser", executed, need)
    if not wrong:
        step("reviewer", [expressed])


def w5(
    seed: int,
    *,
    scale: float = 1.0,
    runs: int = 8,
    agents: int = 100,
    ticks: int = 10,
    active: float = 0.2,
    persona: int = 1024,
) -> Workload:
    """A society simulated in ticks, as ScaleSim does: of many agents with prompts of their own a fifth act in a tick,
    each with what it remembers; a tick begins when all of the one before have acted."""
    rng, shelf = random.Random(seed), Shelf("w5", scale)
    made: list[Run] = []
    for number in range(runs):
        draft = Draft(shelf, number, "w5")
        header = shelf.shared("world", 256)
        personas = [draft.say(header, persona, "system") for _ in range(agents)]
        before: list[Call] = []
        for _ in range(ticks):
            acting = sorted(rng.sample(range(agents), max(1, round(active * agents))))
            before = [
                draft.call(
                    f"agent-{one}", f"agent-{one}", draft.say(personas[one], rng.randint(64, 512)),
                    rng.randint(32, 256), before,
                )
                for one in acting
            ]  # fmt: skip
        made.append(draft.run())
    return Workload("w5", made)
