"""Blocks of a worker that the same owners need."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from itertools import islice
from typing import Protocol

DEVICE, HOST = range(2)
"""The tiers."""

ANONYMOUS = ""
"""The owner of what steps leave that nobody names. It has no line, and nothing is ever foretold of it: LRU order."""

MOST_OWNERS = 8
"""Branches that blocks are ranked by, beside roles: of more, those that began or wrote last."""

Key = Hashable


class Ranked(Protocol):
    """Free blocks of one span in a tier."""

    def changed(self, now: float) -> None:
        """The owners of the span have changed."""
        ...


class Parts(Protocol):
    """A tier with free blocks of any span."""

    def parted(self, keys: Collection[Key], span: Span, now: float) -> None:
        """Those of the free blocks that have these keys are this span's now, and were all another's."""
        ...


class Span:
    """Blocks with the same owners: `keys` with their places, rising; `tiers` copies on the device and on the host.

    `free` are those that can be evicted; `roles` are those of the owners that are roles. A span without owners is dead.
    `found`: nobody has written the blocks, so that their places are not known, and whoever writes them takes them over.
    """

    __slots__ = ("found", "free", "keys", "owners", "roles", "tiers")

    def __init__(self, owners: Iterable[str] = (), found: bool = False) -> None:
        self.owners: dict[str, None] = dict.fromkeys(owners)
        self.roles: dict[str, None] = {}
        self.keys: dict[Key, int] = {}
        self.tiers = [0, 0]
        self.free: dict[Ranked, None] = {}
        self.found = found

    @property
    def end(self) -> int:
        """The place of its last block."""
        return next(reversed(self.keys.values()))

    @property
    def oldest(self) -> str:
        """Of its branches the one that began or wrote first; where there is none, so of its roles."""
        others = (owner for owner in self.owners if owner not in self.roles and owner != ANONYMOUS)
        return next(others, None) or next(iter(self.roles))

    @property
    def ranked_by(self) -> Collection[str]:
        """The owners that count."""
        if len(self.owners) <= MOST_OWNERS:
            return self.owners.keys()
        branches = (owner for owner in reversed(self.owners) if owner not in self.roles)
        return (*self.roles, *islice(branches, MOST_OWNERS))

    def tell(self, now: float) -> None:
        """Its owners have changed: its free blocks are ranked anew."""
        for ranked in tuple(self.free):
            ranked.changed(now)
