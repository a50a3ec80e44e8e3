"""N agents that take turns in a cache with room for C: the case that LRU always loses and steps to execution win."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kvcache.order import Order
from kvcache.policies import POLICIES
from kvcache.policy import Hint
from tests.kvcache.stacks import Run

BLOCKS = 4  # of an agent's prompt


class Toy:
    """A cache of the prompts of agents that take turns; a hit is a block of the prefix that was left."""

    def __init__(self, name: str, agents: int, room: int) -> None:
        self.policy = POLICIES[name]()
        self.order: Order[Run] = Order(self.policy)
        self.agents, self.free = agents, room * BLOCKS
        self.kept: dict[int, Run] = {}

    def turn(self, turn: int) -> int:
        """Run the next agent and return its hits."""
        agent, now = turn % self.agents, float(turn)
        self.policy.started(str(agent), now)
        self.order.changed(str(agent), now)
        hits = 0
        if (own := self.kept.pop(agent, None)) is not None:
            self.order.discard(own)
            hits = own.tokens
        for _ in range(BLOCKS - hits):
            self.take(now)
        self.policy.finished(str(agent), BLOCKS, now)
        self.tell(turn)
        self.kept[agent] = Run([str(agent)], now, BLOCKS)
        self.order.add(self.kept[agent], now)
        return hits

    def take(self, now: float) -> None:
        if self.free:
            self.free -= 1
            return
        victim = self.order.first(now)
        assert victim is not None
        victim.tokens -= 1
        if not victim.tokens:
            self.order.discard(victim)
            self.kept = {agent: run for agent, run in self.kept.items() if run is not victim}

    def tell(self, turn: int) -> None:
        for agent in range(self.agents):
            steps = (agent - turn - 1) % self.agents + 1
            self.policy.told({str(agent): Hint(since=turn, steps=steps, next_use=turn + steps)}, turn)
            self.order.changed(str(agent), turn)


@pytest.mark.parametrize(("agents", "room"), [(10, 5), (10, 8), (6, 5), (5, 2), (7, 1)])
@pytest.mark.parametrize("name", ["lru", "kvflow", "belady", "retention"])
def test_agents_in_a_ring_hit_as_often_as_theory_says(name: str, agents: int, room: int) -> None:
    toy, warm, turns = Toy(name, agents, room), 10 * agents, 20 * agents * (agents - 1)
    for turn in range(warm):
        toy.turn(turn)
    hits = sum(toy.turn(turn) for turn in range(warm, warm + turns))
    expected = Fraction(0) if name == "lru" else Fraction(room - 1, agents - 1)
    assert Fraction(hits, turns * BLOCKS) == expected


@pytest.mark.parametrize("name", ["lru", "kvflow", "belady", "retention"])
def test_with_room_for_all_every_policy_hits(name: str) -> None:
    toy = Toy(name, 5, 5)
    assert [toy.turn(turn) for turn in range(15)] == [0] * 5 + [BLOCKS] * 10
