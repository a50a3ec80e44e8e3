"""KVFlow (arXiv 2507.07400): what has the most steps to execution goes first."""

from __future__ import annotations

from kvcache.policy import INFINITY, KNOWN, UNTOLD, Foretold, Rank


class KVFlow(Foretold):
    """Steps to execution (STE), as the client's agent step graph gives them in `Hint.steps`, or else seconds to them.

    An owner is an agent's fixed prompt; one of which no steps are told is a varying suffix, and goes before all of
    them, least recently used first (Algorithms 1 and 2). Running is 0, unreachable infinity, and a block of several
    owners has the least of theirs. A waiting step makes no suffix dearer, as in the paper.
    """

    name = "kvflow"

    def standing(self, owner: str, now: float) -> tuple[Rank, float]:
        hint = self._hints.get(owner)
        ahead = None if hint is None else hint.next_use if hint.steps is None else hint.steps
        if ahead is None:
            return UNTOLD, INFINITY
        return (KNOWN, 0.0 if owner in self._steps else -ahead), INFINITY
