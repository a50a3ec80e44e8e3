"""The shadow of LRU, and a policy that is followed as long as no more is recomputed than under LRU."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest

from kvcache.keeper import Keeper
from kvcache.policy import DEAD, KNOWN, UNKNOWN, Hint, Policy
from kvcache.retention import Retention
from kvcache.shadow import CREDIT, LOSS, SAVED, Guarded, Shadow
from tests.kvcache.engine import Engine, Step
from tests.kvcache.stacks import Run

Teller = Callable[[Keeper, str, float], None]


def step(owner: str, blocks: int) -> Step:
    return Step(owner, [(owner, place) for place in range(blocks)])


def cyclic(count: int) -> list[Step]:
    """Twenty agents that take turns."""
    return [step(f"a{turn % 20}", 8) for turn in range(count)]


def zipf(count: int) -> list[Step]:
    """Two hundred prompts, some of them much more often than others."""
    rng = random.Random(1)
    sizes = [rng.randint(4, 14) for _ in range(200)]
    chosen = rng.choices(range(200), weights=[1 / (1 + n) for n in range(200)], k=count)
    return [step(f"z{one}", sizes[one]) for one in chosen]


def sessions(count: int) -> list[Step]:
    """Forty at a time, which grow, come back at random and end after twelve steps."""
    rng, live, steps = random.Random(2), [(n, 0, 1) for n in range(40)], []
    for number in range(count):
        slot = rng.randrange(40)
        name, turn, size = live[slot]
        steps.append(step(f"s{name}", size))
        live[slot] = (name, turn + 1, size + rng.randint(1, 3)) if turn < 11 else (40 + number, 0, 1)
    return steps


WORKLOADS = {"cyclic": (cyclic, 120, 3), "zipf": (zipf, 300, 8), "sessions": (sessions, 400, 8)}
LONG = 8000


@cache
def recomputed(name: str, count: int) -> int:
    """Blocks under LRU."""
    make, room, run = WORKLOADS[name]
    return Engine(Policy(), room, run).play(make(count)).misses


def next_uses(steps: list[Step]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for turn, one in enumerate(steps):
        times.setdefault(one.owner, []).append(turn + 1.0)
    for mine in times.values():
        mine.reverse()
    return times


def honest(steps: list[Step]) -> Teller:
    uses = next_uses(steps)

    def tell(keeper: Keeper, owner: str, now: float) -> None:
        mine = uses[owner]
        while mine and mine[-1] <= now:
            mine.pop()
        if mine:
            keeper.told({owner: Hint(now, next_use=mine[-1])}, now)
        else:
            keeper.released(owner, now)

    return tell


def lying(steps: list[Step]) -> Teller:
    """The sooner it is needed, the later it says."""
    uses = next_uses(steps)

    def tell(keeper: Keeper, owner: str, now: float) -> None:
        mine = uses[owner]
        while mine and mine[-1] <= now:
            mine.pop()
        ahead = mine[-1] - now if mine else 1e5
        keeper.told({owner: Hint(now, next_use=now + 1e5 / ahead)}, now)

    return tell


def noise(steps: list[Step]) -> Teller:
    rng = random.Random(3)
    return lambda keeper, owner, now: bool(keeper.told({owner: Hint(now, next_use=now + rng.expovariate(1 / 50))}, now))


def releasing(steps: list[Step]) -> Teller:
    """Half of what is needed is released."""
    rng = random.Random(4)

    def tell(keeper: Keeper, owner: str, now: float) -> None:
        if rng.random() < 0.5:
            keeper.released(owner, now)
        else:
            keeper.told({owner: Hint(now, next_use=now + 1e6 * rng.random())}, now)

    return tell


def winning_trust(steps: list[Step]) -> Teller:
    """Honest until it is followed, and then not."""
    good, bad = honest(steps), lying(steps)

    def tell(keeper: Keeper, owner: str, now: float) -> None:
        assert isinstance(keeper.policy, Guarded)
        (bad if keeper.policy.weight == 1.0 else good)(keeper, owner, now)

    return tell


def guarded(name: str, count: int, teller: Callable[[list[Step]], Teller]) -> Engine:
    make, room, run = WORKLOADS[name]
    steps = make(count)
    return Engine(Guarded(Retention(), Shadow(room)), room, run, teller(steps)).play(steps)


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_honest_policy_is_followed_all_the_time_also_under_the_pressure_of_running_steps(name: str) -> None:
    engine = guarded(name, 4000, honest)
    assert set(engine.weights) == {1.0}
    assert engine.misses < 0.8 * recomputed(name, 4000)


@pytest.mark.parametrize("run", [1, 10, 22])
def test_a_policy_that_is_lru_is_followed_however_much_of_the_cache_runs(run: int) -> None:
    steps = zipf(4000)
    engine = Engine(Guarded(Policy(), Shadow(300)), 300, run).play(steps)
    assert set(engine.weights) == {1.0}
    assert engine.guard is not None
    assert engine.guard.shadow.lru == engine.guard.shadow.hits == engine.hits


@pytest.mark.parametrize("teller", [lying, noise, releasing, winning_trust])
@pytest.mark.parametrize("name", WORKLOADS)
def test_whatever_is_told_no_more_is_recomputed_in_the_long_run_than_under_lru(
    name: str, teller: Callable[[list[Step]], Teller]
) -> None:
    assert guarded(name, LONG, teller).misses <= 1.02 * recomputed(name, LONG)


@pytest.mark.parametrize("name", ["zipf", "sessions"])
def test_without_the_guard_lies_cost_far_more_than_that(name: str) -> None:
    """A foretold use that does not come lapses, which bounds the harm a little; the guard has to do the rest."""
    make, room, run = WORKLOADS[name]
    steps = make(2000)
    assert Engine(Retention(), room, run, lying(steps)).play(steps).misses > 1.1 * recomputed(name, 2000)


def test_a_policy_that_lied_is_followed_again_when_it_is_honest_and_pays_off() -> None:
    steps = zipf(12_000)
    good, bad = honest(steps), lying(steps)
    engine = Engine(
        Guarded(Retention(), Shadow(300)), 300, 8, lambda k, o, now: (bad if now < 1000 else good)(k, o, now)
    )
    engine.play(steps)
    assert min(engine.weights) < 1.0
    assert engine.weights[-1] == 1.0


@pytest.mark.parametrize("room", [400, 1500, 4000])
def test_a_sampled_shadow_finds_about_what_the_whole_one_finds(room: int) -> None:
    rng = random.Random(5)
    sizes = [rng.randint(10, 60) for _ in range(200)]
    whole, sampled = Shadow(room), Shadow(room, sample=8)
    for number, one in enumerate(rng.choices(range(200), weights=[1 / (1 + n) for n in range(200)], k=4000)):
        keys = [(one, place) for place in range(sizes[one])]
        for shadow in (whole, sampled):
            shadow.looked(number, keys, 0)
            shadow.freed(number, keys)
    assert sampled.asked == pytest.approx(whole.asked, rel=0.1)
    assert sampled.lru / sampled.asked == pytest.approx(whole.lru / whole.asked, rel=0.06)


def test_the_shadow_of_a_large_cache_is_no_larger_than_the_largest() -> None:
    shadow = Shadow(1_000_000)
    for number in range(3):
        keys = range(number * 500_000, (number + 1) * 500_000)
        shadow.looked(number, keys, 0)
        shadow.freed(number, keys)
    assert len(shadow._idle) <= 65_536
    assert not shadow._used


def found(shadow: Shadow, name: str, *keys: str) -> int:
    before = shadow.lru
    shadow.looked(name, keys, 0)
    shadow.freed(name, keys)
    return shadow.lru - before


def test_blocks_in_use_whose_keys_are_not_known_yet_take_room_in_the_shadow() -> None:
    shadow = Shadow(4)
    shadow.looked("decodes", ("a",), 0, taken=1)
    assert [found(shadow, "s", "b", "c"), found(shadow, "s", "b", "c")] == [0, 2]
    shadow.looked("other", ("d",), 0, used=3, taken=1)
    shadow.freed("other", ("d",))
    assert found(shadow, "s", "b", "c") == 0, "what is being generated has taken their place"
    shadow.freed("decodes", ("a", "e", "f"))
    assert found(shadow, "s", "a", "e", "f") == 3


def test_what_running_steps_have_taken_and_given_back_between_two_looks_is_gone_from_the_shadow() -> None:
    guard = Guarded(Retention(), Shadow(4))
    assert found(guard.shadow, "s", "a", "b") == 0
    guard.looked("decodes", ("c",), 0, taken=1)
    guard.freed("decodes", ("c",), 4)
    before = guard.shadow.lru
    guard.looked("s", ("a", "b"), 0, taken=2)
    assert guard.shadow.lru == before


def test_what_a_step_finds_is_not_taken_for_what_others_have_in_use() -> None:
    shadow = Shadow(4)
    assert found(shadow, "s", "a", "b") == 0
    shadow.looked("decodes", ("c",), 0, taken=2)
    shadow.looked("s", ("a", "b"), 2, used=2, taken=2)
    assert shadow.lru == 2


def test_what_others_had_taken_by_the_time_a_step_looks_is_gone_from_the_shadow() -> None:
    shadow = Shadow(4)
    assert found(shadow, "s", "a", "b") == 0
    shadow.looked("decodes", ("c",), 0, taken=1)
    shadow.looked("s", ("a", "b"), 0, used=3, taken=1)
    assert shadow.lru == 1, "one of two"


def test_what_a_step_that_failed_never_computed_is_not_in_the_shadow() -> None:
    shadow = Shadow(8)
    shadow.looked("fails", ("a", "b", "c"), 0)
    shadow.freed("fails", ("a",))
    assert found(shadow, "s", "a", "b", "c") == 1


def test_a_step_that_is_preempted_and_comes_back_is_counted_as_often() -> None:
    shadow = Shadow(8)
    shadow.looked("s", ("a", "b"), 0)
    shadow.freed("s", ("a", "b"))
    shadow.looked("s", ("a", "b"), 2)
    assert (shadow.asked, shadow.hits, shadow.lru) == (4, 2, 2)
    shadow.freed("s", ("a", "b"))
    assert not shadow._used
    assert not shadow._steps


def test_a_cache_that_was_emptied_has_nothing_but_what_is_in_use() -> None:
    shadow = Shadow(8)
    assert found(shadow, "s", "a") == 0
    shadow.looked("runs", ("b",), 0)
    shadow.clear()
    assert found(shadow, "s", "a") == 0
    assert found(shadow, "s", "b") == 1


def lose(guard: Guarded, blocks: int) -> None:
    """LRU finds them, the cache does not."""
    keys = [f"k{n}" for n in range(blocks)]
    guard.shadow.looked("s", keys, 0)
    guard.shadow.freed("s", keys)
    guard.looked("s", keys, 0)
    guard.freed("s", keys, len(keys))


def test_in_debt_what_is_dead_still_goes_first_and_deeper_in_debt_nothing_is_believed() -> None:
    guard = Guarded(Retention(), Shadow(800))
    guard.told({"a": Hint(0.0, next_use=5.0)}, 0.0)
    guard.released("b", 0.0)

    def classes() -> list[int]:
        return [guard.rank(Run(owner, 3.0), 4.0)[0] for owner in "abc"]

    assert (guard.weight, classes()) == (1.0, [KNOWN, DEAD, UNKNOWN])
    lose(guard, int(800 * CREDIT) - 1)
    assert not guard.judged()
    lose(guard, 2)
    assert guard.judged()
    assert (guard.weight, classes()) == (0.5, [UNKNOWN, DEAD, UNKNOWN])
    lose(guard, int(800 * CREDIT) + 10)
    assert guard.judged()
    assert (guard.weight, classes()) == (0.0, [UNKNOWN] * 3)
    assert guard.rank(Run("b", 3.0), 4.0) == (UNKNOWN, 3.0)


def test_the_way_back_is_a_debt_repaid_by_what_lru_would_have_missed() -> None:
    guard = Guarded(Retention(), Shadow(80))
    lose(guard, round(2 * 80 * CREDIT) + 5)
    assert guard.judged()
    assert guard.weight == 0.0
    weights = []
    for number in range(round(60 / LOSS)):
        guard.looked(number, [number], 0)
        guard.freed(number, [number], 1)
        guard.judged()
        weights.append(guard.weight)
    assert sorted(weights) == weights
    assert set(weights) == {0.0, 0.5, 1.0}


def test_what_was_gained_may_be_lost_again_up_to_half_a_cache() -> None:
    guard = Guarded(Retention(), Shadow(800))
    gained = [f"g{n}" for n in range(800)]
    for _ in range(3):
        guard.shadow.clear()
        guard.looked("s", gained, 800)
        guard.freed("s", gained, 800)
    lose(guard, int(800 * SAVED))
    assert not guard.judged()
    assert guard.weight == 1.0
    lose(guard, int(800 * CREDIT))
    guard.judged()
    assert guard.weight == 0.5
    lose(guard, 10)
    guard.judged()
    assert guard.weight == 0.0


def test_on_the_edge_trust_does_not_come_and_go_with_every_step() -> None:
    guard = Guarded(Retention(), Shadow(800))
    lose(guard, int(800 * CREDIT) + 1)
    changes = 0
    for number in range(200):
        lose(guard, 1)
        changes += guard.judged()
        guard.shadow.clear()
        guard.looked("s", [f"n{number}"], 1)
        guard.freed("s", [f"n{number}"], 1)
        changes += guard.judged()
    assert changes <= 4
