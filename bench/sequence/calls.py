"""The calls of runs in the order in which they are due, and their prompts as token ids."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Generator

from bench.workloads.runs import Call, Piece, Run, Workload


def order(workload: Workload, live: int, runs: int) -> Generator[tuple[float, Run, Call], float, None]:
    """Each call when it is due, in seconds: `live` runs at once, another when one is over. To be sent when it ended."""
    drawn = iter(workload.runs[:runs])
    due: list[tuple[float, int, Run, Call]] = []
    left: dict[str, int] = {}
    ended: dict[Call, float] = {}
    sent: set[Call] = set()
    number = 0

    def release(run: Run, now: float) -> None:
        nonlocal number
        for call in run.calls:
            if call in sent:
                continue
            times = sorted(ended[one] for one in call.after if one in ended)
            need = len(call.after) if call.need is None else call.need
            if len(times) >= need:
                sent.add(call)
                number += 1
                heapq.heappush(due, ((times[need - 1] if need else now) + call.gap, number, run, call))

    def begin(now: float) -> None:
        if (run := next(drawn, None)) is not None:
            left[run.id] = len(run.calls)
            release(run, now)

    for slot in range(live):
        begin(float(slot))
    while due:
        at, _, run, call = heapq.heappop(due)
        end = yield at, run, call
        ended[call] = end
        left[run.id] -= 1
        release(run, end)
        if not left[run.id]:
            begin(end)


class Tokens:
    """The token ids of prompts: of each piece always the same, of an answer what was generated."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._of: dict[Piece, list[int]] = {}

    def prompt(self, piece: Piece) -> list[int]:
        """The ids of the prompt that ends with a piece."""
        return [token for one in piece.path() for token in self._piece(one)]

    def answered(self, piece: Piece, generated: list[int]) -> None:
        """The piece repeats what was generated."""
        self._of[piece] = [*generated, *self._made(piece)][: piece.tokens]

    def _piece(self, piece: Piece) -> list[int]:
        if piece not in self._of:
            self._of[piece] = self._made(piece)
        return self._of[piece]

    def _made(self, piece: Piece) -> list[int]:
        rng = random.Random(hashlib.sha256(piece.name.encode()).digest())
        return [rng.randrange(3, self._vocabulary) for _ in range(piece.tokens)]
