"""Everything at once on an engine with a host tier, with poison where nothing is to be read, and an audit each step."""

from __future__ import annotations

import random
from typing import Any

from kvcache.ledger import DEVICE, HOST
from tests.engine.tier import CHUNK_BYTES, Play, prefetch, retain

AGENTS, STEPS = 6, 700


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


def chaos(model: str, seed: int) -> dict[str, Any]:
    """The prompts of all steps that ended, what was found of them and what came out, and the same computed alone."""
    play, rng = Play(model, 34, 40, 20e6), random.Random(seed)
    poison = Poison(play)
    prompts = [[rng.randrange(3, 1000) for _ in range(rng.choice((200, 300, 400)))] for _ in range(AGENTS)]
    asked: dict[str, tuple[int, int]] = {}
    aborted: set[str] = set()
    counts = dict.fromkeys(("resets", "aborts", "preempted"), 0)
    preempt = play.scheduler._preempt_request

    def preempted(*args: Any, **kwargs: Any) -> Any:
        counts["preempted"] += 1
        return preempt(*args, **kwargs)

    play.scheduler._preempt_request = preempted
    for turn in range(STEPS):
        happens, agent = rng.random(), rng.randrange(AGENTS)
        owner = f"b{agent}"
        busy = turn // 50 % 2 == 0
        if happens < (0.15 if busy else 0.03) and play.engine.get_num_unfinished_requests() < 5:
            cut = rng.choice((len(prompts[agent]), 160))
            asked[play.add(owner, prompts[agent][:cut], rng.choice((1, 5, 40)))] = agent, cut
        elif happens < 0.4:
            play.say(retain(owner, 0.05), prefetch(owner, rng.choice((0.01, 1.0, 5.0))))
            if rng.random() < 0.4 and not play.engine.has_unfinished_requests():
                play.step()
                asked[play.add(owner, prompts[agent], 5)] = agent, len(prompts[agent])
        elif happens < 0.5:
            play.say(*(retain(f"b{one}", rng.choice((0.1, 1.0, 10.0))) for one in range(AGENTS)))
        elif happens < 0.52:
            play.say({"action_type": "kv.release", "payload": {"owner": owner}})
        elif happens < 0.54 and (open_ := asked.keys() - play.answers.keys() - aborted):
            name = rng.choice(sorted(open_))
            play.engine.abort_request([name])
            aborted.add(name)
            counts["aborts"] += 1
        elif happens < 0.56:
            counts["resets"] += reset(play, rng.random() < 0.3)
        elif happens < 0.57:
            play.run(0.1)
        play.step()
        audit(play)
    play.run()
    play.drain()
    audit(play)
    left = play.connector._prefetches, play.connector._saves, play.connector.scheduler._jobs
    pool = play.scheduler.kv_cache_manager.block_pool
    done = {name: answer for name, answer in play.answers.items() if name in asked and answer.finished}
    outputs = {name: list(answer.outputs[0].token_ids) for name, answer in done.items()}
    gauges = play.connector.gauges()
    again = {}
    assert reset(play, True)
    for name in [name for name in outputs if name not in aborted]:
        agent, cut = asked[name]
        if (key := f"{agent} {cut} {len(outputs[name])}") not in again:
            assert play.scheduler.reset_prefix_cache(reset_connector=True)
            alone = play.add("alone", prompts[agent][:cut], len(outputs[name]))
            play.run()
            play.drain()
            again[key] = list(play.answers[alone].outputs[0].token_ids)
    differ = [
        name for name in outputs if name not in aborted and outputs[name] != again_of(again, asked, outputs, name)
    ]
    return {
        "ended": len(outputs), "differ": len(differ), "left": [len(one) for one in left], "filled": poison.filled,
        "race": race(play, prompts), "free": pool.get_num_free_blocks(), "waiting": len(play.connector._waiting), **counts, "gauges": gauges,
    }  # fmt: skip


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


def again_of(again: dict[str, Any], asked: dict[str, Any], outputs: dict[str, Any], name: str) -> Any:
    """The output of the same prompt alone."""
    agent, cut = asked[name]
    return again[f"{agent} {cut} {len(outputs[name])}"]


def reset(play: Play, both: bool) -> int:
    """Forget all KV, on the host as well if `both`, unless a request holds some."""
    return int(play.scheduler.reset_prefix_cache(reset_connector=both))
