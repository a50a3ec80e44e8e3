"""Whose output is in this prompt: edges between agents that pass text on, found by the text itself.

An output counts as handed over only as a whole: cut at punctuation, all its longer parts must be in one message, and
not all of them in an earlier prompt: a model that quotes what it has read says nothing of its own.
Parts are compared, not kept: at most `PARTS` hashes an output, of each session only the latest, at most `KEPT` in all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import orjson

from scheduler.prompt import Answer

if TYPE_CHECKING:
    from scheduler.graph import Branch, Step, Workflow

KEPT = 20_000
PARTS = 8
SHORTEST_PART = 16
SHORTEST_WHOLE = 32  # characters of an output that is a message of its own
SHORTEST_QUOTED = 64  # of one among other text
SHORTEST_TASK = 40  # of an argument of a tool call that has not been answered
RECENT_SECONDS = 120.0  # after which an output is not handed over any more, but remembered
READ = 65_536  # parts of prompts that are remembered
MOST_SOURCES = 4  # outputs that share a part: the latest
LONGEST_SEARCHED = 65_536
_CUTS = str.maketrans(dict.fromkeys("\r.!?;:,\"'`*#|<>()[]{}\\", "\n"))


@dataclass(slots=True, eq=False)
class Source:
    """An output of a step: its text, or (`task`) a string among the arguments of a tool call that it made."""

    made_by: Step
    branch: Branch
    task: bool
    whole: int
    parts: frozenset[int]
    length: int
    at: float

    @property
    def step(self) -> str:
        """The id of the step that made it."""
        return self.made_by.id

    @property
    def head(self) -> int:
        """System prompt and tools of the step that made it."""
        return self.made_by.head

    @property
    def words(self) -> frozenset[int]:
        """Equal for outputs that cannot be told apart."""
        return self.parts or frozenset((self.whole,))

    @property
    def waits(self) -> bool:
        """Whether its branch has not gone on since."""
        last = self.branch.last
        return last is not None and (last is self.made_by or last.link == self.made_by.link)


class Handovers:
    """The latest outputs, found again by their parts."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._sources: OrderedDict[Source, None] = OrderedDict()
        self._by_part: dict[int, tuple[Source, ...]] = {}
        self._read: dict[int, None] = {}

    def offer(self, step: Step, answer: Answer, beside: bool) -> None:
        """Remember what a step has put out, in place of what its session put out before, or `beside` it."""
        if not beside:
            for source in step.session.outputs:
                self.forget(source)
            step.session.outputs = []
        self._add(step, answer.text, False)
        for call in answer.calls:
            for text in _strings(call.arguments):
                self._add(step, text, True)

    def find(self, tenant: str, texts: Iterable[str], now: float) -> list[Source]:
        """The tenant's late outputs that are in one of `texts` as a whole, the latest last. Linear, capped.

        What agents of two workflows have said word for word is the output of neither.
        """
        found: dict[Source, None] = {}
        left, salt = LONGEST_SEARCHED, hash(tenant)
        for text in texts:
            if len(text) < SHORTEST_WHOLE:
                continue
            text, left = text[:left], left - len(text)
            whole, parts = hash(_plain(text)) ^ salt, {hash(part) ^ salt for part in _cut(text)}
            near = {source: None for part in (whole, *parts) for source in self._by_part.get(part, ())}
            mine = [s for s in near if now - s.at <= RECENT_SECONDS and _is_in(s, whole, parts)]
            found.update(dict.fromkeys(mine))
            self._reads(parts.difference(*(source.parts for source in mine)))
            if left <= 0:
                break
        by: dict[frozenset[int], set[Workflow]] = {}
        for source in found:
            by.setdefault(source.words, set()).add(source.branch.session.workflow)
        return [source for source in found if len(by[source.words]) == 1]

    def forget(self, source: Source) -> None:
        """Drop an output."""
        if self._sources.pop(source, source) is None:
            for part in {source.whole, *source.parts}:
                rest = tuple(s for s in self._by_part.get(part, ()) if s is not source)
                if rest:
                    self._by_part[part] = rest
                else:
                    self._by_part.pop(part, None)

    def _reads(self, parts: set[int]) -> None:
        """These stood in a prompt and were nobody's output, as far as is known."""
        self._read.update(dict.fromkeys(parts))
        for oldest in list(islice(self._read, max(0, len(self._read) - READ))):
            del self._read[oldest]

    def _add(self, step: Step, text: str, task: bool) -> None:
        plain, salt = _plain(text[:LONGEST_SEARCHED]), hash(step.session.workflow.tenant)
        if len(plain) < SHORTEST_WHOLE:
            return
        longest = sorted(dict.fromkeys(_cut(text[:LONGEST_SEARCHED])), key=len, reverse=True)[:PARTS]
        parts = frozenset(hash(part) ^ salt for part in longest)
        if parts and parts <= self._read.keys():  # it quotes what it has read
            return
        at = step.finished if step.finished is not None else step.arrived
        source = Source(step, step.branch, task, hash(plain) ^ salt, parts, len(plain), at)
        self._sources[source] = None
        step.session.outputs.append(source)
        for part in {source.whole, *source.parts}:
            self._by_part[part] = (*self._by_part.get(part, ()), source)[-MOST_SOURCES:]
        if len(self._sources) > self._kept:
            self.forget(next(iter(self._sources)))


def _is_in(source: Source, whole: int, parts: set[int]) -> bool:
    """Whether an output is a text, or a part of it."""
    alone = source.whole == whole
    shortest = SHORTEST_TASK if source.task else SHORTEST_WHOLE if alone else SHORTEST_QUOTED
    return source.length >= shortest and (alone or (bool(source.parts) and source.parts <= parts))


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
