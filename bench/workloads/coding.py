"""W6 and W7: coding agents whose prompts grow call by call, with sub-agents, or with history that is rewritten.

What a call adds, what it answers and how long its tools take is drawn from lognormal distributions whose medians and
tails are those of public coding traces; a quarter of the gaps are a human's.
"""

from __future__ import annotations

import random

from bench.workloads.drafts import Draft, Shelf, about, after
from bench.workloads.runs import Call, Piece, Run, Workload

MAX_CONTEXT = 100_000
SYSTEM, TOOLS = 4000, 12_000
"""Tokens of the system prompt and of the tools, the same in all sessions."""
HUMAN = 0.25
LONGEST_GAP = 600.0
DELEGATING = 0.44
SUBAGENTS, SUBAGENT_CALLS = 4, 12


def w6(seed: int, *, scale: float = 1.0, runs: int = 60, max_context: int | None = None) -> Workload:
    """Coding sessions of 10 to 120 calls that end before a prompt above `max_context` tokens as played. In 44 % of them
    4 sub-agents of 12 calls work at once, once or more often; the session waits for all of them."""
    rng, shelf = random.Random(seed), Shelf("w6", scale)
    return Workload("w6", [_session(Draft(shelf, n, "w6"), shelf, rng, _room(max_context, scale)) for n in range(runs)])


def _room(max_context: int | None, scale: float) -> int:
    return min(max_context or MAX_CONTEXT, round(MAX_CONTEXT / scale))


def _session(draft: Draft, shelf: Shelf, rng: random.Random, room: int) -> Run:
    system = shelf.shared("system", SYSTEM, shelf.shared("tools", TOOLS))
    prompt = draft.say(system, about(rng, 1000, 0.8))
    delegates, waits = rng.random() < DELEGATING, list[Call]()
    gap = 0.0
    for turn in range(rng.randint(10, 120)):
        if turn and prompt.end > room:
            break
        human = turn > 0 and rng.random() < HUMAN
        call = draft.call("main", "main", prompt, _answer(rng), waits, gap=gap, tools=("bash",))
        waits = [call]
        if delegates and turn % 40 == 5:
            waits = [call, *(_subagent(draft, shelf, rng, call, f"sub-{turn}-{k}", room) for k in range(SUBAGENTS))]
        prompt = draft.say(after(call), _growth(rng))
        gap = _gap(rng, human)
        if human:
            call.stop, call.tools = "stop", ()
    return draft.run()


def _subagent(draft: Draft, shelf: Shelf, rng: random.Random, starter: Call, name: str, room: int) -> Call:
    """A sub-agent's calls; its last one."""
    prompt: Piece = draft.say(shelf.shared("explorer", 8000), about(rng, 500))
    last = starter
    for turn in range(SUBAGENT_CALLS):
        if turn and prompt.end > room:
            break
        gap = about(rng, 1.5, 1.0, LONGEST_GAP) if turn else 0.0
        last = draft.call(name, "explorer", prompt, _answer(rng), [last], gap=gap, tools=("read",), parent="main")
        prompt = draft.say(after(last), _growth(rng))
    last.stop, last.tools = "stop", ()
    return last


def _growth(rng: random.Random) -> float:
    return about(rng, 1000, 0.8, 8000)


def _answer(rng: random.Random) -> float:
    return about(rng, 220, 1.18, 8000)


def _gap(rng: random.Random, human: bool) -> float:
    return about(rng, 120, 1.0, LONGEST_GAP) if human else about(rng, 1.5, 1.0, LONGEST_GAP)


def w7(
    seed: int,
    *,
    scale: float = 1.0,
    runs: int = 60,
    max_context: int | None = None,
    revised: float = 0.15,
) -> Workload:
    """Sessions whose older states are superseded: with probability `revised` a call replaces the last tenth to half
    of the turns by new text, and a prompt above half of `max_context` is compacted to a summary; what was there before
    is dead."""
    rng, shelf = random.Random(seed), Shelf("w7", scale)
    room, made = _room(max_context, scale), []
    for number in range(runs):
        draft = Draft(shelf, number, "w7")
        system = shelf.shared("system", SYSTEM, shelf.shared("tools", TOOLS))
        prompt, gap = draft.say(system, about(rng, 1000, 0.8)), 0.0
        turns: list[Piece] = []
        for _ in range(rng.randint(20, 80)):
            call = draft.call("main", "main", prompt, _answer(rng), draft.calls[-1:], gap=gap, tools=("bash",))
            turns.append(prompt)
            if prompt.end > room / 2:
                turns, base = [], draft.say(system, about(rng, 2500))
            elif len(turns) > 1 and rng.random() < revised:
                dropped = max(1, round(rng.uniform(0.1, 0.5) * len(turns)))
                base = turns[-dropped - 1] if dropped < len(turns) else system
                del turns[-dropped:]
            else:
                base = after(call)
            prompt, gap = draft.say(base, _growth(rng)), _gap(rng, rng.random() < HUMAN)
            if prompt.end > room:
                break
        made.append(draft.run())
    return Workload("w7", made)
