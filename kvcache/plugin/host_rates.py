"""How fast an engine loads KV from the host, and how fast it computes it instead."""

from __future__ import annotations

from collections import deque

KEPT = 0.9
"""Of what was measured before, at each new transfer or step."""

FEWEST = 64
"""Tokens of a step that counts as prefill."""

LEAST = 4 << 20
"""Bytes of a load that says how fast the link is; less says how long a load takes to begin."""

EVERY = 16
"""Of so many restores that would be left out, one is not, so that the link is measured again."""

FADED = 0.1
"""Of what was measured of the link before, then."""

LONGEST_QUEUE = 16
"""Steps in flight."""


class _Rate:
    """Something a second, the latest counting most."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.fade(KEPT)
        self._amount += amount
        self._seconds += seconds

    def fade(self, kept: float) -> None:
        """What was measured before counts only so much any more."""
        self._amount *= kept
        self._seconds *= kept

    @property
    def value(self) -> float | None:
        return self._amount / self._seconds if self._seconds > 0 else None


class Rates:
    """Measured rates: bytes a second of loads and tokens a second of prefill. `block` tokens are `size` bytes."""

    def __init__(self, block: int, size: int) -> None:
        self.block, self._size = block, size
        self._link, self._prefill = _Rate(), _Rate()
        self._steps: deque[tuple[object, int, float]] = deque(maxlen=LONGEST_QUEUE)
        self._ended = 0.0
        self._left_out = 0
        self._let_through = ""

    @property
    def blocks(self) -> float | None:
        """Blocks loaded a second; None: not known."""
        value = self._link.value
        return None if value is None else value / self._size

    @property
    def tokens(self) -> float | None:
        """Tokens computed a second in prefill; None: not known."""
        return self._prefill.value

    @property
    def recomputes(self) -> bool:
        """Whether blocks are sooner computed than loaded."""
        blocks, tokens = self.blocks, self.tokens
        return blocks is not None and tokens is not None and tokens > blocks * self.block

    def leaves_out(self, request: str) -> bool:
        """Whether a request computes what it could have restored. One that may restore may go on asking."""
        if not self.recomputes or request == self._let_through:
            return False
        self._left_out += 1
        if self._left_out % EVERY:
            return True
        self._let_through = request
        self._link.fade(FADED)
        return False

    def loaded(self, size: int, seconds: float) -> None:
        """So many bytes were loaded in so many seconds of transfer."""
        if size >= LEAST and seconds > 0:
            self._link.add(size, seconds)

    def began(self, step: object, tokens: int, now: float) -> None:
        """A step was made up that computes so many tokens."""
        self._steps.append((step, tokens, now))

    def ended(self, step: object, now: float) -> None:
        """A step has ended: it ran since it was made up, or since the one before it ended. Steps end in their order."""
        while self._steps:
            first, tokens, began = self._steps.popleft()
            if first is step:
                if tokens >= FEWEST:
                    self._prefill.add(tokens, max(now - max(began, self._ended), 1e-6))
                break
        self._ended = now
