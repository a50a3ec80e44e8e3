"""Writing runs down, for the generators."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from bench.workloads.runs import ASSISTANT, SYSTEM, USER, Call, Piece, Run


class Shelf:
    """The shared pieces of a workload by name, made once. Lengths are divided by `scale`, to at least 1 token."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        self.name = name
        self._scale = scale
        self._pieces: dict[str, Piece] = {}

    def shared(self, name: str, tokens: float, parent: Piece | None = None) -> Piece:
        """The shared piece of that name: a system prompt or a part of one."""
        if name not in self._pieces:
            self._pieces[name] = Piece(f"{self.name}/{name}", self.scaled(tokens), parent, SYSTEM, shared=True)
        return self._pieces[name]

    def scaled(self, tokens: float) -> int:
        """A length as it is played."""
        return max(1, round(tokens / self._scale))


class Draft:
    """One run as it is being written."""

    def __init__(self, shelf: Shelf, number: int, program: str, tenant: str = "default") -> None:
        self._shelf, self._program, self.tenant = shelf, program, tenant
        self.id = f"{shelf.name}-{number}"
        self.calls: list[Call] = []
        self._count = 0

    def say(self, parent: Piece | None, tokens: float, speaker: str = USER) -> Piece:
        """A piece of this run's own."""
        self._count += 1
        return Piece(f"{self.id}/{self._count}", self._shelf.scaled(tokens), parent, speaker)

    def quote(self, parent: Piece | None, calls: Sequence[Call]) -> Piece:
        """What these calls generated, as text on another prompt: as many tokens, but not their KV."""
        self._count += 1
        return Piece(f"{self.id}/{self._count}", sum(call.output for call in calls), parent)

    def call(
        self,
        session: str,
        role: str,
        prompt: Piece,
        output: float,
        after: Sequence[Call] = (),
        *,
        gap: float = 0.0,
        need: int | None = None,
        tools: tuple[str, ...] = (),
        parent: str | None = None,
    ) -> Call:
        """A call whose answer later prompts may stand on."""
        answer = self.say(prompt, output, ASSISTANT)
        stop = "tool_calls" if tools else "stop"
        call = Call(session, role, prompt, answer.tokens, tuple(after), need, gap, answer, stop, tools, parent)
        self.calls.append(call)
        return call

    def run(self, hints: Mapping[str, Any] | None = None) -> Run:
        """The run. Answers that no later prompt has are no pieces of any prompt."""
        used: set[Piece] = set()
        for call in self.calls:
            piece: Piece | None = call.prompt
            while piece is not None and piece not in used:
                used.add(piece)
                piece = piece.parent
        for call in self.calls:
            if call.answer not in used:
                call.answer = None
        return Run(self.id, self._program, self.calls, self.tenant, hints=hints or {})


def after(call: Call) -> Piece:
    """The prompt of a call with its answer, to write on."""
    assert call.answer is not None
    return call.answer


def about(rng: random.Random, median: float, sigma: float = 0.5, most: float = float("inf")) -> float:
    """A lognormal length or time of that median, capped."""
    return min(most, median * rng.lognormvariate(0.0, sigma))


def template(edges: str, **joins: str | float) -> dict[str, Any]:
    """A declared template: `edges` are "from to probability count" with commas between, the first is where runs
    start."""
    parsed = [(*edge.split(), "1", "1")[:4] for edge in edges.split(",")]
    listed = [{"from": s, "to": t, "probability": float(p), "count": float(n)} for s, t, p, n in parsed]
    roles = dict.fromkeys(role for edge in parsed for role in edge[:2])
    nodes = {role: {"join": joins.get(role, "any")} for role in roles}
    return {"nodes": nodes, "edges": listed, "starts": [parsed[0][0]]}
