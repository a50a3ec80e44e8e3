"""The shadow of LRU, and a policy that is trusted as far as it is no worse."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from kvcache.policy import DEAD, KNOWN, UNKNOWN, Hint
from kvcache.retention import Retention
from kvcache.shadow import LEAST, WINDOW, Guarded, Shadow
from tests.kvcache.stacks import Run


def lines(seed: int, count: int) -> list[tuple[tuple[int, int], ...]]:
    """Prompts of 10 to 60 blocks of sessions that come back at random, some more often."""
    rng = random.Random(seed)
    sizes = [rng.randint(10, 60) for _ in range(200)]
    chosen = rng.choices(range(200), weights=[1 / (1 + n) for n in range(200)], k=count)
    return [tuple((one, block) for block in range(sizes[one])) for one in chosen]


@pytest.mark.parametrize("room", [400, 1500, 4000])
def test_a_sampled_shadow_finds_what_an_lru_cache_of_full_size_finds(room: int) -> None:
    shadow, cache = Shadow(room), OrderedDict[tuple[int, int], None]()
    hits = asked = 0
    for line in lines(1, 4000):
        found = next((place for place, key in enumerate(line) if key not in cache), len(line))
        hits, asked = hits + found, asked + len(line)
        shadow.looked(line, found)
        shadow.wrote(line)
        for key in reversed(line):
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > room:
            cache.popitem(last=False)
    assert shadow.lru == pytest.approx(shadow.hits, rel=0.06)
    assert shadow.hits == pytest.approx(hits / 8, rel=0.1)


def window(guarded: Guarded, hits: int, lru: int) -> bool:
    guarded.shadow.hits, guarded.shadow.lru, guarded.shadow.steps = hits, lru, WINDOW
    return guarded.judged()


def test_a_policy_that_loses_to_lru_rules_less_and_less_and_one_that_does_not_comes_back() -> None:
    guarded = Guarded(Retention(), Shadow(100))
    ruled = []
    for _ in range(200):
        ruled.append(guarded.rules)
        window(guarded, 50, 100)
    assert guarded.weight == LEAST
    assert sum(ruled[-64:]) == 64 * LEAST
    for _ in range(200):
        window(guarded, 100, 100)
    assert (guarded.weight, guarded.rules) == (1.0, True)


def test_a_window_that_has_not_ended_changes_nothing() -> None:
    guarded = Guarded(Retention(), Shadow(100))
    guarded.shadow.lru, guarded.shadow.steps = 100, WINDOW - 1
    assert not guarded.judged()
    assert guarded.weight == 1.0


def test_while_lru_rules_only_what_is_dead_goes_before_the_least_recently_used() -> None:
    guarded = Guarded(Retention(), Shadow(100))
    guarded.told("a", Hint(0.0, next_use=5.0), 0.0)
    guarded.released("b", 0.0)
    ranks = [guarded.rank(Run(owner, 3.0), 4.0)[0] for owner in "abc"]
    assert ranks == [KNOWN, DEAD, UNKNOWN]
    while guarded.rules:
        window(guarded, 0, 100)
    assert [guarded.rank(Run(owner, 3.0), 4.0) for owner in "ac"] == [(UNKNOWN, 3.0)] * 2
    assert guarded.rank(Run("b", 3.0), 4.0)[0] == DEAD
