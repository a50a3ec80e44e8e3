"""Everything at once on an engine with a host tier, with poison where nothing is to be read, and an audit each step."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvcache.ledger import DEVICE, HOST
from tests.engine.tier import CHUNK_BYTES, Play, prefetch, retain

AGENTS, LIVE, SHORT = 6, 5, 160


class Poison:
    """Fills what holds nothing: blocks with 1e18 when they are given out, chunks with NaN when they are given up.

    Not NaN in blocks, since vLLM's attention on the CPU multiplies what it masks in a block that is partly filled by 0.
    """

    def __init__(self, play: Play) -> None:
        import torch
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        side: Any = get_kv_transfer_group()
        self.worker, self.policy = side.connector_worker.worker, play.connector.scheduler.manager.policy
        self.poisons = [
            torch.full((CHUNK_BYTES // 4,), value, dtype=torch.float32).view(torch.int8) for value in (1e18, torch.nan)
        ]
        self.given: list[int] = []
        self.filled = 0
        pool = play.scheduler.kv_cache_manager.block_pool
        take, evict, preempt = pool.get_new_blocks, self.policy.evict, side.handle_preemptions

        def taken(count: int) -> Any:
            blocks = take(count)
            self.given += [block.block_id for block in blocks]
            return blocks

        def evicted(count: int, protected: Any) -> Any:
            gone = evict(count, protected)
            self.fill(self.worker.host, [chunk.chunk_id for _, chunk in gone or ()], self.poisons[1])
            return gone

        def fenced(metadata: Any) -> Any:
            # vLLM reads what a block held before up to here.
            done = preempt(metadata)
            self.fill(self.worker.device, self.given, self.poisons[0])
            self.given = []
            return done

        pool.get_new_blocks, self.policy.evict, side.handle_preemptions = taken, evicted, fenced

    def fill(self, tensors: list[Any], rows: list[int], poison: Any) -> None:
        """These rows hold nothing."""
        self.filled += len(rows)
        for tensor in tensors:
            for row in rows:
                tensor[row] = poison[: tensor.shape[1]]


def audit(play: Play) -> None:
    """No block or chunk is lost or doubled, and the ledger knows what is there."""
    scheduler, connector = play.scheduler, play.connector
    pool, manager, keeper = (
        scheduler.kv_cache_manager.block_pool,
        connector.scheduler.manager,
        scheduler._control._keeper,
    )
    policy = manager.policy
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == len(set(free)) == pool.get_num_free_blocks()
    assert set(free) == {block.block_id for block in pool.blocks if not block.ref_cnt and not block.is_null}
    chunks = [chunk.chunk_id for chunk in policy.chunks.values()]
    assert len(chunks) == len(set(chunks))
    assert not set(chunks) & set(manager._free_list)
    assert len(chunks) + len(manager._free_list) == manager._num_allocated_chunks
    assert manager._num_evictable_cache_chunks == len(policy._evictable)
    assert policy._evictable == {name for name, chunk in policy.chunks.items() if chunk.ref_cnt == 0}
    policy.settle()
    assert set(keeper.host) == policy._evictable
    assert all(keeper.ledger.copies(name[:-4], HOST) == 1 for name in policy.chunks)
    assert set(keeper.device) <= set(free)
    assert all(pool.blocks[number].block_hash is not None for number in keeper.device)
    assert all(keeper.ledger.copies(pool.blocks[number].block_hash[:-4], DEVICE) for number in keeper.device)


class Engine(RuleBasedStateMachine):
    """What a server may ask of one engine, in any order. All examples play on the same engine, emptied in between."""

    play: ClassVar[Play]
    prompts: ClassVar[list[list[int]]]
    alone: ClassVar[dict[tuple[int, int, int], list[int]]] = {}
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, tuple[int, int]] = {}
        self.aborted: set[str] = set()

    @property
    def open(self) -> list[str]:
        """Steps that have not ended."""
        return [name for name in self.asked if name not in self.play.answers and name not in self.aborted]

    def ask(self, agent: int, whole: bool, tokens: int) -> None:
        """A step comes."""
        cut = len(self.prompts[agent]) if whole else SHORT
        self.asked[self.play.add(f"b{agent}", self.prompts[agent][:cut], tokens)] = agent, cut

    @precondition(lambda self: len(self.open) < LIVE)
    @rule(agent=st.integers(0, AGENTS - 1), whole=st.booleans(), tokens=st.sampled_from((1, 5, 40)))
    def a_step_comes(self, agent: int, whole: bool, tokens: int) -> None:
        self.ask(agent, whole, tokens)

    @precondition(lambda self: not self.open)
    @rule(first=st.integers(0, AGENTS - 1))
    def more_come_than_there_is_room_for(self, first: int) -> None:
        """Some are preempted then."""
        for place in range(LIVE):
            self.ask((first + place) % AGENTS, True, 100)

    @rule(steps=st.integers(1, 12))
    def the_engine_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.play.step()
            audit(self.play)

    @rule(seconds=st.sampled_from((0.01, 0.1)))
    def time_passes(self, seconds: float) -> None:
        self.play.run(seconds)
        audit(self.play)

    @rule(ahead=st.lists(st.sampled_from((0.05, 1.0, 10.0, 100.0)), min_size=AGENTS, max_size=AGENTS))
    def next_uses_are_told(self, ahead: list[float]) -> None:
        self.play.say(*(retain(f"b{agent}", seconds) for agent, seconds in enumerate(ahead)))

    @rule(agent=st.integers(0, AGENTS - 1), within=st.sampled_from((0.01, 1.0, 5.0)), comes=st.booleans())
    def one_is_fetched(self, agent: int, within: float, comes: bool) -> None:
        """And comes at once, or not."""
        self.play.say(retain(f"b{agent}", 0.05), prefetch(f"b{agent}", within))
        if comes and len(self.open) < LIVE:
            self.play.step()
            self.ask(agent, True, 5)

    @rule(agent=st.integers(0, AGENTS - 1))
    def one_is_released(self, agent: int) -> None:
        self.play.say({"action_type": "kv.release", "payload": {"owner": f"b{agent}"}})

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_step_is_aborted(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open))
        self.play.engine.abort_request([name])
        self.aborted.add(name)
        self.counts["aborts"] += 1

    @rule(both=st.booleans())
    def all_is_forgotten(self, both: bool) -> None:
        self.counts["resets"] += reset(self.play, both)
        audit(self.play)

    def teardown(self) -> None:
        """All ends as it does alone, and nothing is left over."""
        play, connector = self.play, self.play.connector
        play.run()
        play.drain()
        audit(play)
        assert not connector._prefetches
        assert not connector._saves
        assert not connector.scheduler._jobs
        assert not connector._waiting
        assert not play.scheduler.kv_cache_manager.block_pool.free_block_queue.leaving
        assert not self.open
        for name in self.asked.keys() - self.aborted:
            tokens = list(play.answers[name].outputs[0].token_ids)
            assert tokens == self.computed_alone(*self.asked[name], len(tokens))
            self.counts["ended"] += 1
        assert reset(play, True)

    def computed_alone(self, agent: int, cut: int, tokens: int) -> list[int]:
        """What a prompt gives where nothing is cached."""
        if (agent, cut, tokens) not in self.alone:
            assert reset(self.play, True)
            name = self.play.add("alone", self.prompts[agent][:cut], tokens)
            self.play.run()
            self.play.drain()
            self.alone[agent, cut, tokens] = list(self.play.answers[name].outputs[0].token_ids)
        return self.alone[agent, cut, tokens]


def machine(model: str, examples: int) -> dict[str, Any]:
    """Play so many examples, always the same; what they had to do with. AssertionError where one fails."""
    rng, play = random.Random(2), Play(model, 34, 40, 20e6)
    poison = Poison(play)
    Engine.play, counts, preempt = play, Engine.counts, play.scheduler._preempt_request
    Engine.prompts = [[rng.randrange(3, 1000) for _ in range(rng.choice((200, 300, 400)))] for _ in range(AGENTS)]

    def preempted(*args: Any, **kwargs: Any) -> Any:
        counts["preempted"] += 1
        return preempt(*args, **kwargs)

    play.scheduler._preempt_request = preempted
    run_state_machine_as_test(
        Engine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, database=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    counts["filled"] = poison.filled
    return {**counts, "race": race(play, Engine.prompts), "gauges": play.connector.gauges()}


def race(play: Play, prompts: list[list[int]]) -> dict[str, Any]:
    """A request comes while its prefix is on its way to the device."""
    assert reset(play, True)
    outputs = []
    for agent in range(AGENTS):
        first = play.add(f"b{agent}", prompts[agent], 5)
        play.run()
        play.drain()
        outputs.append(list(play.answers[first].outputs[0].token_ids))
        play.say(*(retain(f"b{one}", 1.0 if one else 100.0) for one in range(AGENTS)))
    pool, keeper = play.scheduler.kv_cache_manager.block_pool, play.scheduler._control._keeper
    assert pool.get_cached_block(keeper.ledger.line("b0")[-1], [0]) is None
    play.say(*(retain(f"b{agent}", 0.5 if agent == 0 else 100.0) for agent in range(AGENTS)), prefetch("b0", 30.0))
    for _ in range(1000):
        if play.connector._prefetches._flights:
            break
        play.step()
    assert play.connector._prefetches._flights
    name = play.add("b0", prompts[0], 5)
    play.step()
    audit(play)
    play.run()
    play.drain()
    audit(play)
    answer = play.answers[name]
    assert len({tuple(output) for output in outputs}) == AGENTS, "poison reaches what is computed alone"
    same = list(answer.outputs[0].token_ids) == outputs[0]
    return {"same": same, "cached": answer.num_cached_tokens, "used": play.connector.gauges()["prefetch_used_total"]}


def reset(play: Play, both: bool) -> int:
    """Forget all KV, on the host as well if `both`, unless a request holds some."""
    return int(play.scheduler.reset_prefix_cache(reset_connector=both))
