"""Our queue of free blocks beside vLLM's own, in two of vLLM's block pools that do the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id

from kvcache.keeper import Keeper
from kvcache.ledger import ANONYMOUS, DEVICE
from kvcache.plugin.free_queue import OwnerQueue, key_of
from kvcache.policy import Hint, Policy, Rank
from kvcache.retention import Retention

BLOCKS = 16
TOKENS = 4


def hashes(text: str) -> list[bytes]:
    """A hash for each letter, of all up to it."""
    return [hashlib.sha256(text[: end + 1].encode()).digest() for end in range(len(text))]


class Engine:
    """A block pool of vLLM's, used as its scheduler does."""

    def __init__(self, policy: Policy | None, clock: itertools.count[int]) -> None:
        self.pool = BlockPool(BLOCKS, True, TOKENS)
        self.queue: OwnerQueue | None = None
        self.keeper = Keeper(policy or Policy(), TOKENS)
        self.now = lambda: float(next(clock))
        self.failed: list[Exception] = []
        if policy is not None:
            free = self.pool.free_block_queue.get_all_free_blocks()
            self.queue = OwnerQueue(self.pool.blocks, free, self.keeper, self.now, self.failed.append)
            self.pool.free_block_queue = self.queue  # type: ignore[assignment]

    def begin(self, owner: str, text: str) -> list[KVCacheBlock] | None:
        """Blocks for a prompt, hits and new ones; None where there is no room."""
        found: list[KVCacheBlock] = []
        for one in hashes(text):
            hit = self.pool.get_cached_block(one, [0])  # type: ignore[arg-type]
            if hit is None:
                break
            found += hit
        idle = sum(block.ref_cnt == 0 for block in found)
        if len(text) - len(found) > self.pool.get_num_free_blocks() - idle:
            return None
        self.keeper.began(owner, hashes(text), self.now())
        self.pool.touch(found)
        new = self.pool.get_new_blocks(len(text) - len(found))
        for block, one in zip(new, hashes(text)[len(found) :], strict=True):
            self.pool._insert_block_hash(make_block_hash_with_group_id(one, 0), block, num_tokens=None)  # type: ignore[arg-type]
        return found + new

    def end(self, owner: str, blocks: list[KVCacheBlock]) -> None:
        if self.queue is not None and not self.failed:
            keys = [key for block in blocks if (key := key_of(block)) is not None]
            self.keeper.wrote(owner, None, keys, self.now())
            self.queue.declare(blocks, owner)
        self.pool.free_blocks(reversed(blocks))
        self.keeper.left(owner, len(blocks) * TOKENS, self.now())

    def free(self) -> list[int]:
        return [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]


class Pools(RuleBasedStateMachine):
    """Under LRU our queue is vLLM's, block for block, whatever the owners; under any policy where nobody is named."""

    policy_class: type[Policy] = Policy
    owners: tuple[str, ...] = ("a", "b", ANONYMOUS)

    def __init__(self) -> None:
        super().__init__()
        clock = itertools.count()
        self.engines = Engine(None, clock), Engine(self.policy_class(), clock)
        self.running: list[tuple[str, tuple[list[KVCacheBlock], list[KVCacheBlock]]]] = []

    @rule(data=st.data(), text=st.text("xyz", min_size=1, max_size=7))
    def begin(self, data: st.DataObject, text: str) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        stock, ours = (engine.begin(owner, text) for engine in self.engines)
        assert (stock is None) == (ours is None)
        if stock is not None and ours is not None:
            assert [b.block_id for b in stock] == [b.block_id for b in ours]
            self.running.append((owner, (stock, ours)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        owner, both = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        for engine, blocks in zip(self.engines, both, strict=True):
            engine.end(owner, blocks)

    @rule(numbers=st.sets(st.integers(1, BLOCKS - 1), max_size=3))
    def evict(self, numbers: set[int]) -> None:
        for engine in self.engines:
            engine.pool.evict_blocks(numbers)

    @rule()
    def reset(self) -> None:
        stock, ours = (engine.pool.reset_prefix_cache() for engine in self.engines)
        assert stock == ours == (not self.running)
        queue = self.engines[1].queue
        assert queue is not None
        if not self.engines[1].failed:
            queue.follow()

    @rule(owner=st.sampled_from(["a", "b"]))
    def release(self, owner: str) -> None:
        for engine in self.engines:
            engine.keeper.released(owner, engine.now())

    @invariant()
    def both_are_alike(self) -> None:
        stock, ours = self.engines
        assert stock.free() == ours.free()
        assert ours.pool.get_num_free_blocks() == len(ours.free())
        if ours.failed:
            return
        known = {key_of(block) for block in ours.pool.blocks} - {None}
        held = ours.keeper.ledger
        assert all(held.span(key) is not None for key in map(key_of, self._free(ours)) if key is not None)
        assert all(held.copies(key, DEVICE) <= 1 for key in known if key is not None)

    def _free(self, engine: Engine) -> list[KVCacheBlock]:
        return engine.pool.free_block_queue.get_all_free_blocks()


class Unnamed(Pools):
    policy_class = Retention
    owners = (ANONYMOUS,)


class Watched(Pools):
    """What was given up is known until it is let go, and is then as it is where nobody watches."""

    @initialize()
    def watch(self) -> None:
        self.queue.watch(True)
        self.held: dict[int, Any] = {}

    @property
    def queue(self) -> OwnerQueue:
        queue = self.engines[1].queue
        assert queue is not None
        return queue

    @rule()
    def let_go(self) -> None:
        self.queue.let_go()
        assert not self.queue.leaving
        assert all(self.engines[1].keeper.ledger.copies(key, DEVICE) == 1 for key in self.queue._copies)
        assert sum(self.queue._copies.values()) == sum(key is not None for key in self.queue._keys)

    @invariant()
    def what_leaves_is_known(self) -> None:
        if not hasattr(self, "held"):
            return
        for one in self.queue.leaving:
            assert one.name[:-4] == one.key
            assert self.engines[1].keeper.ledger.copies(one.key, DEVICE) == 1


class Failing(Policy):
    """LRU, until it fails: not at once."""

    left = 0

    def ranked(self, owners: Collection[str], freed: float, now: float) -> Rank:
        self.left -= 1
        if not self.left:
            raise ArithmeticError("not today")
        return super().ranked(owners, freed, now)


class Faulty(Pools):
    """A ranking that fails at any time leaves vLLM's own order, with all blocks."""

    policy_class = Failing

    @initialize(left=st.integers(1, 60))
    def fails_after(self, left: int) -> None:
        ours = self.engines[1]
        assert isinstance(ours.keeper.policy, Failing)
        ours.keeper.policy.left = left
        for name in ("began", "wrote", "left", "released"):
            setattr(ours.keeper, name, self._caught(getattr(ours.keeper, name)))

    def _caught(self, does: Callable[..., Any]) -> Callable[..., Any]:
        """As the scheduler does: what fails outside of the queue stops it, too."""
        ours = self.engines[1]

        def tried(*args: Any) -> Any:
            try:
                return None if ours.failed else does(*args)
            except ArithmeticError as why:
                assert ours.queue is not None
                ours.queue.stop()
                ours.failed.append(why)

        return tried


TestLRU = Pools.TestCase
TestUnnamed = Unnamed.TestCase
TestFaulty = Faulty.TestCase
TestWatched = Watched.TestCase
LONG = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestLRU.settings = TestUnnamed.settings = TestFaulty.settings = TestWatched.settings = LONG


def test_a_ranking_that_names_blocks_that_are_not_free_is_not_believed() -> None:
    engine = Engine(Policy(), itertools.count())
    used(engine, "a", "aaaaa")
    assert engine.queue is not None
    engine.queue._spare[3] = None
    engine.queue._spare.move_to_end(3, last=False)
    engine.queue._spare[0] = None  # vLLM's block that is never given out
    engine.queue._spare.move_to_end(0, last=False)
    taken = engine.pool.get_new_blocks(BLOCKS - 1)
    assert sorted(block.block_id for block in taken) == list(range(1, BLOCKS))
    assert "not free" in str(engine.failed[0])


def test_blocks_in_use_that_change_their_hashes_among_each_other_are_told_apart() -> None:
    engine = Engine(Policy(), itertools.count())
    blocks = engine.begin("a", "abc")
    assert blocks is not None
    assert engine.queue is not None
    one, two, three = (block.block_hash for block in blocks)
    engine.keeper.wrote("a", None, hashes("abc"), 0.0)
    engine.queue.declare(blocks, "a")
    for block, found in zip(blocks, (two, three, None), strict=True):
        block.reset_hash()
        if found is not None:
            block.set_block_hash(found)
    engine.queue.declare(blocks, "a")
    engine.pool.free_blocks(reversed(blocks))
    engine.keeper.left("a", 0, 0.0)
    assert not engine.failed
    assert [engine.keeper.ledger.copies(key, DEVICE) for key in hashes("abc")] == [0, 1, 1]
    assert one is not None


def test_a_block_that_another_step_has_in_the_midst_of_a_run_leaves_the_order_of_the_run() -> None:
    clock = itertools.count()
    engines = Engine(None, clock), Engine(Policy(), clock)
    for engine in engines:
        first = engine.begin("a", "xx")
        engine.pool.evict_blocks({1})  # so that the next one gets a second block with the hash of the other
        second = engine.begin("a", "xxx")
        assert first is not None
        assert second is not None
        engine.end("a", second)
        engine.end("a", first)
    assert engines[0].free() == engines[1].free()


def test_what_is_given_up_is_counted_by_the_class_of_its_owners() -> None:
    engine = Engine(Retention(), itertools.count())
    for owner in "abc":
        used(engine, owner, owner * 5)
    engine.keeper.told({"a": Hint(0.0, next_use=1e6)}, 0.0)
    engine.keeper.released("c", 50.0)
    blocks = engine.pool.get_new_blocks(BLOCKS - 1)
    assert engine.queue is not None
    assert engine.queue.evicted == [5, 5, 5, 0]
    engine.pool.free_blocks(blocks)


def test_free_blocks_are_walked_in_their_order_from_any_on() -> None:
    engine = Engine(Policy(), itertools.count())
    used(engine, "a", "aaa")
    queue = engine.pool.free_block_queue
    order = queue.get_all_free_blocks()
    for place, block in enumerate(order):
        assert list(queue.iter_blocks_after(block)) == order[place + 1 :]
    (taken,) = engine.pool.get_new_blocks(1)
    assert list(queue.iter_blocks_after(taken)) == []


def used(engine: Engine, owner: str, text: str) -> int:
    """Play a step; returns the blocks that it found."""
    before = engine.pool.get_num_free_blocks()
    blocks = engine.begin(owner, text)
    assert blocks is not None
    hits = len(text) - sum(engine.keeper.ledger.copies(key, DEVICE) == 0 for key in hashes(text))
    engine.end(owner, blocks)
    assert engine.pool.get_num_free_blocks() == before
    return hits


def test_dead_blocks_go_first_and_what_is_needed_soonest_last() -> None:
    engine = Engine(Retention(), itertools.count())
    for owner in "abc":
        used(engine, owner, owner * 5)
    for owner, ahead in (("a", 10), ("b", 1000)):
        engine.keeper.told({owner: Hint(0.0, next_use=1000.0 + ahead)}, 0.0)
    engine.keeper.released("c", 50.0)
    used(engine, "d", "d" * 5)
    assert used(engine, "a", "a" * 5) == used(engine, "b", "b" * 5) == 5
    used(engine, "e", "e" * 5)
    assert used(engine, "a", "a" * 5) == 5


def test_a_block_that_is_not_free_cannot_be_removed() -> None:
    engine = Engine(Policy(), itertools.count())
    (block,) = engine.pool.get_new_blocks(1)
    with pytest.raises(RuntimeError, match="invalid block"):
        engine.pool.free_block_queue.remove(block)


def test_a_superseded_tail_goes_before_anything_else() -> None:
    engine = Engine(Retention(), itertools.count())
    used(engine, "b", "bbbbb")
    used(engine, "a", "aaaaa")
    for owner in "ab":
        engine.keeper.told({owner: Hint(0.0, next_use=1e6)}, 0.0)
    used(engine, "a", "aaxx")
    blocks = engine.begin("c", "cccc" + "c" * (engine.pool.get_num_free_blocks() - 13))
    assert blocks is not None
    engine.end("c", blocks)
    left = [key for key in hashes("aaaaa")[2:] if engine.keeper.ledger.copies(key, DEVICE)]
    assert left == [] or used(engine, "b", "bbbbb") == 5
