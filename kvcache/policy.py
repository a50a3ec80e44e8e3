"""What every eviction policy is: events of owners in, an order of eviction out.

An owner is the branch or role on whose account KV blocks are kept. A stack is a run of free cached blocks of the same
owners, given up from its tail; a block with several owners counts for the one that needs it soonest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

DEAD, UNKNOWN, KNOWN, LEASED = range(4)
"""Classes of stacks: all of a lower class go before any of a higher one."""

Rank = tuple[int, float]
"""Class, then value within it. The lowest goes first; of equals the one freed first."""

INFINITY = float("inf")
NOBODY: Rank = (DEAD, -INFINITY)
UNTOLD: Rank = (UNKNOWN, 0.0)
"""The ranks of an owner that nobody will call again, and of one nobody foretold anything of."""

NEEDED = 1e12  # above any value of an owner without a step, and any time in seconds


class Stack(Protocol):
    """Free cached blocks of the same owners. `freed` is when they were last freed, in seconds."""

    @property
    def owners(self) -> Collection[str]:
        """The live owners; empty where nobody will need the blocks as far as is known."""
        ...

    @property
    def freed(self) -> float:
        """Seconds on the clock of `now`."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that its free blocks hold."""
        ...


class Curve(Protocol):
    """The retention index of an owner against how long it has been idle."""

    def index(self, idle: float) -> float:
        """1/s, after `idle` seconds."""
        ...


class Hint(Struct, frozen=True, gc=False):
    """What is foretold of an owner. Each policy reads what it knows; None: not told.

    `gap`: the index of its gap, counted from `since`. `steps`: steps to execution. `next_use`: when it runs next, in
    seconds on the clock of `now`, as only an oracle knows or the graph foretells. `hold`: the latest return that is
    still likely, in seconds after `since` (a quantile of the gap). `reuse`: the chance that its KV is used again.
    `seconds_per_token`: what recomputing a token of it costs. `leased`: it may pass the gate.
    """

    since: float
    gap: Curve | None = None
    steps: float | None = None
    next_use: float | None = None
    hold: float | None = None
    reuse: float | None = None
    seconds_per_token: float = 1.0
    leased: bool = False


class Policy:
    """Least recently used, which is also what the others do with what they know nothing of.

    `refresh` is how many seconds a rank may be old while no event of its owner has come.
    """

    name = "lru"
    refresh = INFINITY

    def started(self, owner: str, now: float) -> None:
        """A step of the owner waits or runs."""

    def finished(self, owner: str, tokens: int, now: float) -> None:
        """The step has ended; the owner's context is so many tokens long."""

    def told(self, hints: Mapping[str, Hint], now: float) -> None:
        """The core foretells something of owners; it replaces what was told of them before."""

    def released(self, owner: str, now: float) -> None:
        """The owner's KV is dead."""

    def forgotten(self, owner: str) -> None:
        """The owner has no blocks any more."""

    def pressed(self, used: float) -> None:
        """The share of the pool that is in use or cached, 0 to 1."""

    def rank(self, stack: Stack, now: float) -> Rank:
        """Where the stack stands at `now`."""
        return self.ranked(stack.owners, stack.freed, now)

    def ranked(self, owners: Collection[str], freed: float, now: float) -> Rank:
        """Where a stack of these owners stands at `now`, that was freed then."""
        return (UNKNOWN, freed)

    def ranking(self) -> Callable[[Collection[str], float, float], Rank]:
        """`ranked`, for many stacks while no event comes."""
        return self.ranked


class Foretold(Policy):
    """What the policies share that go by hints: a stack counts for the owner that needs it soonest.

    Where nobody needs it, it is dead, and where nobody knows, it stands as under LRU. A step waits or runs from its
    `started` to its `finished`, also when it fails; an owner may have several. The newest word counts: what was
    released is alive again once it starts or is told of. All is kept until `forgotten`, also of one without blocks.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}  # that wait or run
        self._since: dict[str, float] = {}  # when the first of them came
        self._hints: dict[str, Hint] = {}
        self._dead: set[str] = set()
        self._standings: dict[str, tuple[Rank, float]] = {}  # as `standing` gave them; no event has come since
        self._stepped: set[str] = set()  # that have had a step
        self._latest: Hint | None = None  # a gap told lately, of whomever of them

    def started(self, owner: str, now: float) -> None:
        self._changed(owner)
        self._dead.discard(owner)
        self._stepped.add(owner)
        self._steps[owner] = self._steps.get(owner, 0) + 1
        self._since.setdefault(owner, now)

    def finished(self, owner: str, tokens: int, now: float) -> None:
        self._changed(owner)
        if (left := self._steps.pop(owner, 1) - 1) > 0:
            self._steps[owner] = left
        else:
            self._since.pop(owner, None)
            # Until the core says more, it waits as it did before, or of whom nothing was told as others do.
            if (hint := self._hints.get(owner) or self._latest) is not None:
                self._hints[owner] = replace(hint, since=now)

    def told(self, hints: Mapping[str, Hint], now: float) -> None:
        self._hints.update(hints)
        self._dead.difference_update(hints)
        standings = self._standings
        for owner in hints:
            standings.pop(owner, None)
        gaps = (hint for owner, hint in reversed([*hints.items()]) if hint.gap is not None and owner in self._stepped)
        self._latest = next(gaps, self._latest)

    def released(self, owner: str, now: float) -> None:
        self._changed(owner)
        self._hints.pop(owner, None)
        self._dead.add(owner)

    def forgotten(self, owner: str) -> None:
        self._changed(owner)
        self._stepped.discard(owner)
        self._steps.pop(owner, None)
        self._since.pop(owner, None)
        self._hints.pop(owner, None)
        self._dead.discard(owner)

    def ranked(self, owners: Collection[str], freed: float, now: float) -> Rank:
        best, standings = NOBODY, self._standings
        for owner in owners:
            held = standings.get(owner)
            if held is None or now >= held[1]:
                held = (NOBODY, INFINITY) if owner in self._dead else self.standing(owner, now)
                standings[owner] = held
            if held[0] > best:
                best = held[0]
        return best if best[0] > UNKNOWN else (best[0], freed)

    def need(self, owner: str) -> float:
        """The value of an owner whose step waits or runs, above that of any other: the first come is served first."""
        return NEEDED - self._since[owner]

    def standing(self, owner: str, now: float) -> tuple[Rank, float]:
        """The rank of a live owner, and the time before which it holds if no event comes."""
        return UNTOLD, INFINITY

    def _changed(self, owner: str) -> None:
        self._standings.pop(owner, None)
