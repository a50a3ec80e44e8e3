"""A prompt as a chain of segments: a hash names a segment *and all before it*, so equal hashes mean equal prefixes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

CHARACTERS = 512
TOKENS = 64
LONGEST_CHAIN = 10_000


@dataclass(frozen=True, slots=True)
class Segment:
    """`hash` (16 bytes) of the chain up to here; `size` of this segment in bytes of its canonical JSON."""

    hash: bytes
    size: int


def chain(body: Mapping[str, Any]) -> list[Segment]:
    """The segments of a request of any of the APIs: tools, system, then messages, input items or pieces of a prompt.

    Linear in the body's bytes. At most `LONGEST_CHAIN` segments; the rest is left out.
    """
    segments: list[Segment] = []
    link = b""
    for part in _parts(body):
        text = part if isinstance(part, bytes) else orjson.dumps(part, option=orjson.OPT_SORT_KEYS)
        link = hashlib.blake2b(link + text, digest_size=16).digest()
        segments.append(Segment(link, len(text)))
        if len(segments) == LONGEST_CHAIN:
            break
    return segments


def _parts(body: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("tools", "system", "instructions"):
        if body.get(name):
            yield {name: body[name]}
    if isinstance(messages := body.get("messages"), list):
        yield from messages
    for name in ("input", "prompt"):
        yield from _pieces(body.get(name))


def _pieces(prompt: object) -> Iterator[Any]:
    """A prompt that is one string or one list of token ids grows without boundaries: cut it at fixed lengths."""
    if isinstance(prompt, str):
        for start in range(0, len(prompt), CHARACTERS):
            yield prompt[start : start + CHARACTERS].encode("utf-8", "surrogatepass")
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], int):
        for start in range(0, len(prompt), TOKENS):
            yield prompt[start : start + TOKENS]
    elif isinstance(prompt, list):
        yield from prompt
