"""Whose output is in this prompt: edges between agents that pass text on, found by the text itself.

An output counts as handed over only as a whole: cut at punctuation, all its longer parts must be in one message.
Parts are compared, not kept: at most `PARTS` hashes an output, at most `KEPT` outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from scheduler.prompt import Answer

if TYPE_CHECKING:
    from scheduler.graph import Branch, Workflow

KEPT = 20_000
PARTS = 8
SHORTEST_PART = 16
SHORTEST_WHOLE = 32  # a message that is nothing but the output
SHORTEST_QUOTED = 64  # an output among other text
SHORTEST_TASK = 16  # an argument of a tool call that has not been answered, as a message of its own
SHORTEST_QUOTED_TASK = 40
MOST_SOURCES = 4  # outputs that share a part; beyond, the part is a phrase and says nothing
LONGEST_SEARCHED = 65_536
_CUTS = str.maketrans(dict.fromkeys("\r.!?;:,\"'`*#|<>()[]{}\\", "\n"))


@dataclass(slots=True, eq=False)
class Source:
    """An output of a step: its text, or (`task`) a string among the arguments of a tool call that it made."""

    step: str
    branch: Branch
    task: bool
    whole: int
    parts: frozenset[int]
    length: int


class Handovers:
    """The latest outputs, found again by their parts."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._sources: OrderedDict[Source, None] = OrderedDict()
        self._by_part: dict[int, tuple[Source, ...]] = {}

    def offer(self, step: str, branch: Branch, answer: Answer) -> None:
        """Remember what a step has put out."""
        self._add(step, branch, answer.text, False)
        for call in answer.calls:
            for text in _strings(call.arguments):
                self._add(step, branch, text, True)

    def find(self, tenant: str, texts: Iterable[str]) -> list[Source]:
        """The tenant's outputs that are in one of `texts` as a whole, the latest last. Linear in the texts, capped.

        What agents of two workflows have said word for word is the output of neither.
        """
        found: dict[Source, None] = {}
        left = LONGEST_SEARCHED
        for text in texts:
            text, left = text[:left], left - len(text)
            hashes = {hash(_plain(text)), *map(hash, _cut(text))}
            for source in {s: None for part in hashes for s in self._by_part.get(part, ())}:
                if source.branch.session.workflow.tenant == tenant and self._is_in(source, hashes):
                    found[source] = None
            if left <= 0:
                break
        by: dict[int, set[Workflow]] = {}
        for source in found:
            by.setdefault(source.whole, set()).add(source.branch.session.workflow)
        return [source for source in found if len(by[source.whole]) == 1]

    def forget(self, source: Source) -> None:
        """Drop an output."""
        if self._sources.pop(source, source) is None:
            for part in {source.whole, *source.parts}:
                rest = tuple(s for s in self._by_part.get(part, ()) if s is not source)
                if rest:
                    self._by_part[part] = rest
                else:
                    self._by_part.pop(part, None)

    def _is_in(self, source: Source, hashes: set[int]) -> bool:
        if source.whole in hashes:
            return source.length >= (SHORTEST_TASK if source.task else SHORTEST_WHOLE)
        enough = source.length >= (SHORTEST_QUOTED_TASK if source.task else SHORTEST_QUOTED)
        return enough and bool(source.parts) and source.parts <= hashes

    def _add(self, step: str, branch: Branch, text: str, task: bool) -> None:
        plain = _plain(text[:LONGEST_SEARCHED])
        if len(plain) < SHORTEST_TASK:
            return
        longest = sorted(dict.fromkeys(_cut(text[:LONGEST_SEARCHED])), key=len, reverse=True)[:PARTS]
        source = Source(step, branch, task, hash(plain), frozenset(map(hash, longest)), len(plain))
        self._sources[source] = None
        for part in {source.whole, *source.parts}:
            self._by_part[part] = (*self._by_part.get(part, ()), source)[-MOST_SOURCES:]
        if len(self._sources) > self._kept:
            self.forget(next(iter(self._sources)))


def _plain(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def _cut(text: str) -> Iterator[str]:
    for part in text.replace("\\n", "\n").translate(_CUTS).split("\n"):  # JSON inside JSON spells line ends so
        part = " ".join(part.split())
        if len(part) >= SHORTEST_PART:
            yield part


def _strings(arguments: str) -> Iterator[str]:
    """The strings in a tool call's arguments, two levels deep."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return
    todo = [value]
    for _ in range(3):
        inner: list[object] = []
        for item in todo:
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        todo = inner
