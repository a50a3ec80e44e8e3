"""vLLM's real scheduler under ours, with steps in flight, aborts, preemptions and resets: no block lost or doubled."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.kvcache.plugin.schedulers import BLOCK, Played

BLOCKS = 10
DEPTH = 2


def audit(played: Played) -> None:
    """The queue has just the blocks that nobody uses."""
    free = [block.block_id for block in played.pool.free_block_queue.get_all_free_blocks()]
    unused = {block.block_id for block in played.pool.blocks if not block.ref_cnt and not block.is_null}
    assert sorted(free) == sorted(unused)
    assert played.pool.get_num_free_blocks() == len(free)


class Named(RuleBasedStateMachine):
    """Steps of owners, and hints of all kinds."""

    owners = ("a.r", "b.r", "c", None)
    stock = deferred = False

    def __init__(self) -> None:
        super().__init__()
        self.played = [Played(BLOCKS)]
        if self.stock:
            self.played.append(Played(BLOCKS, kind=AsyncScheduler))
        for played in self.played:
            played.scheduler.defer_block_free = self.deferred
        self.count = self.flying = 0
        self.asked: list[str] = []

    @rule(data=st.data(), prompt=st.text("xyz", min_size=1, max_size=4), rest=st.integers(1, BLOCK - 1),
          tokens=st.integers(1, 2 * BLOCK), priority=st.integers(0, 2))  # fmt: skip
    def ask(self, data: st.DataObject, prompt: str, rest: int, tokens: int, priority: int) -> None:
        self.count += 1
        session = data.draw(st.sampled_from(self.owners))
        text = [ord(letter) for letter in prompt for _ in range(BLOCK)] + [1] * rest
        for played in self.played:
            played.ask(str(self.count), text, session, tokens, priority=priority, arrival_time=float(self.count))
        self.asked.append(str(self.count))

    @precondition(lambda self: self.flying < DEPTH)
    @rule(steps=st.integers(1, 40))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            for played in self.played:
                played.begin()
                if self.flying == DEPTH:
                    played.finish()
            self.flying = min(DEPTH, self.flying + 1)

    @precondition(lambda self: self.flying)
    @rule()
    def land(self) -> None:
        self.flying -= 1
        for played in self.played:
            played.finish()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.asked))
        for played in self.played:
            played.abort(name)

    @rule(running=st.booleans())
    def reset(self, running: bool) -> None:
        preempts = running and not self.deferred  # vLLM raises where blocks come back late
        said = [played.scheduler.reset_prefix_cache(preempts, True) for played in self.played]
        assert said == said[:1] * len(said)

    @rule(owner=st.sampled_from("abc"), kind=st.sampled_from(["kv.release", "kv.retain", "weft.priority"]),
          ahead=st.floats(0, 100))  # fmt: skip
    def tell(self, owner: str, kind: str, ahead: float) -> None:
        self.count += 1
        payload = {"owner": owner, "next_use": ahead, "priority": ahead, "leased": ahead > 50}
        answer = self.played[0].tell(self.count, (kind, payload), residency={"seen": -1})
        assert sum(answer["counts"].values()) == 1
        most = self.played[0].pool.num_gpu_blocks * BLOCK
        assert all(0 < tokens <= most for tokens, _ in answer["residency"]["owners"].values())

    @invariant()
    def no_block_is_lost_or_doubled(self) -> None:
        for played in self.played:
            audit(played)
        assert self.played[0].scheduler.abilities["why"] == []

    @invariant()
    def vllm_is_as_it_would_be(self) -> None:
        if self.stock:
            ours, stock = self.played
            assert ours.found == stock.found
            assert ours.outputs == stock.outputs
            assert _order(ours) == _order(stock)
            assert ours.scheduler({})["gauges"]["guard_weight"] == 1

    def teardown(self) -> None:
        for played in self.played:
            played.run(DEPTH)
            audit(played)
            assert played.pool.get_num_free_blocks() == BLOCKS
        scheduler = self.played[0].scheduler
        assert len(scheduler._steps) == 0
        assert not scheduler._steps._of
        assert not scheduler._steps._keeper.ledger._running


class Unnamed(Named):
    """With nobody named, block for block what stock vLLM does."""

    owners = (None,)
    stock = True


class Deferred(Unnamed):
    """Blocks come back only when the steps that were in flight are done, as with a connector that loads."""

    deferred = True


class NamedDeferred(Named):
    """The same, of owners."""

    deferred = True


def _order(played: Played) -> list[Any]:
    return [block.block_id for block in played.pool.free_block_queue.get_all_free_blocks()]


TestNamed = Named.TestCase
TestUnnamed = Unnamed.TestCase
TestDeferred = Deferred.TestCase
TestNamedDeferred = NamedDeferred.TestCase
SOME = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestNamed.settings = TestUnnamed.settings = TestDeferred.settings = TestNamedDeferred.settings = SOME
