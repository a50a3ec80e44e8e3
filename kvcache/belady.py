"""Bélády's rule: what is needed last goes first. It wants an oracle."""

from __future__ import annotations

from kvcache.policy import INFINITY, KNOWN, NOBODY, UNTOLD, Foretold, Rank


class Belady(Foretold):
    """The next use as `Hint.next_use` gives it; infinity is never and goes first.

    Steps that wait need it now, and the last to come goes first of them.
    """

    name = "belady"

    def standing(self, owner: str, now: float) -> tuple[Rank, float]:
        if owner in self._since:
            return (KNOWN, self.need(owner)), INFINITY
        hint = self._hints.get(owner)
        if hint is None or hint.next_use is None:
            return UNTOLD, INFINITY
        return (NOBODY if hint.next_use == INFINITY else (KNOWN, -hint.next_use)), INFINITY
