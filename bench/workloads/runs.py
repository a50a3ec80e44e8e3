"""The types of every workload: runs of agents, as graphs of calls over a tree of prompt pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(slots=True, eq=False)
class Piece:
    """A stretch of prompt, in tokens, that follows `parent`. Two prompts share what their paths to the root share.

    `name` is unique in its workload. `shared` pieces (system prompts, tools) are the same text in every run that has
    them; others are a run's own. `text` is None where only the length is known: a player then makes text of about
    that many tokens from the name. `speaker` is who would say it in a chat.
    """

    name: str
    tokens: int
    parent: Piece | None = None
    speaker: str = USER
    text: str | None = None
    shared: bool = False
    start: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.parent.end if self.parent else 0
        self.end = self.start + self.tokens

    def path(self) -> list[Piece]:
        """The pieces of the prompt that ends here, from its start."""
        pieces = [self]
        while (above := pieces[-1].parent) is not None:
            pieces.append(above)
        return pieces[::-1]


def meeting(one: Piece | None, two: Piece | None) -> Piece | None:
    """The last piece that two prompts share."""
    while one is not two and one is not None and two is not None:
        if one.start > two.start:
            one = one.parent
        elif two.start > one.start:
            two = two.parent
        else:
            one, two = one.parent, two.parent
    return one if one is two else None


def common(one: Piece | None, two: Piece | None) -> int:
    """The tokens of the prefix that two prompts share."""
    piece = meeting(one, two)
    return piece.end if piece else 0


@dataclass(slots=True, eq=False)
class Call:
    """One LLM call. Its prompt is the path to `prompt`; `output` tokens are generated.

    It is sent `gap` seconds after `need` of the calls `after` have ended (None: all of them); at once where there are
    none. `answer` is a child of `prompt` where later prompts repeat what was generated: its KV then lies there.
    `stop` is the finish reason; `tools` are the names of the tools that the answer calls.
    """

    session: str
    role: str
    prompt: Piece
    output: int
    after: tuple[Call, ...] = ()
    need: int | None = None
    gap: float = 0.0
    answer: Piece | None = None
    stop: str = "stop"
    tools: tuple[str, ...] = ()
    parent: str | None = None


@dataclass(slots=True, eq=False)
class Run:
    """One run of an agent program: a workflow. `calls` are in an order in which each follows those it waits for.

    `hints` is what its clients could tell a server that asks: a declared template under "template" (the document of
    PUT /v1/workflows/templates). `arrival`: seconds after the start at which an open-loop trace sent it, else None.
    """

    id: str
    program: str
    calls: list[Call]
    tenant: str = "default"
    arrival: float | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)

    def ends_session(self, index: int) -> bool:
        """Whether the call at `index` is the last of its session."""
        session = self.calls[index].session
        return all(call.session != session for call in self.calls[index + 1 :])

    def again(self, suffix: str) -> Run:
        """The same run with a fresh id and fresh pieces: nothing but shared pieces is found in a cache."""
        pieces: dict[Piece, Piece] = {}

        def copied(piece: Piece) -> Piece:
            if piece.shared:
                return piece
            for one in piece.path():
                if not one.shared and one not in pieces:
                    above = pieces.get(one.parent, one.parent) if one.parent else None
                    pieces[one] = Piece(one.name + suffix, one.tokens, above, one.speaker, one.text)
            return pieces[piece]

        calls: dict[Call, Call] = {}
        for c in self.calls:
            answer = copied(c.answer) if c.answer else None
            after = tuple(calls[a] for a in c.after)
            calls[c] = Call(
                c.session, c.role, copied(c.prompt), c.output, after, c.need, c.gap, answer, c.stop, c.tools, c.parent
            )
        return Run(self.id + suffix, self.program, list(calls.values()), self.tenant, self.arrival, self.hints)


@dataclass(frozen=True, slots=True)
class Workload:
    """Runs to draw from. `left_out` counts, by reason, what the source has and this does not."""

    name: str
    runs: Sequence[Run]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def mean_context(self) -> float:
        """Prompt and output tokens of a call, the mean over all calls: what one live session holds."""
        calls = [c for run in self.runs for c in run.calls]
        return sum(c.prompt.end + c.output for c in calls) / len(calls)

    def draw(self, seed: int) -> Iterator[Run]:
        """Runs without end: all in a random order, then all again with fresh ids, and so on."""
        rng, times = random.Random(seed), 0
        while True:
            order = list(self.runs)
            rng.shuffle(order)
            yield from (run if not times else run.again(f"~{times}") for run in order)
            times += 1
