"""mini-swe-agent sessions with their text, as played on small models: the protocol of the rivals' first figures."""

from __future__ import annotations

import json
import lzma
import math
import random
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.sessions import read_trace
from bench.workloads.runs import ASSISTANT, SYSTEM, USER, Call, Piece, Run, Workload

SESSION = "main"
ROLE = "mini-swe-agent"
FEWEST = 4
GAP, SIGMA, LONGEST_GAP = 0.3, 1.0, 5.0
"""Seconds between calls: lognormal with this median and sigma, capped."""
MAX_CONTEXT = 3000

Count = Callable[[str], int]


def load(
    path: Path,
    seed: int,
    *,
    max_context: int | None = None,
    calls: int = 8,
    keep: float = 1 / 3,
    shorten: float = 4.0,
    answers: bool = False,
    characters: float = 3.0,
) -> Workload:
    """One run a session: what all begin with is shared, then task, answers and observations in turn.

    Every call stops at its length, as on an engine that ignores the end of text: none says that it is the last.
    Of what is appended the first `keep` of its characters stay, a session ends before a prompt above `max_context`
    (MAX_CONTEXT) tokens, and of its calls at most so many are made, evenly taken. An output is the trace's divided by
    `shorten`. The model is not thought to repeat the trace's answers; with `answers` it is, and generates them.
    So many `characters` of text count as a token. Left out: sessions of fewer than FEWEST calls. Raises ValueError
    where the file cannot be read.
    """
    try:
        sessions = read_trace(path)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from None

    def count(text: str) -> int:
        return math.ceil(len(text) / characters)

    rng = random.Random(seed)
    runs, left_out = [], Counter[str]()
    opening = _opening([turns[0][0] for turns in sessions.values()])
    system = Piece(f"{ROLE}/system", count(opening), None, SYSTEM, opening, shared=True) if opening else None
    for name in sorted(sessions):
        turns, before = [], len(opening)
        for prompt, answer in sessions[name]:
            turns.append((_cut(prompt[before:], keep), _cut(answer, keep), max(4, round(count(answer) / shorten))))
            before = len(prompt)
        pieces = _pieces(f"{ROLE}/{name}", system, turns, count)
        fitting = sum(piece.end <= (max_context or MAX_CONTEXT) for piece, _, _ in pieces)
        left_out["calls above max_context"] += len(pieces) - fitting
        chosen = _evenly(pieces[:fitting], calls)
        left_out["calls between those taken"] += fitting - len(chosen)
        if len(chosen) < FEWEST:
            left_out[f"sessions of fewer than {FEWEST} calls"] += 1
            continue
        runs.append(Run(name, ROLE, _calls(chosen, rng, answers)))
    return Workload(ROLE, runs, +left_out)


def _opening(prompts: list[str]) -> str:
    """What all prompts begin with, up to the end of a line or else of a word."""
    first, last = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    opening = first[:same] if len(prompts) > 1 else ""
    return opening[: 1 + (opening.rfind("\n") if "\n" in opening else opening.rfind(" "))]


def _cut(text: str, keep: float) -> str:
    return text[: max(1, int(len(text) * keep))]


def _pieces(
    name: str, above: Piece | None, turns: list[tuple[str, str, int]], count: Count
) -> list[tuple[Piece, Piece, int]]:
    """(prompt, the trace's answer, tokens to generate) of each call."""
    made = []
    for number, (said, answer, output) in enumerate(turns):
        prompt = Piece(f"{name}/{number}", count(said), above, USER, said)
        above = Piece(f"{name}/{number}/answer", count(answer), prompt, ASSISTANT, answer)
        made.append((prompt, above, output))
    return made


def _evenly(items: list[tuple[Piece, Piece, int]], most: int) -> list[tuple[Piece, Piece, int]]:
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def _calls(chosen: list[tuple[Piece, Piece, int]], rng: random.Random, answers: bool) -> list[Call]:
    calls: list[Call] = []
    for number, (prompt, answer, output) in enumerate(chosen):
        gap = min(LONGEST_GAP, rng.lognormvariate(0, SIGMA) * GAP) if calls else 0.0
        last = number == len(chosen) - 1
        call = Call(SESSION, ROLE, prompt, output, tuple(calls[-1:]), None, gap, None, "length")
        if answers:
            call.output, call.answer = answer.tokens, None if last else answer
        calls.append(call)
    return calls
