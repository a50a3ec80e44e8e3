"""Replays the text sessions of a mini-swe-agent trace through a running `weft serve` and checks what it promises.

    python -m bench.sessions --trace mini_swe_agent.tar.xz --url http://127.0.0.1:8000 --out DIR

Closed loop: `--concurrency` sessions at a time, each call sent when the one before has been answered. The trace's
order of calls within a session is scrambled; sorted by length, each prompt extends the one before. Prompts are cut
to the model's length. The ideal hit is what a prefix cache without limit gives: all full blocks of the prompt that
an earlier call of the session had, less the block of the last token, which is always computed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import lzma
import statistics
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

MARGIN = 64  # tokens that cutting a text anywhere may add


@dataclass(frozen=True, slots=True)
class Turn:
    """One call to make: `ids` are the prompt's tokens, `output` the tokens to generate."""

    prompt: str
    ids: list[int]
    output: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One call as it was answered. Lengths in tokens, `ttft` and `total` in seconds."""

    session: str
    worker: str
    error: str | None
    prompt_tokens: int
    cached_tokens: int
    ideal_tokens: int
    ttft: float
    total: float


def read_trace(path: Path) -> dict[str, list[tuple[str, str]]]:
    """(input, output) texts per session, each input a prefix of the next. Raises ValueError where it is not."""
    sessions: dict[str, list[tuple[str, str]]] = {}
    with lzma.open(path) as packed, tarfile.open(fileobj=packed) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            for line in file or ():
                row = json.loads(line)
                sessions.setdefault(row["session_id"], []).append((row["input"], row["output"]))
    for name, calls in sessions.items():
        calls.sort(key=lambda call: len(call[0]))
        for (shorter, _), (longer, _) in itertools.pairwise(calls):
            if not longer.startswith(shorter):
                raise ValueError(f"session {name}: a prompt does not extend the one before")
    return sessions


class Replay:
    """Plays sessions against one endpoint."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str, length: int, block: int, output: int) -> None:
        self.http, self.url, self.model = http, url, model
        self.length, self.block, self.output = length, block, output
        self.answers: list[Answer] = []

    async def turns(self, calls: list[tuple[str, str]]) -> list[Turn]:
        """Tokenize and cut a session's prompts."""
        made = []
        for prompt, output in calls:
            tokens = max(1, min(self.output, len(output) // 3))
            ids = (await self._ask("/tokenize", {"model": self.model, "prompt": prompt}))["tokens"]
            room = self.length - tokens - MARGIN
            if len(ids) > room:
                cut = {"model": self.model, "tokens": ids[:room]}
                prompt = (await self._ask("/detokenize", cut))["prompt"]
                ids = (await self._ask("/tokenize", {"model": self.model, "prompt": prompt}))["tokens"]
            made.append(Turn(prompt, ids, tokens))
        return made

    async def play(self, name: str, turns: list[Turn]) -> None:
        """Send a session's calls, one after the other."""
        before: list[int] = []
        for turn in turns:
            ideal = min(_common(before, turn.ids), len(turn.ids) - 1) // self.block * self.block
            self.answers.append(await self._call(name, turn, ideal))
            before = turn.ids

    async def _call(self, session: str, turn: Turn, ideal: int) -> Answer:
        body = {"model": self.model, "prompt": turn.prompt, "max_tokens": turn.output, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        usage: dict[str, Any] = {}
        first, error, worker = 0.0, None, ""
        headers = {"x-session-id": session}
        try:
            async with self.http.post(self.url + "/v1/completions", json=body, headers=headers) as answer:
                worker = answer.headers.get("x-weft-worker", "")
                if answer.status != 200:
                    error = (await answer.text())[:200]
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        data = json.loads(line[6:])
                        first = first or time.perf_counter() - began
                        usage = data.get("usage") or usage
                        error = str(data["error"]) if "error" in data else error
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = repr(failure)
        if error is None and not usage:
            error = "the stream ended early"
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        total = time.perf_counter() - began
        return Answer(session, worker, error, usage.get("prompt_tokens", 0), cached, ideal, first, total)

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.http.post(self.url + path, json=body) as answer:
            answer.raise_for_status()
            told: dict[str, Any] = await answer.json()
            return told


def _common(one: list[int], two: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Replay the trace and sum up."""
    sessions = read_trace(arguments.trace)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as http:
        async with http.get(arguments.url + "/v1/models") as answer:
            card = (await answer.json())["data"][0]
        replay = Replay(http, arguments.url, card["id"], card["max_model_len"], arguments.block_size, arguments.output)
        turns = {}
        for name, calls in sessions.items():
            turns[name] = await replay.turns(calls)
            progress(f"tokenized {len(turns)} of {len(sessions)} sessions")
        began = time.perf_counter()
        slots = asyncio.Semaphore(arguments.concurrency)

        async def slot(name: str) -> None:
            async with slots:
                await replay.play(name, turns[name])
                progress(f"{len(replay.answers)} of {sum(map(len, turns.values()))} calls")

        await asyncio.gather(*(slot(name) for name in sessions))
        return summary(replay.answers, time.perf_counter() - began)


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """The figures, with the calls they come from."""
    workers: dict[str, set[str]] = {}
    for answer in answers:
        workers.setdefault(answer.session, set()).add(answer.worker)
    placed = [next(iter(found)) for found in workers.values() if len(found) == 1]
    prompt, cached, ideal = (sum(getattr(a, f"{n}_tokens") for a in answers) for n in ("prompt", "cached", "ideal"))
    ttft = [answer.ttft for answer in answers if answer.error is None]
    return {
        "calls": len(answers),
        "errors": [answer.error for answer in answers if answer.error],
        "sessions": len(workers),
        "sessions_on_one_worker": len(placed),
        "sessions_per_worker": {worker: placed.count(worker) for worker in sorted(set(placed))},
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "ideal_cached_tokens": ideal,
        "hit_ratio": round(cached / prompt, 4),
        "ideal_hit_ratio": round(ideal / prompt, 4),
        "calls_below_ideal": sum(answer.cached_tokens < answer.ideal_tokens for answer in answers),
        "seconds": round(seconds, 1),
        "ttft_seconds_p50": round(statistics.median(ttft), 3),
        "ttft_seconds_p99": round(statistics.quantiles(ttft, n=100)[98], 3),
        "answers": [asdict(answer) for answer in answers],
    }


def progress(text: str) -> None:
    """Say on standard error how far it is, on one line."""
    print(f"\r{text}   ", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Run from the command line; writes DIR/sessions.json and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=32, help="of the workers, in tokens")
    parser.add_argument("--output", type=int, default=64, help="most tokens to generate in a call")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sessions.json").write_text(json.dumps(result, indent=1))
    print("\n" + json.dumps({name: value for name, value in result.items() if name != "answers"}, indent=1))


if __name__ == "__main__":
    main()
