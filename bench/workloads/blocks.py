"""Prompts known by the hashes of their blocks, made into a tree of pieces that is split where prompts diverge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.workloads.runs import ASSISTANT, SYSTEM, Piece, Run


@dataclass(slots=True, eq=False)
class Line:
    """A stretch of blocks that no prompt had before, from `start` to `end` tokens, which leaves `parent` at `start`."""

    parent: Line | None
    start: int
    end: int
    cuts: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a prompt ends: so many tokens deep on a line, `last` the hash of its last full block."""

    line: Line
    depth: int
    last: int | None = None


class Prompts:
    """Add all prompts and answers first, then `build`; after that `piece` and `answer` know the pieces.

    Only full blocks have hashes, each of which stands for all of the prompt up to it. Whether the partial block at the
    end of a prompt is repeated is not known; it is thought to be where the same session's next prompt has all full
    blocks before it. Lengths are divided by `scale`.
    """

    def __init__(self, name: str, block: int, scale: float = 1.0) -> None:
        self._name, self._block, self._scale = name, block, scale
        self._lines: list[Line] = []
        self._owner: dict[int, tuple[Line, int]] = {}
        self._ends: dict[tuple[Line, int], Piece] = {}
        self._starts: dict[tuple[Line, int], Piece] = {}

    def add(self, ids: Sequence[int], tokens: int, before: Spot | None = None) -> Spot:
        """The spot of a prompt; `before` is that of the session's prompt before it.

        Raises ValueError where a hash does not stand for all that is before it.
        """
        ids = ids[: tokens // self._block]
        known = self._known(ids)
        line, depth = None, 0
        if known:
            line, depth = self._owner[ids[known - 1]][0], known * self._block
            if self._owner[ids[known - 1]][1] != known:
                raise ValueError(f"the block hash {ids[known - 1]} stands at two places")
            if before and before.last == ids[known - 1] and before.depth <= tokens:
                line, depth = before.line, before.depth
        if line is None or depth < min(line.end, tokens):
            line = self._grow(line, depth)
        line.end = max(line.end, tokens)
        for place in range(known, len(ids)):
            self._owner[ids[place]] = line, place + 1
        line.cuts.add(tokens)
        return Spot(line, tokens, ids[-1] if ids else None)

    def follow(self, prompts: Iterable[tuple[Sequence[int], int]]) -> list[Spot]:
        """The spots of a session's prompts, of which (hashes, tokens) are given."""
        spots: list[Spot] = []
        for ids, tokens in prompts:
            spots.append(self.add(ids, tokens, spots[-1] if spots else None))
        return spots

    def cut(self, spot: Spot, depth: int) -> Spot:
        """A piece of the prompt to `spot` shall end at `depth`."""
        line = spot.line
        while line.parent and depth <= line.start:
            line = line.parent
        line.cuts.add(depth)
        return Spot(line, depth)

    def answered(self, spot: Spot, following: Spot, output: int) -> Spot | None:
        """Where the answer to a prompt ends in the prompt after it, if that one extends the first wholly."""
        line, depth, left = following.line, following.depth, following
        while line is not spot.line:
            if line.parent is None:
                return None
            left = Spot(line, depth)
            line, depth = line.parent, line.start
        if depth == spot.depth:
            line, depth = left.line, left.depth
        return self.cut(Spot(line, depth), min(spot.depth + output, depth)) if depth > spot.depth else None

    def build(self) -> None:
        """Make the pieces."""
        for line in self._lines:
            above = self._ends[line.parent, self.scaled(line.start)] if line.parent else None
            if above:
                self._ends[line, above.end] = above
            for depth in sorted(line.cuts):
                start, end = above.end if above else 0, self.scaled(depth)
                if end > start:
                    piece = Piece(f"{self._name}/{len(self._starts)}", end - start, above)
                    self._starts[line, start] = self._ends[line, end] = above = piece

    def piece(self, spot: Spot) -> Piece:
        """The last piece of a prompt."""
        return self._ends[spot.line, self.scaled(spot.depth)]

    def answer(self, spot: Spot, end: Spot | None) -> Piece | None:
        """The piece that follows on a prompt up to `end`, shorter where another prompt leaves inside it."""
        if end is None or self.scaled(end.depth) <= self.scaled(spot.depth):
            return None
        piece = self._starts[end.line, self.scaled(spot.depth)]
        piece.speaker = ASSISTANT
        return piece

    def system(self, spot: Spot, tokens: int) -> Spot | None:
        """The spot of the system prompt of so many tokens, if it is a part of that prompt."""
        return self.cut(spot, tokens) if 0 < tokens < spot.depth else None

    def scaled(self, tokens: int) -> int:
        """A length as it is played, at least 1 token."""
        return max(1, round(tokens / self._scale)) if tokens else 0

    def _grow(self, parent: Line | None, start: int) -> Line:
        if parent:
            parent.cuts.add(start)
        self._lines.append(Line(parent, start, start))
        return self._lines[-1]

    def _known(self, ids: Sequence[int]) -> int:
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if ids[middle - 1] in self._owner else (low, middle - 1)
        return low


def speak(piece: Piece, speaker: str = SYSTEM) -> None:
    """All of the prompt up to this piece is that speaker's."""
    for one in piece.path():
        one.speaker = speaker


def share(runs: Sequence[Run]) -> None:
    """Mark as shared what more than one run has in its prompts."""
    count: Counter[Piece] = Counter()
    for run in runs:
        seen: set[Piece] = set()
        for call in run.calls:
            piece: Piece | None = call.answer or call.prompt
            while piece and piece not in seen:
                seen.add(piece)
                piece = piece.parent
        count.update(seen)
    for piece, times in count.items():
        piece.shared = times > 1
