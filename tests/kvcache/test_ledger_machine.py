"""Ledger and both tiers together against a naive pool: a set of owners for each block, and a sorted list."""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcache import ledger as ledger_module
from kvcache.ledger import ANONYMOUS, DEVICE, HOST, MOST_KEPT, Key, Ledger
from kvcache.policy import DEAD, Hint, Policy
from kvcache.retention import Retention
from kvcache.tier import Tier

BLOCKS = 24
OWNERS = ("a", "b", "c", ANONYMOUS)
Line = tuple[Key, ...]


def keys_of(text: str) -> Line:
    """A key for each letter, which stands for all before it."""
    return tuple(text[: end + 1] for end in range(len(text)))


class Step(NamedTuple):
    number: int
    owner: str
    role: str
    text: str
    blocks: list[int]


class Pool(RuleBasedStateMachine):
    """Steps that touch what is held of their prompt, allocate the rest and free all, as vLLM does; and a host tier."""

    policy_class: type[Policy] = Policy

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.ledger = self.policy_class(), Ledger()
        self.tier: Tier[int] = Tier(self.policy, self.ledger, 1)
        self.host: Tier[Key] = Tier(self.policy, self.ledger, 1)
        self.now = 0.0
        self.empty = list(range(BLOCKS))
        self.key_of: dict[int, Key] = {}
        self.users: dict[int, int] = defaultdict(int)
        self.freed: dict[int, tuple[float, int]] = {}
        self.count = 0
        self.stored: set[Key] = set()
        self.owners: dict[Key, set[str]] = {}
        self.found: set[Key] = set()  # stored, but nobody wrote it
        self.lines: dict[str, Line] = {}
        self.roles: dict[str, tuple[int, str, Line]] = {}
        self.written: dict[str, int] = defaultdict(int)
        self.running: list[Step] = []
        self.reported: dict[str, tuple[int, int]] = {}
        ledger_module.MOST_REPORTED = 3

    def _supersede(self, owner: str, keys: Line) -> None:
        for key in self.lines.get(owner, ()):
            if key not in keys and key in self.owners and key not in self.found:
                self.owners[key].discard(owner)
        self.lines[owner] = keys

    def _own(self, owner: str | None, keys: Line) -> None:
        for key in keys:
            if key in self.found:
                self.found.discard(key)
                self.owners[key] = set()
            self.owners.setdefault(key, set()).update(() if owner is None else (owner,))

    def _lose(self, key: Key) -> None:
        if key not in self.key_of.values() and key not in self.stored:
            del self.owners[key]
            self.found.discard(key)

    def _wrote(self, step: Step, keys: Line) -> None:
        """What the ledger should make of it."""
        owner = step.owner
        if owner == ANONYMOUS:
            self._own(owner, keys)
        elif step.number < self.written[owner]:
            self._own(None, keys)
        else:
            self.written[owner] = step.number
            self._supersede(owner, keys)
            self._own(owner, keys)
            if not any(other.owner == owner for other in self.running):
                for key in self.found:
                    self.owners[key].discard(owner)
            last = self.roles.get(step.role)
            if last is None or last[0] <= step.number:
                self.roles[step.role] = step.number, owner, keys
            if last is not None and last[1] != owner:
                shared = tuple(key for key in last[2] if key in keys)
                self._supersede(step.role, shared)
                self._own(step.role, shared)

    def _at(self, key: Key) -> int | None:
        return next((block for block, its in self.key_of.items() if its == key), None)

    @rule(owner=st.sampled_from(OWNERS), role=st.sampled_from("rs"), text=st.text("xyz", min_size=1, max_size=8))
    def begin(self, owner: str, role: str, text: str) -> None:
        self.now += 1
        keys = keys_of(text)
        self.policy.started(owner, self.now)
        number = self.ledger.began(owner, keys, self.now)
        self._reranked(owner)
        if owner != ANONYMOUS:
            self._supersede(owner, keys)
            self._own(owner, tuple(takewhile(self.owners.__contains__, keys)))
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
        self.running.append(Step(number, owner, role, text, blocks))

    def _reranked(self, owner: str) -> None:
        for tier in (self.tier, self.host):
            tier.order.changed(owner, self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(0, 3), done=st.booleans())
    def end(self, data: st.DataObject, more: int, done: bool) -> None:
        """It computes the rest of its prompt and so many tokens, as far as there is room, and frees all."""
        self.now += 1
        step = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        owner, role, blocks = step.owner, step.role, step.blocks
        keys = keys_of(step.text + "w" * more)
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
        blocks = blocks + new
        keys = keys[: len(blocks)]
        if keys:
            self.ledger.wrote(owner, role, keys, self.now, step.number)
            self._wrote(step, keys)
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
            self._reranked(changed)

    @rule(owner=st.sampled_from(OWNERS), text=st.text("xyz", min_size=1, max_size=8), count=st.integers(1, 4))
    def store(self, owner: str, text: str, count: int) -> None:
        """The host gets blocks of a prompt, be they known or not, from any step, be it over or not."""
        for key in keys_of(text)[-count:]:
            if key in self.stored:
                continue
            if key not in self.owners:
                self.owners[key] = {owner}
                self.found.add(key)
            self.stored.add(key)
            self.ledger.gained(key, HOST, owner)
            self.host.put([(key, key)], self.now)

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """The host loses a block."""
        key = data.draw(st.sampled_from(sorted(self.stored, key=str)))
        self.stored.discard(key)
        self.host.remove(key)
        self.ledger.lost(key, HOST)
        self._lose(key)

    @rule(owner=st.sampled_from((*OWNERS, "r", "s")))
    def release(self, owner: str) -> None:
        self.now += 1
        if owner == ANONYMOUS:
            return
        self.policy.released(owner, self.now)
        self.ledger.released(owner, self.now)
        self._reranked(owner)
        for owners in self.owners.values():
            owners.discard(owner)
        self.lines.pop(owner, None)

    @rule(owner=st.sampled_from((*OWNERS[:3], "r", "s")), ahead=st.integers(1, 100))
    def tell(self, owner: str, ahead: int) -> None:
        if owner in self.ledger:
            self.policy.told({owner: Hint(self.now, next_use=self.now + ahead)}, self.now)
            self._reranked(owner)

    @rule(full=st.booleans())
    def report(self, full: bool) -> None:
        """Deltas, a few at a time, come to what a snapshot would say."""
        if full:
            self.reported = self.ledger.residency(full=True)
        for _ in range(3):
            report = self.ledger.residency()
            assert len(report) <= 3
            self.reported |= report
        assert not self.ledger.residency()
        self.reported = {owner: held for owner, held in self.reported.items() if any(held)}
        owners = {owner for owner in self.ledger if owner != ANONYMOUS}
        assert self.reported == {owner: held for owner in owners if any(held := self.ledger.held(owner))}

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
        assert set(self.owners) == {*self.key_of.values(), *self.stored}

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        in_use = {block for step in self.running for block in step.blocks}
        free = list(self.tier)
        assert len(free) == len(set(free)) == len(self.tier)
        assert set(free) == set(self.freed)
        assert set(free) | in_use | set(self.empty) == set(range(BLOCKS))
        assert not in_use & set(free)
        assert sorted(self.host, key=str) == sorted(self.stored, key=str)

    @invariant()
    def counts_agree(self) -> None:
        for owner in {*OWNERS, "r", "s"}:
            held = [key for key in self.key_of.values() if owner in self.owners[key]]
            stored = [key for key in self.stored if owner in self.owners[key]]
            assert self.ledger.held(owner) == (len(held), len(stored))
            running = any(owner == step.owner for step in self.running)
            assert (owner in self.ledger) == bool(held or stored or running)

    @invariant()
    def a_line_is_what_is_known_of_the_latest_step_without_gaps(self) -> None:
        for owner in {*OWNERS[:3], "r", "s"}:
            known = list(takewhile(self.owners.__contains__, self.lines.get(owner, ())))
            mine = {key for key in known if owner in self.owners[key] and key not in self.found}
            line = self.ledger.line(owner)
            assert line == known[: len(line)]
            assert len(line) >= len(list(takewhile(mine.__contains__, known)))

    @invariant()
    def the_ledger_is_as_large_as_what_is_held_and_runs(self) -> None:
        """Whatever has been written and lost."""
        ledger, spans = self.ledger, {id(span): span for span in map(self.ledger.span, self.owners) if span}
        assert sum(len(span.keys) for span in spans.values()) == len(self.owners)
        assert all(list(span.keys.values()) == sorted(span.keys.values()) for span in spans.values())
        assert sum(map(len, ledger._of.values())) == sum(len(span.owners) for span in spans.values())
        assert all(len(span.owners) <= MOST_KEPT + 1 for span in spans.values())
        assert {id(span) for span in ledger._stirred} <= set(spans)
        assert set(ledger._changed) <= {*ledger, *ledger._reported}
        assert all(owner in ledger for owner in ledger._written)
        assert {role: last.keys for role, last in ledger._roles.items()} == {
            r: last[2] for r, last in self.roles.items()
        }
        assert set(ledger._before) <= set(self.owners)
        assert ledger._recalled == sum(len(last.keys) for last in ledger._roles.values())

    @invariant()
    def what_nobody_needs_goes_first(self) -> None:
        ranks = [self._rank(block)[0] for block in self.tier]
        assert ranks == sorted(ranks)
        dead = [block for block in self.freed if not self.owners[self.key_of[block]]]
        if self.policy_class is Retention:
            assert ranks.count(DEAD) >= len(dead)

    def teardown(self) -> None:
        """Emptied, nothing is left but what steps of the roles are compared with."""
        for step in self.running:
            self.ledger.left(step.owner)
        self.tier.clear()
        self.host.clear()
        self.ledger.clear(DEVICE)
        self.ledger.clear(HOST)
        for _ in range(3):
            self.ledger.residency()
        self.ledger.forgotten.clear()
        over = ("tiers", "_steps", "_roles", "_recalled")
        kept = {name: value for name, value in vars(self.ledger).items() if name not in over}
        assert not [name for name, value in kept.items() if value and value != ({}, {})]
        assert not self.tier._names
        assert not self.tier._stacks
        ledger_module.MOST_REPORTED = 65_536


class Ranked(Pool):
    policy_class = Retention


TestLRU = Pool.TestCase
TestRetention = Ranked.TestCase
TestLRU.settings = TestRetention.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
