"""What LRU would have had: a small shadow of the cache, by which a policy that loses to LRU is trusted less.

A fixed sample of the blocks, chosen by their keys, lives in an LRU list as much smaller than the cache: the hit ratio
of the whole, at a fraction of its cost (SHARDS: Waldspurger et al., FAST 2015).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvcache.ledger import Key
from kvcache.policy import DEAD, UNKNOWN, Hint, Policy, Rank, Stack

SAMPLE = 8
"""One block of so many lives in the shadow."""

WINDOW = 128
"""Steps after which both are compared."""

MARGIN = 0.02
"""The share of its hits that LRU must be ahead by."""

LEAST = 1 / 16


class Shadow:
    """An LRU cache of `blocks` blocks, sampled. `hits` and `lru` are sampled blocks found, here and in the shadow."""

    def __init__(self, blocks: int, sample: int = SAMPLE) -> None:
        self.hits = self.lru = self.steps = 0
        self._sample, self._room = sample, max(1, blocks // sample)
        self._blocks: OrderedDict[Key, None] = OrderedDict()

    def looked(self, keys: Sequence[Key], found: int) -> None:
        """A step looked for the blocks of its prompt and found the first so many."""
        self.steps += 1
        missed = False
        for place, key in enumerate(keys):
            if hash(key) % self._sample:
                continue
            missed = missed or key not in self._blocks
            self.lru += not missed
            self.hits += place < found

    def wrote(self, keys: Sequence[Key]) -> None:
        """A step has freed its blocks: the last ones are the first to go."""
        for key in reversed(keys):
            if not hash(key) % self._sample:
                self._blocks[key] = None
                self._blocks.move_to_end(key)
        while len(self._blocks) > self._room:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """The cache was emptied."""
        self._blocks.clear()


class Guarded(Policy):
    """A policy as long as it finds no less than LRU would; what is dead goes first in any case.

    After each window in which LRU found more, the policy rules in half as many of those to come (`weight`, 1 to 1/16),
    after each that it did not lose, in twice as many.
    """

    def __init__(self, policy: Policy, shadow: Shadow) -> None:
        self.name, self.refresh = policy.name, policy.refresh
        self.policy, self.shadow = policy, shadow
        self.weight, self.rules = 1.0, True
        self._credit = 0.0

    def judged(self) -> bool:
        """At the end of a window, weigh anew. Returns whether all ranks have changed."""
        shadow = self.shadow
        if shadow.steps < WINDOW:
            return False
        if self.rules:
            lost = shadow.lru - shadow.hits > MARGIN * max(1, shadow.lru)
            self.weight = max(LEAST, self.weight / 2) if lost else min(1.0, 2 * self.weight)
        shadow.hits = shadow.lru = shadow.steps = 0
        self._credit += self.weight
        before, self.rules = self.rules, self._credit >= 1
        if self.rules:
            self._credit -= 1
        return self.rules != before

    def started(self, owner: str, now: float) -> None:
        self.policy.started(owner, now)

    def finished(self, owner: str, tokens: int, now: float) -> None:
        self.policy.finished(owner, tokens, now)

    def told(self, owner: str, hint: Hint, now: float) -> None:
        self.policy.told(owner, hint, now)

    def released(self, owner: str, now: float) -> None:
        self.policy.released(owner, now)

    def forgotten(self, owner: str) -> None:
        self.policy.forgotten(owner)

    def pressed(self, used: float) -> None:
        self.policy.pressed(used)

    def rank(self, stack: Stack, now: float) -> Rank:
        rank = self.policy.rank(stack, now)
        return rank if self.rules or rank[0] == DEAD else (UNKNOWN, stack.freed)
