"""The shapes of the agent literature, one generator each: who waits for whom, and what prompts have in common."""

from __future__ import annotations

import random
from collections.abc import Callable

from bench.workloads.drafts import Draft, Shelf, about, after, template
from bench.workloads.runs import Call, Piece, Run, Workload

Writer = Callable[[Draft, Shelf, random.Random], Run]

TOOL_GAP, LONGEST_GAP = 2.0, 60.0


def _gap(rng: random.Random) -> float:
    return about(rng, TOOL_GAP, 1.0, LONGEST_GAP)


def _task(draft: Draft, shelf: Shelf, rng: random.Random, role: str, fixed: float = 3000, own: float = 1000) -> Piece:
    """A role's shared system prompt and this run's own task."""
    return draft.say(shelf.shared(role, fixed), about(rng, own))


def _react(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """One agent that calls a tool and reads what comes of it, until it answers."""
    call = draft.call("agent", "act", _task(draft, shelf, rng, "act"), about(rng, 150), tools=("tool",))
    while rng.random() < 0.88:
        prompt = draft.say(after(call), about(rng, 800, 0.8))
        call = draft.call("agent", "act", prompt, about(rng, 150), [call], gap=_gap(rng), tools=("tool",))
    call.stop, call.tools = "stop", ()
    return draft.run({"template": template("act act 0.88")})


def _parallel_tools(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """A plan with several function calls that models answer at the same time, and an answer that joins them."""
    plan = draft.call("main", "plan", _task(draft, shelf, rng, "plan"), about(rng, 200), tools=("function",))
    functions = [
        draft.call(f"function-{k}", "function", _task(draft, shelf, rng, "function", own=600), about(rng, 150), [plan],
                   gap=_gap(rng), parent="main")
        for k in range(rng.randint(3, 6))
    ]  # fmt: skip
    draft.call("main", "answer", draft.quote(after(plan), functions), about(rng, 300), functions)
    return draft.run({"template": template("plan function 1 4.5,function answer", answer="all")})


def _search(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """Parallel branches from one root, each a line of calls of its own; the two best go on, the best is written up."""
    root = draft.call("root", "root", _task(draft, shelf, rng, "root", own=4000), about(rng, 200))
    branches = [(f"branch-{k}", root) for k in range(4)]
    for depth in range(rng.randint(2, 4)):
        ended = []
        for session, tip in branches:
            prompt = draft.say(after(tip), about(rng, 700))
            waits = [call for _, call in branches] if depth else [root]
            ended.append((session, draft.call(session, "branch", prompt, about(rng, 300), waits, gap=_gap(rng))))
        branches = rng.sample(ended, min(len(ended), 4 if depth == 0 else 2))
    best = branches[0][1]
    draft.call(branches[0][0], "write", draft.say(after(best), 200), about(rng, 600), [call for _, call in branches])
    return draft.run({"template": template("root branch 1 4,branch branch 0.6,branch write 0.2")})


def _decomposition(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """A problem is split into parts, these again, down to what is solved at once; each then merges its parts."""
    _solve(draft, shelf, rng, "0", [], 0)
    return draft.run({"template": template("split split 0.4 2.5,split solve 0.6 2.5,solve merge,merge merge 0.7")})


def _solve(draft: Draft, shelf: Shelf, rng: random.Random, name: str, waits: list[Call], depth: int) -> Call:
    """Solve one part; its last call."""
    parent = name.rpartition(".")[0] or None
    if depth == 3 or (depth and rng.random() < 0.4):
        return draft.call(name, "solve", _task(draft, shelf, rng, "solve"), about(rng, 400), waits, parent=parent)
    split = draft.call(name, "split", _task(draft, shelf, rng, "split"), about(rng, 250), waits, parent=parent)
    parts = [_solve(draft, shelf, rng, f"{name}.{k}", [split], depth + 1) for k in range(rng.randint(2, 3))]
    told = draft.quote(after(split), parts)
    return draft.call(name, "merge", told, about(rng, 300), parts, parent=parent)


def _orchestrator(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """An orchestrator asks one specialist after the other; all of them keep growing contexts."""
    specialists = ("browser", "files", "coder", "terminal")
    call = draft.call("orchestrator", "orchestrator", _task(draft, shelf, rng, "orchestrator"), about(rng, 200))
    tips: dict[str, Call] = {}
    for _ in range(rng.randint(4, 14)):
        role = rng.choice(specialists)
        start = after(tips[role]) if role in tips else shelf.shared(role, 2500)
        prompt, gap = draft.say(start, about(rng, 900, 0.8)), _gap(rng)
        tips[role] = draft.call(role, role, prompt, about(rng, 300), [call], gap=gap, parent="orchestrator")
        report = draft.quote(after(call), [tips[role]])
        call = draft.call("orchestrator", "orchestrator", report, about(rng, 200), [tips[role]])
    edges = [f"orchestrator {role} 0.22,{role} orchestrator" for role in specialists]
    return draft.run({"template": template(",".join(edges))})


def _tree_of_thought(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """From each of the two best states five thoughts, all of them scored; the others die. Three levels."""
    states, waits = [_task(draft, shelf, rng, "think", own=1500)], list[Call]()
    for level in range(3):
        thoughts, scores = list[Call](), list[Call]()
        for s, state in enumerate(states):
            for k in range(5):
                thoughts.append(draft.call(f"{level}.{s}.{k}", "think", state, about(rng, 150), waits))
        for thought in thoughts:
            asked = draft.say(after(thought), 60)
            scores.append(draft.call(thought.session, "score", asked, 8, [thought]))
        waits, states = scores, [draft.say(after(one), 20) for one in rng.sample(thoughts, 2)]
    draft.call("answer", "answer", states[0], about(rng, 400), waits)
    return draft.run({"template": template("think score,score think 0.67,score answer 0.33", answer="all")})


def _fork_join(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """Inside one answer: its first part is generated, parallel branches go on from there, and one call that has all of
    them goes on to the end or to the next fork."""
    call = draft.call("answer", "answer", _task(draft, shelf, rng, "answer", own=2000), about(rng, 200))
    for fork in range(rng.randint(1, 3)):
        branches = []
        for k in range(rng.randint(2, 5)):
            prompt = draft.say(after(call), 12)
            branches.append(
                draft.call(f"branch-{fork}-{k}", "branch", prompt, about(rng, 250), [call], parent="answer")
            )
        text = draft.quote(after(branches[0]), branches[1:])
        call = draft.call("answer", "answer", text, about(rng, 150), branches)
    return draft.run({"template": template("answer branch 0.67 3.5,branch answer", answer="all")})


def _cascade(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """A small model answers and is checked; where it fails a large one is asked from the start. The models share no
    KV, so each has a prompt of its own."""
    own = about(rng, 2000)
    small = draft.call("small", "small", draft.say(shelf.shared("small", 2000), own), about(rng, 300))
    last = draft.call("check", "check", draft.say(shelf.shared("check", 1000), own), about(rng, 30), [small])
    if rng.random() < 0.3:
        last = draft.call("large", "large", draft.say(shelf.shared("large", 2000), own), about(rng, 400), [last])
        draft.call("check-2", "check", draft.say(shelf.shared("check", 1000), own), about(rng, 30), [last])
    return draft.run({"template": template("small check,check large 0.25,large check")})


def _rollouts(draft: Draft, shelf: Shelf, rng: random.Random) -> Run:
    """Eight rollouts of one prompt at once, of some turns with an environment between; nothing joins them."""
    prompt = _task(draft, shelf, rng, "policy", own=3000)
    for k in range(8):
        call = draft.call(f"rollout-{k}", "policy", prompt, about(rng, 400, 0.8))
        for _ in range(rng.randint(1, 8)):
            seen = draft.say(after(call), about(rng, 500))
            call = draft.call(f"rollout-{k}", "policy", seen, about(rng, 400, 0.8), [call], gap=_gap(rng))
    return draft.run({"template": template("policy policy 0.82")})


SHAPES: dict[str, Writer] = {
    "react": _react,
    "parallel-tools": _parallel_tools,
    "search": _search,
    "decomposition": _decomposition,
    "orchestrator": _orchestrator,
    "tree-of-thought": _tree_of_thought,
    "fork-join": _fork_join,
    "cascade": _cascade,
    "rollouts": _rollouts,
}


def shape(name: str, seed: int, *, scale: float = 1.0, runs: int = 100) -> Workload:
    """So many runs of one of the SHAPES."""
    rng, shelf = random.Random(seed), Shelf(name, scale)
    return Workload(name, [SHAPES[name](Draft(shelf, number, name), shelf, rng) for number in range(runs)])
