"""An engine that is only a cache: steps that run pin their blocks, the rest is the keeper's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from kvcache.keeper import Keeper
from kvcache.ledger import DEVICE
from kvcache.policy import Policy
from kvcache.shadow import Guarded

Keys = Sequence[Hashable]


class Step(NamedTuple):
    owner: str
    keys: Keys


class Engine:
    """`room` blocks, and at most so many steps that `run` at once: the first ends when the next begins.

    `hits` and `misses` are blocks. `told(keeper, owner, now)` is called when a step has ended.
    """

    def __init__(
        self, policy: Policy, room: int, run: int, told: Callable[[Keeper, str, float], None] | None = None
    ) -> None:
        self.keeper, self.guard = Keeper(policy, 1), policy if isinstance(policy, Guarded) else None
        self.room, self.run, self.told = room, run, told
        self.running: deque[tuple[int, Step]] = deque()
        self.users: dict[Hashable, int] = {}
        self.hits = self.misses = 0
        self.now = 0.0
        self.weights: list[float] = []

    def play(self, steps: Iterable[Step]) -> Engine:
        for step in steps:
            self.now += 1.0
            while len(self.running) >= self.run:
                self._end()
            self._begin(step)
        return self

    def _begin(self, step: Step) -> None:
        keeper, keys = self.keeper, step.keys
        number = keeper.began(step.owner, keys, self.now)
        found = next((n for n, key in enumerate(keys) if not keeper.ledger.copies(key, DEVICE)), len(keys))
        self.hits, self.misses = self.hits + found, self.misses + len(keys) - found
        used = len(self.users)
        for key in keys:
            if key in keeper.host:
                keeper.host.remove(key)
            self.users[key] = self.users.get(key, 0) + 1
        over = len(self.users) + len(keeper.host) - self.room
        for _, key in keeper.host.take(max(0, over), self.now):
            keeper.ledger.lost(key, DEVICE)
        keeper.sweep()
        keeper.wrote(step.owner, None, keys, self.now, number)
        for key in keys:
            if not keeper.ledger.copies(key, DEVICE):
                keeper.ledger.gained(key, DEVICE)
        self.running.append((number, step))
        if self.guard is not None:
            self.guard.looked(number, keys, found, used, len(self.users) - used)
            if self.guard.judged():
                keeper.rerank(self.now)
            self.weights.append(self.guard.weight)

    def _end(self) -> None:
        number, step = self.running.popleft()
        idle = []
        for key in reversed(step.keys):
            self.users[key] -= 1
            if not self.users[key]:
                del self.users[key]
                idle.append((key, key))
        self.keeper.host.put(idle, self.now)
        self.keeper.left(step.owner, len(step.keys), self.now)
        if self.guard is not None:
            self.guard.freed(number, step.keys, len(self.users) + len(idle))
        if self.told is not None:
            self.told(self.keeper, step.owner, self.now)
