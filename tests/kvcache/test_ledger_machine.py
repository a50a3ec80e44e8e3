"""Ledger and tier together against a naive pool: a set of owners for each block, and a sorted list."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcache.ledger import ANONYMOUS, DEVICE, HOST, Key, Ledger
from kvcache.policy import DEAD, Hint, Policy
from kvcache.retention import Retention
from kvcache.tier import Tier

BLOCKS = 24
OWNERS = ("a", "b", "c", ANONYMOUS)
Line = tuple[Key, ...]


def keys_of(text: str) -> Line:
    """A key for each letter, which stands for all before it."""
    return tuple(text[: end + 1] for end in range(len(text)))


class Pool(RuleBasedStateMachine):
    """Steps that touch what is held of their prompt, allocate the rest and free all, as vLLM does."""

    policy_class: type[Policy] = Policy

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.ledger = self.policy_class(), Ledger()
        self.tier: Tier[int] = Tier(self.policy, self.ledger, 1)
        self.now = 0.0
        self.empty = list(range(BLOCKS))
        self.key_of: dict[int, Key] = {}
        self.users: dict[int, int] = defaultdict(int)
        self.freed: dict[int, tuple[float, int]] = {}
        self.count = 0
        self.owners: dict[Key, set[str]] = {}
        self.lines: dict[str, Line] = {}
        self.roles: dict[str, tuple[str, Line]] = {}
        self.running: list[tuple[str, str, str, list[int]]] = []

    def _own(self, owner: str, keys: Line) -> None:
        if owner != ANONYMOUS:
            for key in self.lines.get(owner, ()):
                if key not in keys and key in self.owners:
                    self.owners[key].discard(owner)
            self.lines[owner] = keys
        for key in keys:
            self.owners.setdefault(key, set()).add(owner)

    def _lose(self, key: Key) -> None:
        if key not in self.key_of.values():
            del self.owners[key]

    def _at(self, key: Key) -> int | None:
        return next((block for block, its in self.key_of.items() if its == key), None)

    @rule(owner=st.sampled_from(OWNERS), role=st.sampled_from("rs"), text=st.text("xyz", min_size=1, max_size=8))
    def begin(self, owner: str, role: str, text: str) -> None:
        self.now += 1
        keys = keys_of(text)
        self.policy.started(owner, self.now)
        self.ledger.began(owner, keys, self.now)
        self.tier.order.changed(owner, self.now)
        if owner in self.lines:
            line = self.lines[owner]
            same = tuple(key for key in line if key in keys)
            for key in line[len(same) :]:
                if key in self.owners:
                    self.owners[key].discard(owner)
            self.lines[owner] = same
        blocks: list[int] = []
        for key in keys:
            block = self._at(key)
            if block is None:
                break
            if not self.users[block]:
                self.tier.remove(block)
                del self.freed[block]
            self.users[block] += 1
            blocks.append(block)
        self.running.append((owner, role, text, blocks))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(0, 3), done=st.booleans())
    def end(self, data: st.DataObject, more: int, done: bool) -> None:
        """It computes the rest of its prompt and so many tokens, as far as there is room, and frees all."""
        self.now += 1
        owner, role, text, blocks = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        keys = keys_of(text + "w" * more)
        need = min(len(keys) - len(blocks), len(self.empty) + len(self.tier)) if done else 0
        new = [self.empty.pop() for _ in range(min(need, len(self.empty)))]
        for block, key in self.tier.take(need - len(new), self.now):
            assert block == self._first()
            assert self.key_of.pop(block) == key
            del self.freed[block]
            self.ledger.lost(key, DEVICE)
            self._lose(key)
            new.append(block)
        for block in new:
            self.users[block] = 1
        blocks += new
        keys = keys[: len(blocks)]
        if keys:
            self.ledger.wrote(owner, role, keys, self.now)
            self._own(owner, keys)
            if owner != ANONYMOUS:
                last = self.roles.get(role)
                self.roles[role] = owner, keys
                if last is not None and last[0] != owner:
                    self._own(role, tuple(key for key in last[1] if key in keys))
        for block, key in zip(blocks, keys, strict=True):
            if block not in self.key_of:
                self.key_of[block] = key
                self.ledger.gained(key, DEVICE)
        self.policy.finished(owner, len(keys), self.now)
        self.ledger.left(owner)
        free = []
        for block, key in reversed(list(zip(blocks, keys, strict=True))):
            self.users[block] -= 1
            if not self.users[block]:
                free.append((block, key))
                self.count += 1
                self.freed[block] = (self.now, self.count)
        self.tier.put(free, self.now)
        for changed in (owner, role):
            self.tier.order.changed(changed, self.now)

    @rule(owner=st.sampled_from((*OWNERS, "r", "s")))
    def release(self, owner: str) -> None:
        self.now += 1
        if owner == ANONYMOUS:
            return
        self.policy.released(owner, self.now)
        self.ledger.released(owner, self.now)
        self.tier.order.changed(owner, self.now)
        for owners in self.owners.values():
            owners.discard(owner)
        self.lines.pop(owner, None)

    @rule(owner=st.sampled_from((*OWNERS[:3], "r", "s")), ahead=st.integers(1, 100))
    def tell(self, owner: str, ahead: int) -> None:
        if owner in self.ledger:
            self.policy.told(owner, Hint(self.now, next_use=self.now + ahead), self.now)
            self.tier.order.changed(owner, self.now)

    def _first(self) -> int:
        """By rank, then the order of being freed. A stack's rank is that of its blocks."""
        return min(self.freed, key=lambda block: (*self._rank(block), *self.freed[block]))

    def _rank(self, block: int) -> tuple[float, float]:
        class One:
            owners = self.owners[self.key_of[block]]
            freed = self.freed[block][0]
            tokens = 1

        return self.policy.rank(One(), self.now)

    @invariant()
    def owners_are_those_whose_latest_steps_hold_the_block(self) -> None:
        for key, owners in self.owners.items():
            span = self.ledger.span(key)
            assert span is not None
            assert set(span.owners) == owners
        assert len(self.owners) == len(set(self.key_of.values()))

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        in_use = {block for *_, blocks in self.running for block in blocks}
        free = list(self.tier)
        assert len(free) == len(set(free)) == len(self.tier)
        assert set(free) == set(self.freed)
        assert set(free) | in_use | set(self.empty) == set(range(BLOCKS))
        assert not in_use & set(free)

    @invariant()
    def counts_agree(self) -> None:
        for owner in {*OWNERS, "r", "s"}:
            held = [key for key in self.key_of.values() if owner in self.owners[key]]
            assert self.ledger.held(owner) == (len(held), 0)
            running = any(owner == one for one, *_ in self.running)
            assert (owner in self.ledger) == bool(held or running)

    @invariant()
    def what_nobody_needs_goes_first(self) -> None:
        ranks = [self._rank(block)[0] for block in self.tier]
        assert ranks == sorted(ranks)
        dead = [block for block in self.freed if not self.owners[self.key_of[block]]]
        if self.policy_class is Retention:
            assert ranks.count(DEAD) >= len(dead)

    def teardown(self) -> None:
        """Emptied, nothing is left."""
        while self.running:
            owner, *_ = self.running.pop()
            self.ledger.left(owner)
        self.tier.clear()
        self.ledger.clear(DEVICE)
        self.ledger.clear(HOST)
        assert not list(self.ledger)
        assert [owner for owner in (*OWNERS, "r", "s") if owner in self.ledger] == []


class Ranked(Pool):
    policy_class = Retention


TestLRU = Pool.TestCase
TestRetention = Ranked.TestCase
TestLRU.settings = TestRetention.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
