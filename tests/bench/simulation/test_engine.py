"""The modelled engine takes as long, and holds as much, as one that makes every step on its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from bench.records import CallRecord
from bench.simulation import guard
from bench.simulation.cluster import Cluster, simulate
from bench.simulation.engine import Engine
from bench.simulation.profile import Profile
from bench.simulation.system import System, Turn
from bench.workloads.runs import Call, Piece, Run, Workload
from kvcache.policy import KNOWN, Policy, Rank
from kvcache.shadow import Guarded

SMALL = Profile(
    "small", step=0.02, decode=0.001, context=1e-5, prefill=0.001, attention=1e-6,
    kv_tokens=256, kv_bytes=1000, block=8, budget=32, sequences=4, link=1e6,
)  # fmt: skip


class Sticky(System):
    """Everything on the first worker."""

    def arrived(self, turn: Turn) -> None:
        self.cluster.send(turn, 0)


class Unlimited(Sticky):
    unlimited = True


class Ours(Sticky):
    """Its engine has our plug-in."""

    ours = True


class Averse(Policy):
    """What a run named "returns" holds goes first."""

    def ranked(self, owners: Collection[str], freed: float, now: float) -> Rank:
        return KNOWN, freed - 1e6 * any("returns" in owner for owner in owners)


class OursAverse(Ours):
    def policy(self) -> Policy:
        return Averse()


class Blind(Guarded):
    """Ranks by the policy whatever it weighs."""

    def ranked(self, owners: Collection[str], freed: float, now: float) -> Rank:
        return self.policy.ranked(owners, freed, now)


def session(name: str, calls: int, first: int = 40, more: int = 24, output: int = 6, gap: float = 1.0) -> Run:
    """Each prompt goes on from the one before and its answer."""
    made: list[Call] = []
    above: Piece | None = None
    for number in range(calls):
        prompt = Piece(f"{name}/{number}", first if above is None else more, above)
        above = Piece(f"{name}/{number}a", output, prompt)
        made.append(Call("main", "main", prompt, output, tuple(made[-1:]), None, gap if made else 0.0, above))
    return Run(name, "agent", made)


def play(
    runs: list[Run], system: type[System] = Sticky, profile: Profile = SMALL, tier: float = 0.0
) -> tuple[Cluster, dict[str, list[CallRecord]]]:
    cluster = Cluster(system, profile, 1, tier, 100.0, 0)
    for run in runs:
        cluster.at(0.0, lambda one: cluster.play(one), run)
    cluster.run()
    for engine in cluster.engines:
        engine.device.check()
        engine.host.check()
        assert not engine.load
        assert engine.device.private == engine.device.pinned == engine.host.pinned == 0
    by_run: dict[str, list[CallRecord]] = {}
    for record in cluster.calls:
        by_run.setdefault(record.run, []).append(record)
    return cluster, by_run


def test_a_run_that_is_alone_takes_the_time_that_the_profile_says() -> None:
    run = session("one", 4)
    cluster, _ = play([run])
    assert cluster.runs[0].finished == pytest.approx(cluster.runs[0].unloaded, rel=0.01)
    assert SMALL.unloaded(run) == cluster.runs[0].unloaded


def test_what_the_call_before_left_is_found_in_whole_blocks() -> None:
    _, calls = play([session("one", 3)])
    assert [c.cached for c in calls["one"]] == [0, 45 // 8 * 8, 75 // 8 * 8]  # the last token generated has no KV
    assert [c.ideal for c in calls["one"]] == [0, 46 // 8 * 8, 76 // 8 * 8]


def test_first_tokens_come_when_the_prompt_is_prefilled() -> None:
    cluster, calls = play([session("one", 1, first=64)])
    record = calls["one"][0]
    steps = [0.02 + 0.001 * 32 + 1e-6 * 32 * at for at in (16, 48)]
    assert record.first_token == pytest.approx(sum(steps))
    assert cluster.engines[0].prefilled_tokens == 64


def test_with_our_plug_in_a_short_prefill_passes_a_long_one() -> None:
    """The long one loses no more than the short one takes."""
    long, short = session("long", 1, first=180), session("short", 1, first=12)
    first: dict[str, list[float]] = {"long": [], "short": []}
    for system in (Sticky, Ours):
        cluster = Cluster(system, SMALL, 1, 0.0, 100.0, 0)
        for at, run in ((0.0, long), (0.01, short)):
            cluster.at(at, cluster.play, run)
        cluster.run()
        for call in cluster.calls:
            assert call.first_token is not None
            first[call.run].append(call.first_token)
    assert first["short"][0] >= first["long"][0]
    assert first["short"][1] < first["long"][1] / 2
    assert first["long"][1] - first["long"][0] < SMALL.unloaded(short)


def test_a_prompt_waits_until_there_is_room_for_all_of_it() -> None:
    _, calls = play([session("one", 1, first=200, output=20), session("two", 1, first=100)])
    one, two = calls["one"][0], calls["two"][0]
    assert one.finished is not None
    assert two.first_token is not None
    assert two.first_token > one.finished


def test_a_sequence_that_finds_no_block_preempts_the_last_and_all_end() -> None:
    cluster, calls = play([session(name, 1, first=112, output=40) for name in ("one", "two")])
    assert cluster.engines[0].preemptions >= 1
    assert all(c.finished is not None for records in calls.values() for c in records)
    one, two = calls["one"][0].finished, calls["two"][0].finished
    assert one is not None
    assert two is not None
    assert one < two


def test_a_call_that_can_never_fit_is_an_error_and_its_run_goes_on() -> None:
    _, calls = play([session("one", 2, first=300)])
    assert [bool(c.error) for c in calls["one"]] == [True, True]


def test_the_host_tier_gives_back_what_the_device_lost_and_the_link_takes_its_time() -> None:
    runs = [session("one", 2, first=120, gap=20.0), session("two", 1, first=200)]
    _, without = play(runs)
    _, tiered = play([session("one", 2, first=120, gap=20.0), session("two", 1, first=200)], tier=2.0)
    assert without["one"][1].cached < 120
    restored = tiered["one"][1]
    assert restored.cached + restored.hosted == 120
    assert restored.hosted > 0
    assert restored.first_token is not None
    assert restored.first_token - restored.sent > SMALL.restore(restored.hosted)


def test_a_prefetch_makes_a_device_hit_of_a_host_hit() -> None:
    class Eager(Sticky):
        def finished(self, turn: Turn) -> None:
            if turn.run.id == "two":
                self.cluster.at(self.cluster.now + 1, lambda _: self.cluster.engines[0].prefetch(wanted))

    runs = [session("one", 2, first=120, gap=20.0), session("two", 1, first=200)]
    wanted = runs[0].calls[0].prompt
    _, calls = play(runs, Eager, tier=2.0)
    assert calls["one"][1].cached == 120
    assert calls["one"][1].hosted == 0


def test_a_prefetch_leaves_the_blocks_that_running_calls_will_need() -> None:
    class Greedy(Sticky):
        tick = 0.05

        def ticked(self) -> None:
            for run in runs:
                self.cluster.engines[0].prefetch(run.calls[0].prompt)

    runs = [session(str(i), 2, first=70, output=50, gap=1.0) for i in range(4)]
    cluster, _ = play(runs, Greedy, tier=3.0)
    assert all(record.finished is not None for record in cluster.calls)


def test_a_call_waits_for_all_or_for_as_many_as_it_needs() -> None:
    root = Piece("root", 16)
    first = Call("plan", "plan", root, 2)
    quick, slow = (
        Call(name, name, Piece(name, 16, root), output, (first,)) for name, output in (("quick", 2), ("slow", 60))
    )
    for need, expected in ((None, slow), (1, quick)):
        join = Call("join", "join", Piece("join", 16, root), 2, (quick, slow), need, 0.5)
        run = Run(f"run {need}", "fan", [first, quick, slow, join])
        _, calls = play([run], Unlimited)
        ended = calls[run.id][run.calls.index(expected)].finished
        assert ended is not None
        assert next(c.sent for c in calls[run.id] if c.index == 3) == pytest.approx(ended + 0.5)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 100), st.integers(1, 40), st.integers(1, 40), st.floats(0, 5)),
        min_size=1,
        max_size=6,
    ),
    tier=st.sampled_from([0.0, 0.5, 2.0]),
    kv=st.integers(25, 60),
    system=st.sampled_from([Sticky, Ours]),
)
def test_every_call_ends_once_and_no_block_is_lost(
    shapes: list[tuple[int, int, int, int, float]], tier: float, kv: int, system: type[System]
) -> None:
    runs = [session(str(i), n, first, more, output, gap) for i, (n, first, more, output, gap) in enumerate(shapes)]
    cluster, calls = play(runs, system, replace(SMALL, kv_tokens=kv * 8), tier)
    assert sum(map(len, calls.values())) == sum(len(run.calls) for run in runs)
    for record in cluster.calls:
        assert (record.error is None) == (record.finished is not None)
        assert record.cached + record.hosted < record.prompt
        if record.finished is not None:
            assert record.first_token is not None
            assert record.sent < record.first_token <= record.finished


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 30), st.integers(1, 30), st.floats(0, 2)),
        min_size=1,
        max_size=4,
    ),
    system=st.sampled_from([Sticky, Ours]),
)
def test_a_jump_is_the_sum_of_its_steps(shapes: list[tuple[int, int, int, int, float]], system: type[System]) -> None:
    """An engine that may only make single steps gives the same times."""
    made = [[session(str(i), *shape) for i, shape in enumerate(shapes)] for _ in range(2)]
    jumped, _ = play(made[0], system)
    affordable = Engine._affordable
    try:
        Engine._affordable = lambda self, decoding, steps: affordable(self, decoding, min(steps, 1))  # type: ignore[method-assign]
        stepped, _ = play(made[1], system)
    finally:
        Engine._affordable = affordable  # type: ignore[method-assign]
    for one, two in zip(
        sorted(jumped.calls, key=lambda c: (c.run, c.index)),
        sorted(stepped.calls, key=lambda c: (c.run, c.index)),
        strict=True,
    ):
        assert one.finished == pytest.approx(two.finished, abs=1e-6)
        assert one.first_token == pytest.approx(two.first_token, abs=1e-6)


def test_the_same_seed_gives_the_same_records() -> None:
    workload = Workload("w", [session(f"s{i}", 2 + i % 3, gap=float(i)) for i in range(6)])
    one, two = (simulate(workload, Sticky, SMALL, workers=1, load=2.0, seed=3) for _ in range(2))
    assert [(c.run, c.sent, c.finished, c.cached) for c in one.calls] == [
        (c.run, c.sent, c.finished, c.cached) for c in two.calls
    ]
    assert one.window == two.window


def test_the_window_opens_when_the_first_run_of_every_slot_has_ended_and_closes_when_a_slot_finds_none() -> None:
    workload = Workload("w", [session(f"s{i}", 4, gap=1.0 + 0.1 * i) for i in range(3)])
    played = simulate(workload, Sticky, SMALL, workers=1, load=1.3, seed=1, supply=5)
    slots = round(1.3 * SMALL.kv_tokens / workload.mean_context)
    warm = [r.finished for r in played.runs if r.warm]
    assert len(warm) == slots
    assert len(played.runs) == 6 * slots
    ends = sorted(r.finished for r in played.runs if r.finished is not None)
    assert len(ends) == len(played.runs)
    assert played.window[0] == max(end for end in warm if end is not None)
    assert played.window[1] == ends[5 * slots], "so many ends, and one more finds no run left"
    assert played.extra["starved"] == 0


def test_a_first_run_that_outlasts_the_supply_is_counted() -> None:
    class Starving(Sticky):
        """Holds one run until all else is over."""

        held: Turn | None = None
        others = 0

        def arrived(self, turn: Turn) -> None:
            if self.held is None:
                self.held = turn
            else:
                super().arrived(turn)

        def ended(self, run: Run) -> None:
            self.others += 1
            if self.others == 5 and self.held is not None:
                self.cluster.send(self.held, 0)

    workload = Workload("w", [session(f"s{i}", 1) for i in range(4)])
    played = simulate(workload, Starving, SMALL, workers=1, load=0.45, seed=1, supply=1)
    assert len(played.runs) == 6
    assert played.extra["starved"] == 2, "one was still at its first run when half of the supply had begun"
    assert sum(r.warm for r in played.runs) == 1
    longest = max(played.runs, key=lambda r: (r.finished or 0) - r.started)
    assert not longest.warm


@pytest.mark.parametrize("arrivals", ["poisson:3600", "trace"])
def test_in_an_open_loop_the_first_fifth_warms_up_and_the_window_ends_with_the_last_arrival(arrivals: str) -> None:
    runs = [session(f"s{i}", 2) for i in range(20)]
    for number, run in enumerate(runs):
        run.arrival = 3.0 * number
    played = simulate(Workload("w", runs), Sticky, SMALL, workers=1, load=0, arrivals=arrivals, seed=2, supply=1)
    started = sorted(r.started for r in played.runs)
    warm = len(started) // 5
    assert played.window == (started[warm], started[-1])
    assert sorted(r.started for r in played.runs if r.warm) == started[:warm]


def test_a_system_that_holds_a_run_for_ever_is_found_out() -> None:
    class Silent(Sticky):
        def arrived(self, turn: Turn) -> None:
            pass

    with pytest.raises(RuntimeError, match="holds 1 runs for ever"):
        play([session("one", 1)], Silent)


@pytest.mark.parametrize("system", [Ours, OursAverse])
@pytest.mark.parametrize("tier", [0.0, 2.0])
def test_under_lru_the_modelled_shadow_finds_what_the_engine_finds(system: type[System], tier: float) -> None:
    """However the policy ranks, the shadow finds what an engine finds that has LRU and the larger tier's room."""
    room = 256 * (2 if tier else 1)
    made = [[session(f"r{n}", 6, first=40, more=8, output=2, gap=0.7 + 0.1 * n) for n in range(7)] for _ in range(2)]
    ours, _ = play(made[0], system, SMALL, tier)
    assert ours.engines[0]._guard is not None
    shadow = ours.engines[0]._guard.device.shadow
    found = sum(call.cached + call.hosted for call in ours.calls) // 8
    assert shadow.hits == found
    if system is Ours and not tier:
        assert shadow.lru == found
    lru, _ = play(made[1], Ours, replace(SMALL, kv_tokens=room))
    assert shadow.lru == pytest.approx(sum(call.cached for call in lru.calls) // 8, rel=0.05)
    assert 0 < shadow.lru < shadow.asked, "some is evicted"


def test_a_sampled_shadow_of_an_engine_under_lru_makes_no_debt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SAMPLED", 250)
    runs = [session(f"r{n}", 20, first=40, more=24, gap=8.0 + 0.1 * n) for n in range(60)]
    cluster, _ = play(runs, Ours, replace(SMALL, kv_tokens=8 * 2000))
    watch = cluster.engines[0]._guard
    assert watch is not None
    shadow = watch.device.shadow
    found, prompt = (sum(one) / 8 for one in zip(*((c.cached, c.prompt) for c in cluster.calls), strict=True))
    assert 8 * shadow.asked == pytest.approx(prompt, rel=0.1)
    assert 8 * shadow.hits == pytest.approx(found, rel=0.1)
    assert shadow.lru == pytest.approx(shadow.hits, rel=0.1)
    assert watch.device.weight == 1.0


@pytest.mark.parametrize("tier", [0.0, 0.5])
def test_a_policy_that_loses_to_lru_is_not_followed(tier: float) -> None:
    def prefilled(system: type[System]) -> tuple[int, Engine]:
        cluster = Cluster(system, SMALL, 1, tier, 100.0, 0)
        cluster.at(0.0, cluster.play, session("returns", 30, first=80, more=2, output=2, gap=2.0))
        for number in range(60):
            cluster.at(1.0 + number, cluster.play, session(f"once-{number}", 1, first=100))
        cluster.run()
        return cluster.engines[0].prefilled_tokens, cluster.engines[0]

    lru, _ = prefilled(Ours)
    averse, engine = prefilled(OursAverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "Guarded", Blind)
        unguarded, _ = prefilled(OursAverse)
    assert engine._guard is not None
    assert engine._guard.device.weight == engine._guard.host.weight
    assert tier or engine._guard.device.weight < 1.0, "with a tier it has been trusted again"
    assert lru <= averse < 0.96 * unguarded


def test_all_ranks_change_when_trust_is_lost() -> None:
    changed: list[float] = []
    watch = guard.Guard(Averse(), Averse(), 100, 8, changed.append)
    prompt = Piece("p", 400)
    for number in range(3):
        watch.looked(number, prompt, 400, 0, (0, 50), float(number))
        watch.freed(number, prompt, 400, 50, number + 0.5)
    assert changed == [1.0]
    assert watch.device.weight == watch.host.weight == 0.0


def test_what_runs_leaves_no_room_in_the_modelled_shadow() -> None:
    watch = guard.Guard(Policy(), Policy(), 10, 8, lambda now: None)
    kept, other = Piece("kept", 32), Piece("other", 64)
    watch.looked(1, kept, 32, 0, (0, 4), 0.0)
    watch.freed(1, kept, 32, 4, 1.0)
    watch.looked(2, other, 0, 0, (0, 8), 2.0)
    watch.looked(3, kept, 32, 0, (8, 10), 3.0)
    assert watch.device.shadow.lru == 2
