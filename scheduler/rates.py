"""How fast a worker prefills: seconds a token, by how far into its context the token lies."""

from __future__ import annotations

FIRST, CLASSES = 8, 13  # of positions: below 2^8 tokens, then each doubling up to 2^20
FEWEST = 128  # tokens; of a shorter prefill most of the time is the engine's step
UNKNOWN = 2e-4  # seconds a token, until something is learned
RECENT = 0.05  # the least weight of a new sample


class Rates:
    """Learned from steps that have ended: attention makes late tokens dearer, so each class of positions is apart."""

    def __init__(self) -> None:
        self._seconds = [0.0] * CLASSES
        self._count = [0] * CLASSES
        self._filled: list[float] = [UNKNOWN] * CLASSES

    def learn(self, cached: int, prompt: int, seconds: float) -> None:
        """A worker took so long for the tokens of a prompt that its cache did not have, and did no other prefill."""
        new = prompt - cached
        if new < FEWEST or seconds <= 0:
            return
        at = _class((cached + prompt) // 2)
        self._count[at] += 1
        share = max(1 / self._count[at], RECENT)
        self._seconds[at] += share * (seconds / new - self._seconds[at])
        self._fill()

    def recompute(self, tokens: int) -> float:
        """Seconds to prefill the first `tokens` of a prompt."""
        spent, start = 0.0, 0
        for at in range(_class(tokens) + 1):
            end = tokens if at == CLASSES - 1 else min(tokens, 1 << (FIRST + at))
            spent += (end - start) * self._filled[at]
            start = end
        return spent

    def seconds(self, cached: int, prompt: int) -> float:
        """Seconds to prefill what follows the first `cached` tokens."""
        return max(0.0, self.recompute(prompt) - self.recompute(min(cached, prompt)))

    def _fill(self) -> None:
        """What is not known of a class is as of the nearest one before, else after."""
        known = next(s for s, n in zip(self._seconds, self._count, strict=True) if n)
        for at in range(CLASSES):
            known = self._seconds[at] if self._count[at] else known
            self._filled[at] = known


def _class(position: int) -> int:
    return min(max(position.bit_length() - FIRST, 0), CLASSES - 1)
