"""Turns prompt pieces into chat messages, about as long in the engine's tokens as the pieces say."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import aiohttp

from bench.workloads.runs import ASSISTANT, SYSTEM, USER, Call, Piece, Run

_PROSE = """
the file has two tests and one of them fails when a value is none so look at how it reads its list then change what
returns before each call because your agent found an error in main while search gave no result for name we open this
path to run again with new text from user where line is long or short but must not be empty
"""
WORDS = tuple(_PROSE.split())
_SAMPLE_WORDS = 400
_SAMPLE_MESSAGES = 16


@dataclass(frozen=True, slots=True)
class Texts:
    """Makes messages. `word` is the tokens of one of our words, `message` those a chat template adds to a message, and
    `tail` those it puts behind the last: the start of the answer. `shared` says how many tokens lie before the end of
    each shared piece.

    A line that no other run has stands in front of each first piece of a run's own: a run drawn again, or played with
    another seed, finds nothing in a cache but shared pieces.
    """

    word: float
    message: float
    tail: int
    seed: int = 0
    shared: Mapping[Piece, int] = field(default_factory=dict)

    def messages(self, run: Run, call: Call) -> list[dict[str, str]]:
        """The prompt of a call: a message for each of its pieces that has text."""
        return [_message(piece, text) for piece in call.prompt.path() if (text := self.text(run, piece))]

    def text(self, run: Run, piece: Piece) -> str:
        """What a piece says: its own text, or words drawn by its name."""
        text = self.said(piece)
        if piece.shared or (piece.parent is not None and not piece.parent.shared):
            return text
        mark = hashlib.sha256(f"{self.seed} {run.id}".encode()).hexdigest()[:12]
        return f"{mark}\n{text}"

    def said(self, piece: Piece) -> str:
        """The same without the mark."""
        if piece.text is not None:
            return piece.text
        return made(piece.name, (piece.tokens - self.message) / self.word)


def _message(piece: Piece, text: str) -> dict[str, str]:
    return {"role": piece.speaker if piece.speaker in (SYSTEM, USER, ASSISTANT) else USER, "content": text}


@lru_cache(maxsize=512)
def made(name: str, words: float) -> str:
    """About so many words, the same for the same name; at least one."""
    return " ".join(random.Random(name).choices(WORDS, k=max(1, round(words))))


async def calibrate(http: aiohttp.ClientSession, url: str, model: str, seed: int, runs: Iterable[Run] = ()) -> Texts:
    """Ask the engine's tokenizer how long our words, its chat template's frame and the runs' shared pieces are."""

    async def count(messages: list[dict[str, str]], answer: bool = True) -> int:
        body = {"model": model, "messages": messages, "add_generation_prompt": answer}
        async with http.post(url + "/tokenize", json=body) as response:
            response.raise_for_status()
            return int((await response.json())["count"])

    def sample(messages: int, words: int) -> list[dict[str, str]]:
        return [{"role": USER, "content": made(f"sample {number}", words)} for number in range(messages)]

    one = await count(sample(1, 1))
    tail = one - await count(sample(1, 1), answer=False)
    word = (await count(sample(1, _SAMPLE_WORDS)) - one) / (_SAMPLE_WORDS - 1)
    message = (await count(sample(_SAMPLE_MESSAGES, 1)) - one) / (_SAMPLE_MESSAGES - 1) - word
    texts = Texts(word, max(0.0, message), tail, seed)
    pieces = {piece for run in runs for call in run.calls for piece in call.prompt.path() if piece.shared}
    said = {piece: [_message(one, texts.said(one)) for one in piece.path()] for piece in pieces}
    return replace(texts, shared={piece: await count(messages, answer=False) for piece, messages in said.items()})
