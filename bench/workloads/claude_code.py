"""Claude Code sessions: block hashes of 64 tokens, local to a session; sub-agents are sessions of the same run.

A sub-agent's record has the time of its end in `t`, and of its own calls since its beginning: in 36 of 38 records of
the published set `t - duration_ms` is within about a second of the end of a call of the main session (the other two are
of a session that a human had left). It waits for the last main call before its beginning, and the main session's
first call after its end waits for it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench.workloads.blocks import Prompts, Spot, speak
from bench.workloads.files import documents
from bench.workloads.runs import Call, Run, Workload

BLOCK = 64
MAIN = "main"
CLOCK = 1.0
HALVES = {"tune": 0, "report": 1}


@dataclass(frozen=True, slots=True)
class Thread:
    """The calls of one session as the file has them; `begin` and `end` in seconds since the run's start."""

    session: str
    role: str
    begin: float
    end: float
    system: int
    calls: list[dict[str, Any]]


def load(
    path: Path,
    *,
    max_context: int | None = None,
    half: str | None = None,
    scale: float = 1.0,
    subagents: bool = True,
    longest_gap: float = 300.0,
) -> Workload:
    """The sessions of a directory or archive of `trace_NNNN.json` files, all lengths divided by `scale`.

    Left out: a session with a prompt above `max_context` tokens as played, of fewer than two calls, or the same as
    an earlier one. `half`: "tune" or "report", files whose number is 0 or 1, 2 or 3 modulo 4. Raises ValueError where
    a file cannot be read.
    """
    if half is not None and half not in HALVES:
        raise ValueError(f"half: {half!r} is none of {', '.join(HALVES)}")
    runs, left_out, seen = [], Counter[str](), set[bytes]()
    for name, document in documents(path, "trace_"):
        try:
            number = int(name.removeprefix("trace_").removesuffix(".json"))
            threads = _threads(document, subagents)
            same = hashlib.sha1(orjson.dumps(document["requests"])).digest()
            copy = same in seen
            seen.add(same)
            if half is not None and number // 2 % 2 != HALVES[half]:
                left_out["other half"] += 1
            elif len(threads[0].calls) < 2:
                left_out["fewer than 2 calls"] += 1
            elif max_context and max(q["in"] for t in threads for q in t.calls) / scale > max_context:
                left_out["longer than max_context"] += 1
            elif copy:
                left_out["duplicate"] += 1
            else:
                runs.append(Run(name.removesuffix(".json"), "claude-code", _calls(number, threads, scale, longest_gap)))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: {name}: not a Claude Code session: {error!r}") from error
    return Workload("claude-code", runs, left_out)


def _threads(document: dict[str, Any], subagents: bool) -> list[Thread]:
    """The main session first."""
    requests = document["requests"]
    main = _usable(q for q in requests if q["type"] in ("n", "s"))
    threads = [Thread(MAIN, MAIN, 0.0, 0.0, _system(document), main)]
    for q in requests if subagents else ():
        if q["type"] == "subagent" and (calls := _usable(q["requests"])):
            begin = q["t"] - (q.get("duration_ms") or 0) / 1000
            role = str(q.get("subagent_type") or "agent")
            threads.append(Thread(f"{role}-{len(threads)}", role, begin, q["t"], _system(q), calls))
    return threads


def _usable(requests: Any) -> list[dict[str, Any]]:
    return [q for q in requests if q.get("in", 0) > 0 and q.get("hash_ids")]


def _system(document: dict[str, Any]) -> int:
    return int(document.get("tool_tokens", 0) + document.get("system_tokens", 0))


def _calls(number: int, threads: Sequence[Thread], scale: float, longest: float) -> list[Call]:
    prompts = Prompts(f"claude-code/{number}", BLOCK, scale)
    spots = [prompts.follow([(q["hash_ids"], q["in"]) for q in thread.calls]) for thread in threads]
    ends: list[list[Spot | None]] = []
    systems = []
    for thread, ours in zip(threads, spots, strict=True):
        following = zip(ours, ours[1:], thread.calls, strict=False)
        ends.append([*(prompts.answered(one, two, max(1, q["out"])) for one, two, q in following), None])
        systems.append(prompts.system(ours[0], thread.system))
    prompts.build()
    for system in systems:
        if system:
            speak(prompts.piece(system))
    made: list[list[Call]] = []
    for thread, ours, answers in zip(threads, spots, ends, strict=True):
        calls: list[Call] = []
        for q, spot, end in zip(thread.calls, ours, answers, strict=True):
            gap = min(longest, max(0.0, float(q.get("think_time") or 0))) if calls else 0.0
            answer = prompts.answer(spot, end)
            output = max(prompts.scaled(max(1, q["out"])), answer.tokens if answer else 0)
            tools = ("tool",) if q.get("stop") == "tool_use" else ()
            stop, parent = q.get("stop") or "end_turn", MAIN if made else None
            piece, after = prompts.piece(spot), tuple(calls[-1:])
            calls.append(
                Call(thread.session, thread.role, piece, output, after, None, gap, answer, stop, tools, parent)
            )
        made.append(calls)
    return _joined(threads, made, longest)


def _joined(threads: Sequence[Thread], made: Sequence[list[Call]], longest: float) -> list[Call]:
    """All calls in an order in which each follows those it waits for, sub-agents between the main session's."""
    main, calls = threads[0].calls, made[0]
    started: dict[int, list[Call]] = {}
    joining: dict[int, list[tuple[float, Call]]] = {}
    for thread, ours in zip(threads[1:], made[1:], strict=True):
        before = max((i for i, q in enumerate(main) if q["t"] <= thread.begin), default=0)
        ours[0].after = (calls[before],)
        ours[0].gap = min(longest, max(0.0, thread.begin - _end(main[before])))
        started.setdefault(before, []).extend(ours)
        later = (i for i, q in enumerate(main) if i > before and q["t"] >= thread.end - CLOCK)
        if (join := next(later, None)) is not None:
            joining.setdefault(join, []).append((thread.end, ours[-1]))
    order = []
    for i, call in enumerate(calls):
        if i in joining:
            last = max(_end(main[i - 1]), *(end for end, _ in joining[i]))
            call.after += tuple(one for _, one in joining[i])
            call.gap = min(longest, max(0.0, main[i]["t"] - last))
        order += [call, *started.get(i, ())]
    return order


def _end(request: dict[str, Any]) -> float:
    return float(request["t"] + (request.get("api_time") or 0.0))
