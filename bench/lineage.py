"""Replays the text sessions of a mini-swe-agent trace as chat calls that say nothing of who sends them, and counts how
many of them Weft puts into the right session.

    python -m bench.lineage --trace mini_swe_agent.tar.xz --url http://127.0.0.1:8000 --out DIR [--variant twins ...]

Each longer prompt of the trace becomes the earlier messages, the trace's answer and a new user message. What Weft made
of it is read from `GET /v1/workflows/{id}` when a variant is done. The truth is the trace's `session_id`. The right
session of a true session is the one that holds most of its calls; it is merged if most calls of two are in one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.sessions import progress, read_trace

SYSTEM = "You are a helpful assistant that can interact with a computer shell to solve programming tasks."
TOOL = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True, slots=True)
class Turn:
    """What the client adds to the conversation, and what the trace's model answered."""

    said: str
    answer: str


@dataclass(slots=True)
class Client:
    """Sends calls and remembers whose they were, by the step ids that Weft answers with."""

    http: aiohttp.ClientSession
    url: str
    model: str
    output: int
    truth: dict[str, str] = field(default_factory=dict)
    workflows: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    async def call(self, session: str, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """One call for a true session; returns the answer's message."""
        body = {"model": self.model, "messages": messages, "max_tokens": self.output, **fields}
        body["ignore_eos"] = True
        async with self.http.post(self.url + "/v1/chat/completions", json=body) as answer:
            self.workflows.add(answer.headers.get("x-weft-workflow", ""))
            self.truth[answer.headers["x-request-id"]] = session
            told = await answer.json()
            if answer.status != 200:
                self.errors.append(str(told)[:200])
                return {"role": "assistant", "content": ""}
        message: dict[str, Any] = told["choices"][0]["message"]
        return message

    async def sessions(self) -> dict[str, str]:
        """The session into which Weft put each step."""
        found: dict[str, str] = {}
        for workflow in self.workflows:
            async with self.http.get(f"{self.url}/v1/workflows/{workflow}") as answer:
                found |= {step["id"]: step["session"] for step in (await answer.json())["steps"]}
        return {step: found.get(step, "?") for step in self.truth}


Load = dict[str, list[Turn]]
Variant = Callable[[Client, Load, random.Random], Awaitable[None]]


def conversations(path: Path, longest: int) -> Load:
    """The trace's sessions as turns. Messages above `longest` characters lose their middle; the last turns go first."""
    load: Load = {}
    for name, calls in read_trace(path).items():
        before, turns = "", []
        for prompt, answer in calls:
            turns.append(Turn(_cut(prompt[len(before) :], longest), _cut(answer, longest)))
            before = prompt
        load[name] = turns
    return load


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest // 2] + "\n...\n" + text[-longest // 2 :]


def history(turns: list[Turn], upto: int) -> list[dict[str, Any]]:
    """The messages of call `upto`."""
    messages: list[dict[str, Any]] = []
    for turn in turns[:upto]:
        messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
    return [*messages, {"role": "user", "content": turns[upto].said}]


async def play(client: Client, name: str, turns: list[Turn], system: str | None = None) -> None:
    """One session, call after call."""
    first = [{"role": "system", "content": system}] if system else []
    for k in range(len(turns)):
        await client.call(name, [*first, *history(turns, k)])


async def at_once(client: Client, load: Load, work: Callable[[str, list[Turn]], Awaitable[None]], slots: int) -> None:
    """`work` for every session, `slots` at a time."""
    free = asyncio.Semaphore(slots)

    async def one(name: str, turns: list[Turn]) -> None:
        async with free:
            await work(name, turns)
            progress(f"{len(client.truth)} calls")

    await asyncio.gather(*(one(name, turns) for name, turns in load.items()))


async def eight_at_a_time(client: Client, load: Load, rng: random.Random) -> None:
    """Eight sessions at a time."""
    await at_once(client, load, lambda name, turns: play(client, name, turns), 8)


async def interleaved(client: Client, load: Load, rng: random.Random) -> None:
    """All calls in random order, one at a time, each session's own order kept."""
    order = [name for name, turns in load.items() for _ in turns]
    rng.shuffle(order)
    at: Counter[str] = Counter()
    for name in order:
        await client.call(name, history(load[name], at[name]))
        at[name] += 1
        progress(f"{len(client.truth)} calls")


async def same_system(client: Client, load: Load, rng: random.Random) -> None:
    """The same system prompt everywhere."""
    await at_once(client, load, lambda name, turns: play(client, name, turns, SYSTEM), 8)


async def twins(client: Client, load: Load, rng: random.Random) -> None:
    """Two runs with the same system and first user message at once, that go on from the answers they were given."""

    async def pair(name: str, turns: list[Turn]) -> None:
        async def one(twin: str) -> None:
            messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
            for k, turn in enumerate(turns):
                messages.append({"role": "user", "content": turn.said})
                message = await client.call(twin, messages, temperature=1.0)
                said = message["content"] if k == 0 else turn.answer + f" ({twin})"
                messages.append({"role": "assistant", "content": said})

        await asyncio.gather(one(f"{name}/a"), one(f"{name}/b"))

    await at_once(client, load, pair, 4)


async def best_of_four(client: Client, load: Load, rng: random.Random) -> None:
    """Every call four times at once; the session goes on from one of the answers."""

    async def sampled(name: str, turns: list[Turn]) -> None:
        for k in range(len(turns)):
            messages = history(turns, k)
            await asyncio.gather(*(client.call(name, messages, temperature=1.0) for _ in range(4)))

    await at_once(client, load, sampled, 4)


async def fork_at_five(client: Client, load: Load, rng: random.Random) -> None:
    """At the fifth turn another line of the same session begins; both go on, in turn."""

    async def forked(name: str, turns: list[Turn]) -> None:
        other = [*turns[:4], *(Turn(t.said, t.answer + "\nOn the other hand.") for t in turns[4:])]
        for k in range(len(turns)):
            await client.call(name, history(turns, k))
            if k > 4:
                await client.call(name, history(other, k))

    await at_once(client, load, forked, 8)


async def retried(client: Client, load: Load, rng: random.Random) -> None:
    """Every third call is sent again: after its answer, or after the client gave up waiting for it."""

    async def again(name: str, turns: list[Turn]) -> None:
        for k in range(len(turns)):
            messages = history(turns, k)
            if rng.random() < 1 / 6:
                with suppress(TimeoutError):
                    await asyncio.wait_for(client.call(name, messages), 0.05)
            elif rng.random() < 1 / 5:
                await client.call(name, messages)
            await client.call(name, messages)

    await at_once(client, load, again, 8)


async def compacted(client: Client, load: Load, rng: random.Random) -> None:
    """Every eighth turn the history is replaced, the system prompt kept: by a summary that the model writes, or by its
    last three turns."""

    async def shrinking(name: str, turns: list[Turn]) -> None:
        first: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        kept: list[dict[str, Any]] = []
        by_summary = rng.random() < 0.5
        for k, turn in enumerate(turns):
            if k and k % 8 == 0 and by_summary:
                ask = {"role": "user", "content": "Summarise our conversation so far."}
                summary = (await client.call(name, [*first, *kept, ask], max_tokens=96))["content"]
                kept = [{"role": "user", "content": f"The conversation so far, in short:\n\n{summary}\n\nGo on."}]
                kept.append({"role": "assistant", "content": "I go on."})
            elif k and k % 8 == 0:
                kept = kept[-6:]
            kept.append({"role": "user", "content": turn.said})
            await client.call(name, [*first, *kept])
            kept.append({"role": "assistant", "content": turn.answer})

    await at_once(client, load, shrinking, 8)


async def rewritten(client: Client, load: Load, rng: random.Random) -> None:
    """A client that renames tool-call ids, drops reasoning, reorders fields and respells JSON in every call."""

    async def tool_user(name: str, turns: list[Turn]) -> None:
        messages: list[dict[str, Any]] = [{"content": turns[0].said, "role": "user"}]
        for k, turn in enumerate(turns):
            await client.call(name, messages, tools=[TOOL])
            call = {"name": "bash", "arguments": json.dumps({"command": turn.answer}, indent=k % 3 or None)}
            for message in messages:  # each turn spells the earlier ones anew
                message.pop("reasoning", None)
                for made in message.get("tool_calls") or ():
                    made["id"] = made["id"].partition("~")[0] + f"~{k}"
                if "tool_call_id" in message:
                    message["tool_call_id"] = message["tool_call_id"].partition("~")[0] + f"~{k}"
            reasoning = {"reasoning": f"I wonder about {k}."}
            made = {"type": "function", "function": call, "id": f"mine-{k}"}
            messages.append({"tool_calls": [made], "content": None, "role": "assistant", **reasoning})
            if k + 1 < len(turns):
                messages.append({"content": turns[k + 1].said, "tool_call_id": f"mine-{k}", "role": "tool"})

    await at_once(client, load, tool_user, 8)


VARIANTS: dict[str, Variant] = {
    "8 at a time": eight_at_a_time,
    "interleaved": interleaved,
    "same system": same_system,
    "twins": twins,
    "best of 4": best_of_four,
    "fork at 5": fork_at_five,
    "retried": retried,
    "compacted": compacted,
    "rewritten": rewritten,
}


def score(truth: dict[str, str], found: dict[str, str]) -> dict[str, Any]:
    """Calls in the right session, and true sessions that share theirs."""
    by_truth: dict[str, Counter[str]] = {}
    for call, session in truth.items():
        by_truth.setdefault(session, Counter())[found.get(call, "?")] += 1
    home = {session: counts.most_common(1)[0][0] for session, counts in by_truth.items()}
    right = sum(found.get(call) == home[session] for call, session in truth.items())
    mixed = Counter(found_as for counts in by_truth.values() for found_as in counts)
    return {
        "calls": len(truth),
        "right": right,
        "ratio": round(right / max(1, len(truth)), 4),
        "true_sessions": len(by_truth),
        "found_sessions": len(set(found.values())),
        "merged": len(home) - len(set(home.values())),
        "shared_by_two": sum(1 for times in mixed.values() if times > 1),
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Play the variants. The workflows of one are finished before the next, which repeats their text, begins."""
    results: dict[str, Any] = {}
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        async with http.get(arguments.url + "/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        for name in arguments.variant or VARIANTS:
            load = {
                session: turns[: arguments.turns]
                for session, turns in conversations(arguments.trace, arguments.longest).items()
            }
            client = Client(http, arguments.url, model, arguments.output)
            began = time.perf_counter()
            await VARIANTS[name](client, load, random.Random(arguments.seed))
            results[name] = score(client.truth, await client.sessions()) | {"errors": client.errors[:3]}
            for workflow in client.workflows:
                async with http.post(f"{arguments.url}/v1/workflows/{workflow}/finish"):
                    pass
            results[name]["seconds"] = round(time.perf_counter() - began, 1)
            progress(f"{name}: {results[name]}\n")
            if client.errors:
                raise SystemExit(f"{len(client.errors)} calls failed: {client.errors[0]}")
    return results


def main() -> None:
    """Run from the command line; writes DIR/lineage.json and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--output", type=int, default=8, help="tokens to generate in a call")
    parser.add_argument("--longest", type=int, default=1_000_000, help="characters kept of a message")
    parser.add_argument("--turns", type=int, default=1_000, help="most turns of a session")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "lineage.json").write_text(json.dumps(results, indent=1) + "\n")
    columns = ("calls", "right", "ratio", "true_sessions", "found_sessions", "merged", "shared_by_two", "seconds")
    print("| variant | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in results.items():
        print(f"| {name} | " + " | ".join(str(row[c]) for c in columns) + " |")


if __name__ == "__main__":
    main()
