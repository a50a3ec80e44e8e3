"""SAGA's eviction (arXiv 2605.00528): workflow-aware LRU with a time to live for tool calls. Ours, from the paper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from kvcache.policy import INFINITY, KNOWN, LEASED, UNTOLD, Foretold, Hint, Rank

ALPHA, BETA, GAMMA = 0.3, 0.5, 0.2  # Eq. 1: idle time, no reuse, size
OBSERVATION = 300  # Eq. 4: tokens that the next step is expected to add
EASY, FULL = 0.7, 0.9  # Alg. 1: the shares of the pool between which the time to live shrinks
LONGEST = 300.0  # Alg. 1: TTL_max in seconds
SHORTEST = 0.001  # the least tau_max in seconds


class Saga(Foretold):
    """Evicts the largest P_evict = alpha R + beta (1 - P_reuse) + gamma S (Eq. 1), one score for each session.

    R is its idle time and S its tokens, each over the largest of all live sessions. P_reuse = `Hint.reuse`, the
    chance of the graph's successors, times c / (c + 300) for c tokens (Eq. 4). From `told` with a `hold`, the tool's
    95 % latency, it is protected for TTL = min(hold (1 - m/2), 300 s), m rising from 0 to 1 while the pool fills from
    70 % to 90 % (Alg. 1, Eq. 6), or until its next step starts; a session whose step waits or runs is pinned, which
    here means last. Ended sessions go first. Blocks are taken as needed, not the whole entry at once.
    """

    name = "saga"
    refresh = 0.1  # the paper's epoch

    def __init__(self) -> None:
        super().__init__()
        self._tokens: dict[str, int] = {}
        self._accessed: OrderedDict[str, float] = OrderedDict()  # of those that have tokens, the longest idle first
        self._largest: int | None = 0  # of the values of _tokens, None: to be found again
        self._protected: dict[str, float] = {}  # until when
        self._m = 0.0

    def started(self, owner: str, now: float) -> None:
        super().started(owner, now)
        self._protected.pop(owner, None)
        if owner in self._tokens:
            self._accessed[owner] = now
            self._accessed.move_to_end(owner)

    def finished(self, owner: str, tokens: int, now: float) -> None:
        super().finished(owner, tokens, now)
        if owner in self._dead:
            return
        self._drop(owner)
        self._tokens[owner] = tokens
        self._accessed[owner] = now
        if self._largest is not None:
            self._largest = max(self._largest, tokens)

    def told(self, hints: Mapping[str, Hint], now: float) -> None:
        super().told(hints, now)
        for owner, hint in hints.items():
            self._protected.pop(owner, None)
            if hint.hold is not None:
                self._protected[owner] = hint.since + min(hint.hold * (1 - 0.5 * self._m), LONGEST)

    def released(self, owner: str, now: float) -> None:
        super().released(owner, now)
        self._drop(owner)
        self._protected.pop(owner, None)

    def forgotten(self, owner: str) -> None:
        super().forgotten(owner)
        self._drop(owner)
        self._protected.pop(owner, None)

    def pressed(self, used: float) -> None:
        self._m = min(max((used - EASY) / (FULL - EASY), 0.0), 1.0)

    def standing(self, owner: str, now: float) -> tuple[Rank, float]:
        if owner in self._steps:
            return (LEASED, 1.0), INFINITY
        tokens = self._tokens.get(owner)
        if tokens is None:
            return UNTOLD, INFINITY
        score = self._score(owner, tokens, now)
        return (LEASED if now < self._protected.get(owner, -INFINITY) else KNOWN, -score), now

    def _score(self, owner: str, tokens: int, now: float) -> float:
        """P_evict, 0 to 1 (Eq. 1)."""
        if self._largest is None:
            self._largest = max(self._tokens.values())
        longest = max(now - next(iter(self._accessed.values())), SHORTEST)
        idle = min((now - self._accessed[owner]) / longest, 1.0)
        hint = self._hints.get(owner)
        reuse = (hint.reuse or 0.0) * tokens / (tokens + OBSERVATION) if hint is not None else 0.0
        return ALPHA * idle + BETA * (1 - reuse) + GAMMA * tokens / max(self._largest, 1)

    def _drop(self, owner: str) -> None:
        if self._tokens.pop(owner, None) == self._largest:
            self._largest = None if self._tokens else 0
        self._accessed.pop(owner, None)
