"""The variants of `bench.lineage` on small made sessions: who calls is found though nobody says it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bench.lineage import VARIANTS, Client, Turn, score
from tests.fake_worker import FakeWorker
from tests.server.conftest import Start

WORDS = [
    "file",
    "test",
    "patch",
    "class",
    "error",
    "branch",
    "module",
    "import",
    "value",
    "return",
    "list",
    "index",
    "query",
    "field",
    "model",
    "cache",
]
SEED = 7


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def speaker(seed: int) -> Any:
    rng = random.Random(seed)
    return lambda fields: {"role": "assistant", "content": text(rng, 3 + fields["max_tokens"] // 2)}


def load(rng: random.Random, sessions: int = 8, turns: int = 18) -> dict[str, list[Turn]]:
    """Sessions that share their instructions, and now and then a word-for-word result."""
    same = "\n<returncode>0</returncode>\n<output>\n</output>"

    def turn() -> Turn:
        said = same if rng.random() < 0.3 else f"<output>{text(rng, 30)}</output>"
        return Turn(said, f"THOUGHT: {text(rng, 25)}")

    return {f"s{n}": [Turn(f"Task: {text(rng, 60)}", text(rng, 10)), *(turn() for _ in range(turns))]
            for n in range(sessions)}  # fmt: skip


@pytest.mark.parametrize("variant", list(VARIANTS))
async def test_every_call_is_found_and_no_two_sessions_merge(start: Start, variant: str) -> None:
    weft = await start(FakeWorker(speak=speaker(1)), FakeWorker(speak=speaker(2)))
    rng = random.Random(SEED)
    client = Client(weft.http, weft.url, "m", 8)
    await VARIANTS[variant](client, load(rng), rng)
    result = score(client.truth, await client.sessions())
    assert not client.errors
    assert result["calls"] >= 8 * 19
    assert result["merged"] == result["shared_by_two"] == 0
    assert result["ratio"] >= 0.99, result
    await weft.idle()


def test_the_score_knows_a_merge_and_a_split() -> None:
    truth = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b"}
    merged = score(truth, dict.fromkeys(truth, "x"))
    assert (merged["right"], merged["merged"], merged["shared_by_two"]) == (5, 1, 1)
    split = score(truth, {"a1": "x", "a2": "x", "a3": "z", "b1": "y", "b2": "y"})
    assert (split["right"], split["merged"], split["shared_by_two"]) == (4, 0, 0)
