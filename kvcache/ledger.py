"""Who needs which block of a worker: every branch whose latest step contains it, and a role for what its steps share.

Blocks are named by keys that stand for all tokens up to their end (vLLM's block hashes), so that equal keys mean equal
prompts up to there. A block that the next step of its branch does not contain is superseded by that fact alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

DEVICE, HOST = range(2)
"""The tiers."""

ANONYMOUS = ""
"""The owner of what steps leave that nobody names. It has no line, and nothing is ever foretold of it: LRU order."""

MOST_OWNERS = 8
"""Branches that blocks are ranked by, beside roles: of more, those that began or wrote last."""

MOST_ROLES = 1024
ROLE_KEYS = 2048
"""Blocks from the start of a prompt in which the steps of a role are compared."""

Key = Hashable


class Ranked(Protocol):
    """Free blocks of one span in a tier."""

    def changed(self, now: float) -> None:
        """The owners of the span have changed."""
        ...

    def parted(self, keys: Collection[Key], span: Span, now: float) -> None:
        """Those of the blocks that have these keys are another span's now."""
        ...


class Span:
    """Blocks with the same owners: `count` that are known, `tiers` copies on the device and on the host.

    `free` are those that can be evicted; `roles` are those of the owners that are roles. A span without owners is dead.
    """

    __slots__ = ("count", "free", "owners", "roles", "tiers")

    def __init__(self, owners: Iterable[str] = ()) -> None:
        self.owners: dict[str, None] = dict.fromkeys(owners)
        self.roles: dict[str, None] = {}
        self.count = 0
        self.tiers = [0, 0]
        self.free: dict[Ranked, None] = {}

    @property
    def ranked_by(self) -> Collection[str]:
        """The owners that count."""
        if len(self.owners) <= MOST_OWNERS:
            return self.owners.keys()
        branches = (owner for owner in reversed(self.owners) if owner not in self.roles)
        return (*self.roles, *islice(branches, MOST_OWNERS))


class Ledger:
    """The owners of a worker's blocks.

    A key is known from `wrote` until its last copy is lost, so that all of a step's new keys must be `gained` after it.
    An owner is known while it has a known block or a step that waits or runs; `forgotten` collects those that are not
    any more, to be emptied by whoever reads it.
    """

    def __init__(self) -> None:
        self.forgotten: dict[str, None] = {}
        self._spans: dict[Key, Span] = {}
        self._copies: tuple[dict[Key, int], dict[Key, int]] = ({}, {})
        self._lines: dict[str, Sequence[Key]] = {}
        self._of: dict[str, dict[Span, None]] = {}
        self._running: dict[str, int] = {}
        self._roles: OrderedDict[str, tuple[str, Sequence[Key]]] = OrderedDict()

    def __contains__(self, owner: str) -> bool:
        return owner in self._of or owner in self._running

    def __iter__(self) -> Iterator[str]:
        """All owners with blocks."""
        return iter(self._of)

    def span(self, key: Key) -> Span | None:
        """The span of a block; None where it is not known."""
        return self._spans.get(key)

    def line(self, owner: str) -> Sequence[Key]:
        """The blocks of the owner's latest step from its start, of which some may be gone."""
        return self._lines.get(owner, ())

    def held(self, owner: str) -> tuple[int, int]:
        """Copies of an owner's blocks on the device and on the host. O(its spans)."""
        spans = self._of.get(owner, ())
        return sum(span.tiers[DEVICE] for span in spans), sum(span.tiers[HOST] for span in spans)

    def began(self, owner: str, keys: Sequence[Key] | None, now: float) -> None:
        """A step of the owner waits or runs; these are the full blocks of its prompt, None where nobody knows."""
        self._running[owner] = self._running.get(owner, 0) + 1
        if owner == ANONYMOUS:
            return
        if keys is not None and (line := self._lines.get(owner)):
            same = _common(line, keys)
            self._disown(owner, line[same:], now)
            self._lines[owner] = line[:same]
        for span in self._of.get(owner, ()):
            if len(span.owners) > MOST_OWNERS and owner not in span.roles:
                del span.owners[owner]
                span.owners[owner] = None
                _tell(span, now)

    def wrote(self, owner: str, role: str | None, keys: Sequence[Key], now: float) -> None:
        """A step of the owner leaves these full blocks; each is held or will be `gained` now.

        What the latest two branches of a role share belongs to it.
        """
        self._own(owner, keys, now)
        if role is not None and owner != ANONYMOUS:
            self._share(role, owner, keys[:ROLE_KEYS], now)

    def left(self, owner: str) -> None:
        """The step has ended, well or not."""
        if (steps := self._running.pop(owner, 1) - 1) > 0:
            self._running[owner] = steps
        self._forget(owner)

    def released(self, owner: str, now: float) -> None:
        """The owner's blocks are dead, where nobody else needs them."""
        if owner == ANONYMOUS:
            return
        self._lines.pop(owner, None)
        for span in tuple(self._of.pop(owner, ())):
            del span.owners[owner]
            span.roles.pop(owner, None)
            _tell(span, now)
        self._forget(owner)

    def gained(self, key: Key, tier: int) -> None:
        """A tier has one more copy of a known block."""
        span = self._spans[key]
        self._copies[tier][key] = self._copies[tier].get(key, 0) + 1
        span.tiers[tier] += 1

    def lost(self, key: Key, tier: int) -> None:
        """A tier has one copy less. The last one gone, the block is not known any more."""
        copies = self._copies[tier]
        if key not in copies:
            return
        span = self._spans[key]
        span.tiers[tier] -= 1
        copies[key] -= 1
        if copies[key]:
            return
        del copies[key]
        if key in self._copies[1 - tier]:
            return
        del self._spans[key]
        span.count -= 1
        if not span.count:
            for owner in span.owners:
                self._unlink(owner, span)

    def clear(self, tier: int) -> None:
        """A tier has been emptied."""
        for key, count in list(self._copies[tier].items()):
            for _ in range(count):
                self.lost(key, tier)

    def copies(self, key: Key, tier: int) -> int:
        """How many copies of a block a tier has."""
        return self._copies[tier].get(key, 0)

    def _own(self, owner: str, keys: Sequence[Key], now: float) -> None:
        """The owner's line is `keys` now: what it has no more loses it, what is new gains it."""
        if owner != ANONYMOUS:
            line = self._lines.get(owner, ())
            self._disown(owner, line[_common(line, keys) :], now)
            self._lines[owner] = keys
        spans, new, last = self._spans, [], None
        for key in keys:
            span = spans.get(key)
            if span is None or (span is not last and owner not in span.owners):
                new.append(key)
            else:
                last = span
        if new:
            self._adopt(owner, new, now)

    def _adopt(self, owner: str, keys: Sequence[Key], now: float) -> None:
        """Add an owner to blocks that it does not have."""
        for span, mine in self._by_span(keys):
            if span is None:
                span = self._own_span(owner)
                for key in mine:
                    self._spans[key] = span
                span.count += len(mine)
                continue
            span = self._parted(span, mine, now)
            span.owners[owner] = None
            self._of.setdefault(owner, {})[span] = None
            _tell(span, now)

    def _disown(self, owner: str, keys: Sequence[Key], now: float) -> None:
        """Take an owner from what it has of these blocks."""
        for span, mine in self._by_span(keys):
            if span is not None and owner in span.owners:
                span = self._parted(span, mine, now)
                del span.owners[owner]
                span.roles.pop(owner, None)
                self._unlink(owner, span)
                _tell(span, now)

    def _by_span(self, keys: Iterable[Key]) -> list[tuple[Span | None, list[Key]]]:
        groups: dict[Span | None, list[Key]] = {}
        for key in keys:
            groups.setdefault(self._spans.get(key), []).append(key)
        return list(groups.items())

    def _own_span(self, owner: str) -> Span:
        """A span that is this owner's alone: the latest that it has, or a new one.

        What one anonymous step leaves is a span of its own: if somebody takes a part of it over, only that is parted.
        """
        mine = self._of.setdefault(owner, {})
        latest = next(reversed(mine), None)
        if latest is None or len(latest.owners) > 1 or owner == ANONYMOUS:
            latest = Span((owner,))
            mine[latest] = None
        return latest

    def _parted(self, span: Span, keys: list[Key], now: float) -> Span:
        """The span of just these of a span's keys: itself, or one parted from it."""
        if len(keys) == span.count:
            return span
        made = Span(span.owners)
        made.roles = dict(span.roles)
        for owner in made.owners:
            self._of[owner][made] = None
        for key in keys:
            self._spans[key] = made
        made.count = len(keys)
        span.count -= len(keys)
        for tier, copies in enumerate(self._copies):
            made.tiers[tier] = sum(copies.get(key, 0) for key in keys)
            span.tiers[tier] -= made.tiers[tier]
        mine = frozenset(keys)
        for ranked in tuple(span.free):
            ranked.parted(mine, made, now)
        return made

    def _share(self, role: str, branch: str, keys: Sequence[Key], now: float) -> None:
        last = self._roles.pop(role, None)
        self._roles[role] = (branch, keys)
        if len(self._roles) > MOST_ROLES:
            self._roles.popitem(last=False)
        if last is None or last[0] == branch:
            return
        if same := _common(last[1], keys):
            self._own(role, keys[:same], now)
            for span in self._of.get(role, ()):
                span.roles[role] = None
        else:
            self._disown(role, self._lines.pop(role, ()), now)

    def _unlink(self, owner: str, span: Span) -> None:
        if (mine := self._of.get(owner)) is not None:
            mine.pop(span, None)
            if not mine:
                del self._of[owner]
        self._forget(owner)

    def _forget(self, owner: str) -> None:
        if owner not in self and owner != ANONYMOUS:
            self._lines.pop(owner, None)
            self.forgotten[owner] = None


def _tell(span: Span, now: float) -> None:
    for ranked in tuple(span.free):
        ranked.changed(now)


def _common(one: Sequence[Key], two: Sequence[Key]) -> int:
    """How many keys two lines share. As a key stands for all before it, by bisection."""
    most = min(len(one), len(two))
    return bisect_left(range(most), True, key=lambda place: one[place] != two[place])
