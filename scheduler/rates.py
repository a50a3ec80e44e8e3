"""How fast a worker prefills: seconds a token, by how far into its context the token lies."""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import mul

FIRST, CLASSES = 8, 13  # of positions: below 2^8 tokens, then each doubling up to 2^20
FEWEST, LEAST = 128, 1 / 8  # tokens, and share of the prompt; shorter prefills take the time of a step, or of a load
STARTS = [0, *(1 << (FIRST + at) for at in range(CLASSES - 1))]  # of the classes, in tokens
UNKNOWN = 2e-4  # seconds a token, until something is learned
QUICK = 0.25  # the quantile that is learned: slower ones waited for memory, or for a load from the host tier
PACE = 0.2  # by how much a sample moves the estimate, as a logarithm, and the estimate's way from it


class Rates:
    """Learned from steps that have ended: attention makes late tokens dearer, so each class of positions is apart."""

    def __init__(self) -> None:
        self._known: list[float | None] = [None] * CLASSES
        self._filled: list[float] = [UNKNOWN] * CLASSES
        self._before: list[float] = [UNKNOWN * start for start in STARTS]  # seconds for all up to each class

    def learn(self, cached: int, prompt: int, seconds: float) -> None:
        """A worker took so long for the tokens of a prompt that its cache did not have, and did no other prefill."""
        new = prompt - cached
        if new < max(FEWEST, LEAST * prompt) or seconds <= 0:
            return
        at, sample = _class((cached + prompt) // 2), seconds / new
        known = self._known[at]
        if known is None:
            self._known[at] = sample
        else:
            share = 1 - QUICK if sample < known else QUICK
            self._known[at] = known * (sample / known) ** (PACE * share)
        self._fill()

    def recompute(self, tokens: int) -> float:
        """Seconds to prefill the first `tokens` of a prompt."""
        at = _class(tokens)
        return self._before[at] + (tokens - STARTS[at]) * self._filled[at]

    def seconds(self, cached: int, prompt: int) -> float:
        """Seconds to prefill what follows the first `cached` tokens."""
        return max(0.0, self.recompute(prompt) - self.recompute(min(cached, prompt)))

    def _fill(self) -> None:
        """What is not known of a class is as of the nearest one before, else after."""
        known = next(one for one in self._known if one is not None)
        for at, own in enumerate(self._known):
            known = self._filled[at] = own if own is not None else known
        spans = (end - start for start, end in pairwise(STARTS))
        self._before = list(accumulate(map(mul, spans, self._filled), initial=0.0))


def _class(position: int) -> int:
    return min(max(position.bit_length() - FIRST, 0), CLASSES - 1)
