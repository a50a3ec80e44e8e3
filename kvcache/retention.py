"""Weft's own policy: the retention index, what keeping an owner's KV is worth for each second and token (design §6)."""

from __future__ import annotations

from math import frexp, ldexp

from kvcache.policy import INFINITY, KNOWN, LEASED, UNTOLD, Foretold, Hint, Rank

SOON = 1 / 64  # seconds; a next use that is nearer or has passed counts as this near, a shorter idle time as this long
PATIENCE = 10.0  # seconds by which a foretold use may be overdue, or as long as it was foretold ahead if that is more
IDLE, AHEAD = 4, 32  # bins to each doubling, of the time since the last use and of that to the next


class Retention(Foretold):
    """Dead, then unknown, then unleased by index, then leased by index, the lowest first.

    The index of an owner idle for s seconds is max over h of P(G <= s+h | G > s) / E[min(G-s, h) | G > s], which its
    curve gives, times its seconds per token; 1 / seconds to come where its next use is foretold; above all others,
    leased or not, while its step waits, and the last to come goes first of them. Times are taken as the middle of a
    bin, so that ranks hold for a while: a curve is dear to look up, and has coarser bins itself.
    """

    name = "retention"
    refresh = 1.0

    def standing(self, owner: str, now: float) -> tuple[Rank, float]:
        if owner in self._since:
            return (LEASED, self.need(owner)), INFINITY
        if (hint := self._hints.get(owner)) is None:
            return UNTOLD, INFINITY
        index, until = _index(hint, now)
        if index is None and not hint.leased:
            return UNTOLD, until
        return (LEASED if hint.leased else KNOWN, (index or 0.0) * hint.seconds_per_token), until


def _index(hint: Hint, now: float) -> tuple[float | None, float]:
    """The index in 1/s, None where nothing is foretold, and the time before which it holds."""
    if hint.next_use is not None:
        ahead = hint.next_use - now
        if ahead <= SOON:
            lapses = hint.next_use + max(PATIENCE, hint.next_use - hint.since)
            return (1 / SOON, lapses) if now < lapses else (None, INFINITY)
        if ahead == INFINITY:
            return 0.0, INFINITY
        low, high = _bin(ahead, AHEAD)
        return 2 / (low + high), hint.next_use - low
    if hint.gap is not None:
        low, high = _bin(max(now - hint.since, SOON), IDLE)
        return hint.gap.index((low + high) / 2), hint.since + high
    return None, INFINITY


def _bin(seconds: float, bins: int) -> tuple[float, float]:
    """The edges of the bin that a time lies in: so many bins to each doubling."""
    width = ldexp(0.5 / bins, frexp(seconds)[1])
    low = seconds // width * width
    return low, low + width
