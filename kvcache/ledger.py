"""Who needs which block of a worker: every branch whose latest step contains it, and a role for what its steps share.

Blocks are named by keys that stand for all tokens up to their end (vLLM's block hashes), so that equal keys mean equal
prompts up to there, at the same place. A block that the next step of its branch does not contain is superseded by that
fact alone. All that is kept here is kept for a block that is known or a step that waits or runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count, filterfalse, islice, takewhile
from typing import NamedTuple

from kvcache.span import ANONYMOUS, DEVICE, HOST, MOST_OWNERS, Key, Parts, Ranked, Span

__all__ = ["ANONYMOUS", "DEVICE", "HOST", "MOST_OWNERS", "Key", "Ledger", "Parts", "Ranked", "Span"]

MOST_KEPT = 64
"""Owners that a block has: of more, the one that began first is not kept, and the block is somebody's from then on."""

MOST_ROLES = 1024
ROLE_KEYS = 2048
"""Blocks from the start of a prompt in which the steps of a role are compared."""

MOST_RECALLED = 65_536
"""Keys of the roles' latest steps, over all roles: kept when the blocks are gone, or nothing could be shared once it
was evicted."""

MOST_REPORTED = 65_536
"""Owners in one report of residency."""


class _Last(NamedTuple):
    """The latest step of a role: its number, branch and first keys."""

    step: int
    branch: str
    keys: Sequence[Key]


class Ledger:
    """The owners of a worker's blocks.

    A key is known from `wrote` or `gained` until its last copy is lost, so that all of a step's new keys must be
    `gained` after `wrote`. An owner is known while it has a known block or a step that waits or runs; `forgotten`
    collects those that are not any more, to be emptied by whoever reads it. `tiers` are told where a span is parted.
    """

    def __init__(self) -> None:
        self.forgotten: dict[str, None] = {}
        self.tiers: list[Parts] = []
        self._spans: dict[Key, Span] = {}
        self._before: dict[Key, Key] = {}  # the block before one in its prompt, where it was written
        self._copies: tuple[dict[Key, int], dict[Key, int]] = ({}, {})
        self._of: dict[str, dict[Span, None]] = {}
        self._steps = 0
        self._running: dict[str, int] = {}
        self._written: dict[str, int] = {}  # the latest step of an owner that wrote
        self._roles: OrderedDict[str, _Last] = OrderedDict()
        self._recalled = 0  # keys in _roles
        self._stirred: dict[Span, None] = {}  # gained or lost a copy since the last report
        self._changed: dict[str, None] = {}  # owners that may hold more or less than was reported
        self._reported: dict[str, tuple[int, int]] = {}

    def __contains__(self, owner: str) -> bool:
        return owner in self._of or owner in self._running

    def strangers(self, owners: Iterable[str]) -> list[str]:
        """Those of these owners of which nothing is known."""
        return [*filterfalse(self._running.__contains__, filterfalse(self._of.__contains__, owners))]

    def runs(self, owner: str) -> bool:
        """Whether a step of the owner waits or runs."""
        return owner in self._running

    def __iter__(self) -> Iterator[str]:
        """All owners with blocks."""
        return iter(self._of)

    def span(self, key: Key) -> Span | None:
        """The span of a block; None where it is not known."""
        return self._spans.get(key)

    def line(self, owner: str) -> Sequence[Key]:
        """The known blocks of the owner's latest step, from its start to the first that is missing. O(its blocks)."""
        spans = (span for span in self._of.get(owner, ()) if not span.found)
        at = {place: key for span in spans for key, place in span.keys.items()}
        # What very many share may not be kept as this owner's.
        for place in range(max(at, default=0), 0, -1):
            if place in at and place - 1 not in at and (before := self._before.get(at[place])) in self._spans:
                at[place - 1] = before
        return [at[place] for place in takewhile(at.__contains__, count())]

    def held(self, owner: str) -> tuple[int, int]:
        """Copies of an owner's blocks on the device and on the host. O(its spans)."""
        device = host = 0
        for span in self._of.get(owner, ()):
            on_device, on_host = span.tiers
            device, host = device + on_device, host + on_host
        return device, host

    def residency(self, full: bool = False) -> dict[str, tuple[int, int]]:
        """What `held` is now of the owners of which it was reported otherwise, (0, 0) of those gone; full: of all.

        At most `MOST_REPORTED`, the others next time.
        """
        changed = self._changed
        for span in self._stirred:
            changed.update(span.owners)
        self._stirred.clear()
        if full:
            self._reported.clear()
            changed.clear()
            changed.update(dict.fromkeys(self._of))
        changed.pop(ANONYMOUS, None)
        report = {}
        for owner in list(islice(changed, MOST_REPORTED)):
            del changed[owner]
            held = self.held(owner)
            if held == self._reported.get(owner, (0, 0)):
                continue
            report[owner] = held
            if any(held):
                self._reported[owner] = held
            else:
                del self._reported[owner]
        return report

    def began(self, owner: str, keys: Sequence[Key] | None, now: float) -> int:
        """A step of the owner waits or runs; these are the full blocks of its prompt, None where nobody knows.

        What is known of them is the owner's already. Returns the number of the step, which rises.
        """
        self._steps += 1
        self._running[owner] = self._running.get(owner, 0) + 1
        if owner == ANONYMOUS:
            return self._steps
        if keys is not None:
            self._supersede(owner, keys, now)
            self._own(owner, takewhile(self._spans.__contains__, keys), now)
        for span in self._of.get(owner, ()):
            if len(span.owners) > MOST_OWNERS and owner not in span.roles:
                del span.owners[owner]
                span.owners[owner] = None
                span.tell(now)
        return self._steps

    def wrote(self, owner: str, role: str | None, keys: Sequence[Key], now: float, step: int | None = None) -> None:
        """A step of the owner leaves these full blocks; each is held or will be `gained` now.

        What the latest two branches of a role share belongs to it. Where a step of the owner that began later has
        written before, what only this one leaves is superseded. `step` is its number; None: the latest.
        """
        step = self._steps if step is None else step
        if owner == ANONYMOUS:
            self._own(owner, keys, now)
            return
        if step < self._written.get(owner, 0):
            self._own(None, keys, now)
            return
        self._written[owner] = step
        self._supersede(owner, keys, now)
        self._own(owner, keys, now)
        if self._running.get(owner, 0) <= 1:
            for span in [span for span in self._of.get(owner, ()) if span.found]:
                self._disown(owner, span, list(span.keys), now)
        if role is not None and keys:
            self._share(role, _Last(step, owner, keys[:ROLE_KEYS]), now)
        self._forget(owner)

    def left(self, owner: str) -> None:
        """The step has ended, well or not."""
        if (steps := self._running.pop(owner, 1) - 1) > 0:
            self._running[owner] = steps
        self._forget(owner)

    def released(self, owner: str, now: float) -> None:
        """The owner's blocks are dead, where nobody else needs them."""
        if owner == ANONYMOUS:
            return
        for span in tuple(self._of.get(owner, ())):
            self._leave(owner, span, now)
        self._forget(owner)

    def gained(self, key: Key, tier: int, owner: str = ANONYMOUS) -> None:
        """A tier has one more copy of a block. One that nobody knows is the owner's until somebody writes it."""
        span = self._spans.get(key)
        if span is None:
            mine = self._of.setdefault(owner, {})
            span = next(reversed(mine), None)
            if span is None or not span.found:
                span = Span((owner,), found=True)
                mine[span] = None
            self._spans[key] = span
            span.keys[key] = -1
        copies = self._copies[tier]
        copies[key] = copies.get(key, 0) + 1
        span.tiers[tier] += 1
        self._stirred[span] = None

    def lost(self, key: Key, tier: int) -> None:
        """A tier has one copy less. The last one gone, the block is not known any more."""
        copies = self._copies[tier]
        left = copies.pop(key, 0) - 1
        if left < 0:
            return
        span = self._spans[key]
        span.tiers[tier] -= 1
        self._stirred[span] = None
        if left:
            copies[key] = left
            return
        if key in self._copies[1 - tier]:
            return
        del self._spans[key], span.keys[key]
        self._before.pop(key, None)
        if not span.keys:
            del self._stirred[span]
            for owner in span.owners:
                self._unlink(owner, span)

    def clear(self, tier: int) -> None:
        """A tier has been emptied."""
        for key, copies in list(self._copies[tier].items()):
            for _ in range(copies):
                self.lost(key, tier)

    def copies(self, key: Key, tier: int) -> int:
        """How many copies of a block a tier has."""
        return self._copies[tier].get(key, 0)

    def _supersede(self, owner: str, keys: Sequence[Key], now: float) -> None:
        """Take the owner from what these keys do not contain. O(its spans and what is taken)."""
        for span in tuple(self._of.get(owner, ())):
            if span.found:
                continue
            beyond = []
            # All that an owner has is of one prompt: what is before a block of the keys is of them, too.
            for key in reversed(span.keys):
                if (place := span.keys[key]) < len(keys) and keys[place] == key:
                    break
                beyond.append(key)
            if beyond:
                self._disown(owner, span, beyond[::-1], now)

    def _own(self, owner: str | None, keys: Iterable[Key], now: float) -> None:
        """The owner has these blocks of its prompt from now on; None: nobody new has those that nobody knew."""
        new: dict[Span | None, dict[Key, int]] = {}
        spans, last, before = self._spans, None, None
        for place, key in enumerate(keys):
            span = spans.get(key)
            if span is None or span is not last:
                if span is None or span.found or (owner is not None and owner not in span.owners):
                    new.setdefault(span, {})[key] = place
                    if before is not None:
                        self._before[key] = before
                else:
                    last = span
            before = key
        for span, places in new.items():
            if span is None:
                span = self._own_span(owner, next(iter(places.values())))
                span.keys.update(places)
                spans.update(dict.fromkeys(places, span))
                continue
            span = self._parted(span, places, now)
            if span.found:
                span.found, span.keys = False, places
                for other in tuple(span.owners):
                    self._leave(other, span, now)
            if owner is not None:
                self._join(owner, span, now)
            span.tell(now)

    def _own_span(self, owner: str | None, place: int) -> Span:
        """A span that is this owner's alone, for keys from `place` on: the latest that it has, or a new one.

        What one anonymous step leaves is a span of its own: if somebody takes a part of it over, only that is parted.
        """
        if owner is None:
            return Span()
        mine = self._of.setdefault(owner, {})
        latest = next(reversed(mine), None)
        if latest is None or owner == ANONYMOUS or latest.found or len(latest.owners) > 1 or latest.end >= place:
            latest = Span((owner,))
            mine[latest] = None
        return latest

    def _parted(self, span: Span, keys: Collection[Key], now: float) -> Span:
        """The span of just these of a span's keys, in their order: itself, or one parted from it."""
        if len(keys) == len(span.keys):
            return span
        made = Span(span.owners, span.found)
        made.roles = dict(span.roles)
        for owner in made.owners:
            self._of[owner][made] = None
        for key in keys:
            self._spans[key] = made
            made.keys[key] = span.keys.pop(key)
        for tier, copies in enumerate(self._copies):
            made.tiers[tier] = sum(copies.get(key, 0) for key in keys)
            span.tiers[tier] -= made.tiers[tier]
        if span.free:
            for parts in self.tiers:
                parts.parted(keys, made, now)
        return made

    def _disown(self, owner: str, span: Span, keys: Collection[Key], now: float) -> None:
        self._leave(owner, self._parted(span, keys, now), now)

    def _join(self, owner: str, span: Span, now: float) -> None:
        span.owners[owner] = None
        self._of.setdefault(owner, {})[span] = None
        self._changed[owner] = None
        if len(span.owners) > MOST_KEPT:
            oldest = span.oldest
            self._leave(oldest, span, now)
            span.owners[ANONYMOUS] = None
            self._of.setdefault(ANONYMOUS, {})[span] = None

    def _leave(self, owner: str, span: Span, now: float) -> None:
        del span.owners[owner]
        span.roles.pop(owner, None)
        self._unlink(owner, span)
        span.tell(now)

    def _share(self, role: str, step: _Last, now: float) -> None:
        last = self._roles.get(role)
        if last is None or last.step <= step.step:
            self._recall(role, step)
        if last is None or last.branch == step.branch:
            return
        shared = step.keys[: _common(last.keys, step.keys)]
        self._supersede(role, shared, now)
        self._own(role, shared, now)
        for span in self._of.get(role, ()):
            if role not in span.roles:
                span.roles[role] = None
                if len(span.owners) > MOST_OWNERS:  # it is ranked by one branch more
                    span.tell(now)

    def _recall(self, role: str, step: _Last) -> None:
        """This is the latest step of the role, to compare the next one with; its blocks may be gone by then."""
        if (last := self._roles.pop(role, None)) is not None:
            self._recalled -= len(last.keys)
        self._roles[role] = step
        self._recalled += len(step.keys)
        while len(self._roles) > MOST_ROLES or self._recalled > MOST_RECALLED:
            self._recalled -= len(self._roles.popitem(last=False)[1].keys)

    def _unlink(self, owner: str, span: Span) -> None:
        mine = self._of[owner]
        del mine[span]
        self._changed[owner] = None
        if not mine:
            del self._of[owner]
            if owner not in self._reported:
                del self._changed[owner]
        self._forget(owner)

    def _forget(self, owner: str) -> None:
        if owner not in self and owner != ANONYMOUS:
            self._written.pop(owner, None)
            self.forgotten[owner] = None


def _common(one: Sequence[Key], two: Sequence[Key]) -> int:
    """How many keys two lines share. As a key stands for all before it, by bisection."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high) // 2
        if one[middle] == two[middle]:
            low = middle + 1
        else:
            high = middle
    return low
