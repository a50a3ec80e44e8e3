"""The Mooncake conversation trace: requests of an hour in open loop, known by hashes of blocks of 512 tokens.

It has no session ids: a request continues the latest one whose full blocks are all a prefix of its own. All requests
have the same first block, so one that has no second full block is continued by none.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bench.workloads.blocks import Prompts, Spot, share, speak
from bench.workloads.files import lines
from bench.workloads.runs import Call, Run, Workload

BLOCK = 512
SESSION = "chat"
Request = tuple[float, int, int, list[int]]


def load(path: Path, *, max_context: int | None = None, scale: float = 1.0, speed: float = 1.0) -> Workload:
    """Chains of requests as runs with arrival times, lengths divided by `scale`, times by `speed`.

    Left out: chains with a prompt above `max_context` tokens as played. A gap is the time from one arrival to the
    next, because the trace does not say how long an answer took. Raises ValueError where the file cannot be read.
    """
    requests: list[Request] = []
    for number, row in lines(path):
        try:
            time, ids = float(row["timestamp"]) / 1000 / speed, list(row["hash_ids"])
            requests.append((time, int(row["input_length"]), max(1, int(row["output_length"])), ids))
            if not 0 < requests[-1][1] < (len(ids) + 1) * BLOCK:
                raise ValueError("its length does not fit its hashes")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {number}: not a Mooncake request: {error!r}") from None
    requests.sort(key=lambda one: one[0])
    kept, left_out = [], Counter[str]()
    for chain in _chains(requests):
        if max_context and max(tokens for _, tokens, _, _ in chain) / scale > max_context:
            left_out["longer than max_context"] += 1
        else:
            kept.append(chain)
    return Workload("mooncake", _runs(kept, scale), left_out)


def _chains(requests: list[Request]) -> list[list[Request]]:
    chains: list[list[Request]] = []
    tips: dict[int, tuple[int, int]] = {}
    for request in requests:
        _, tokens, _, ids = request
        found = (tips[one] for one in reversed(ids) if one in tips and tips[one][1] <= tokens)
        chain, _ = next(found, (len(chains), 0))
        if chain == len(chains):
            chains.append([])
        chains[chain].append(request)
        if (full := tokens // BLOCK) > 1:
            tips[ids[full - 1]] = chain, tokens
    return chains


def _runs(chains: list[list[Request]], scale: float) -> list[Run]:
    prompts = Prompts("mooncake", BLOCK, scale)
    spots = [prompts.follow([(ids, tokens) for _, tokens, _, ids in chain]) for chain in chains]
    ends: list[list[Spot | None]] = []
    for chain, ours in zip(chains, spots, strict=True):
        following = zip(ours, ours[1:], chain, strict=False)
        ends.append([*(prompts.answered(one, two, output) for one, two, (_, _, output, _) in following), None])
    system = prompts.cut(spots[0][0], BLOCK) if spots and spots[0][0].depth > BLOCK else None
    prompts.build()
    if system:
        speak(prompts.piece(system))
    runs = []
    for number, (chain, ours, answers) in enumerate(zip(chains, spots, ends, strict=True)):
        calls: list[Call] = []
        before = chain[0][0]
        for (time, _, tokens, _), spot, end in zip(chain, ours, answers, strict=True):
            answer = prompts.answer(spot, end)
            output = max(prompts.scaled(tokens), answer.tokens if answer else 0)
            after = tuple(calls[-1:])
            calls.append(Call(SESSION, SESSION, prompts.piece(spot), output, after, None, time - before, answer))
            before = time
        runs.append(Run(f"mooncake-{number}", "mooncake", calls, arrival=chain[0][0]))
    share(runs)
    return runs
