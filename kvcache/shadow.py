"""What stock vLLM would have had: a shadow of its cache under LRU, by which a policy that loses to LRU is not followed.

The shadow holds what an LRU cache of the same size would hold after the same steps: those that run keep their blocks in
use there as they do here. Of a large cache a fixed sample of the blocks, chosen by their keys, lives in a shadow as
much smaller (SHARDS: Waldspurger et al., FAST 2015).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

from kvcache.policy import DEAD, UNKNOWN, Hint, Policy, Rank
from kvcache.span import Key

LARGEST = 65_536
"""Blocks up to which the shadow is exact."""

LOSS = 0.01
"""Blocks that a policy may recompute beyond LRU, for each that LRU would recompute."""

CREDIT = 1 / 16
"""Blocks that it may lose at first, and owe before nothing of it is believed, as a share of the cache."""

SAVED = 1 / 2
"""Blocks that it has gained and may lose again, as a share of the cache."""


class Shadow:
    """An LRU cache of `blocks` blocks. Its counters only rise, in blocks.

    `asked` were looked for, `hits` found here, `lru` found in the shadow.
    """

    def __init__(self, blocks: int, sample: int | None = None) -> None:
        self.blocks = blocks
        self.asked = self.hits = self.lru = 0
        self._sample = sample or -(-blocks // LARGEST)
        self._room = max(1, blocks // self._sample)
        self._idle: OrderedDict[Key, None] = OrderedDict()
        self._used: dict[Key, int] = {}
        self._steps: dict[Hashable, list[Key]] = {}
        self._others = 0  # blocks in use of which no key is known yet

    def looked(self, step: Hashable, keys: Sequence[Key], found: int, used: int = 0, taken: int = 0) -> None:
        """A step runs: it looked for these blocks and found the first so many, and has them all in use.

        `used` blocks of the cache were in use when it looked; it took so many more.
        """
        self._unpin(step)
        self.used(used)
        mine, missed = [], False
        for place, key in self._sampled(keys):
            missed = missed or (key not in self._used and key not in self._idle)
            self.lru += 0 if missed else self._sample
            self.hits += self._sample if place < found else 0
            mine.append(key)
        self.asked += self._sample * len(mine)
        for key in mine:
            self._idle.pop(key, None)
            self._used[key] = self._used.get(key, 0) + 1
        self._steps[step] = mine
        self.used(used + taken)

    def used(self, blocks: int) -> None:
        """So many blocks of the cache are in use: what else is here has no more room than what they leave."""
        self._others = max(0, blocks // self._sample - len(self._used))
        self._shrink()

    def freed(self, step: Hashable, keys: Sequence[Key]) -> None:
        """A step has freed its blocks, of which these are known: the last ones are the first to go."""
        known = len(self._used) + len(self._idle)
        gone = self._unpin(step)
        for _, key in reversed(list(self._sampled(keys))):
            if key not in self._used:
                self._idle[key] = None
                self._idle.move_to_end(key)
            gone.discard(key)
        for key in gone:
            self._idle.pop(key, None)
        self._others = max(0, self._others - (len(self._used) + len(self._idle) - known))
        self._shrink()

    def clear(self) -> None:
        """The cache was emptied, but for what is in use."""
        self._idle.clear()

    def _sampled(self, keys: Sequence[Key]) -> enumerate[Key] | list[tuple[int, Key]]:
        if self._sample == 1:
            return enumerate(keys)
        return [(place, key) for place, key in enumerate(keys) if not hash(key) % self._sample]

    def _unpin(self, step: Hashable) -> set[Key]:
        """What no step uses any more; it is the first to go."""
        gone = set()
        for key in reversed(self._steps.pop(step, ())):
            self._used[key] -= 1
            if not self._used[key]:
                del self._used[key]
                self._idle[key] = None
                self._idle.move_to_end(key, last=False)
                gone.add(key)
        return gone

    def _shrink(self) -> None:
        while self._idle and len(self._idle) + len(self._used) + self._others > self._room:
            self._idle.popitem(last=False)


class Guarded(Policy):
    """A policy as long as no more is recomputed than under LRU.

    Whoever drives an engine calls `looked` when a step's blocks are allocated, in the order of admission, `freed` when
    its blocks are free (ended or preempted: also with no keys), `cleared` when the cache was reset, and after any of
    them `judged`; where that is true, all ranks have changed.

    What the policy loses against LRU, above `LOSS` times LRU's own misses, is its debt; it begins with a credit of
    `CREDIT` and saves up to `SAVED` of what it gains. In debt, what is dead still goes first, the rest as under LRU;
    deeper in debt than `CREDIT`, LRU rules alone, as in stock vLLM. So from the start on no more is recomputed than
    (1 + LOSS) times what LRU would recompute, twice `CREDIT`, and what the cache lacks of LRU's when that is seen,
    one cache at most. `weight` is 1, 1/2 or 0.
    """

    def __init__(self, policy: Policy, shadow: Shadow) -> None:
        self.name, self.refresh = policy.name, policy.refresh
        self.policy, self.shadow = policy, shadow
        self.weight = 1.0
        self._credit = CREDIT * shadow.blocks
        self._saved = SAVED * shadow.blocks
        self._debt = -self._credit

    def looked(self, step: Hashable, keys: Sequence[Key], found: int, used: int = 0, taken: int = 0) -> None:
        """A step runs: it looked for these blocks and found the first so many.

        `used` blocks of the cache were in use when it looked; it took so many more.
        """
        shadow = self.shadow
        asked, hits, lru = shadow.asked, shadow.hits, shadow.lru
        shadow.looked(step, keys, found, used, taken)
        lru = shadow.lru - lru
        lost, missed = lru - (shadow.hits - hits), shadow.asked - asked - lru
        self._debt = max(-self._saved, self._debt + lost - LOSS * missed)

    def freed(self, step: Hashable, keys: Sequence[Key], used: int) -> None:
        """A step frees its blocks; these are the keys of those that have one. `used` were in use until now."""
        self.shadow.used(used)
        self.shadow.freed(step, keys)

    def cleared(self) -> None:
        """The cache was emptied."""
        self.shadow.clear()

    def judged(self) -> bool:
        """Weigh anew. Returns whether all ranks have changed."""
        before, debt = self.weight, self._debt
        self.weight = self._worth(debt)
        if self.weight > before:  # the way back is a little longer than the way down, so that it is not gone every step
            self.weight = max(before, self._worth(debt + LOSS * self.shadow.blocks))
        return self.weight != before

    def _worth(self, debt: float) -> float:
        return 1.0 if debt <= 0 else 0.5 if debt <= self._credit else 0.0

    def started(self, owner: str, now: float) -> None:
        self.policy.started(owner, now)

    def finished(self, owner: str, tokens: int, now: float) -> None:
        self.policy.finished(owner, tokens, now)

    def told(self, hints: Mapping[str, Hint], now: float) -> None:
        self.policy.told(hints, now)

    def released(self, owner: str, now: float) -> None:
        self.policy.released(owner, now)

    def forgotten(self, owner: str) -> None:
        self.policy.forgotten(owner)

    def pressed(self, used: float) -> None:
        self.policy.pressed(used)

    def ranked(self, owners: Collection[str], freed: float, now: float) -> Rank:
        if self.weight == 0.0:
            return (UNKNOWN, freed)
        rank = self.policy.ranked(owners, freed, now)
        return rank if self.weight == 1.0 or rank[0] == DEAD else (UNKNOWN, freed)

    def ranking(self) -> Callable[[Collection[str], float, float], Rank]:
        return self.policy.ranking() if self.weight == 1.0 else self.ranked
