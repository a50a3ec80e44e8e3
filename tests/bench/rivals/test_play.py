"""The player does what the graph of a run says, and writes down what its clients saw."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.play import Player
from bench.records import Played
from bench.rivals.front import Stock
from bench.rivals.texts import Texts, calibrate
from bench.schedule import poisson, starts
from bench.simulation.profile import CPU
from bench.workloads.runs import Call, Run, Workload
from tests.bench.rivals.fake_engine import FakeEngines
from tests.bench.rivals.runs import TOOLS, call, chain, quick, workload

ROUND = 0.08  # seconds that a fake engine takes where a test looks at what came before what


async def player(engines: FakeEngines, timeout: float = 20.0) -> Player:
    front = Stock()
    await front.start(engines, workload())
    texts = await calibrate(engines.http, engines.urls[0], engines.model, 1, [chain("any", root=TOOLS)])
    return Player(engines.http, front, texts, engines.model, engines.block, timeout)


async def play(engines: FakeEngines, *runs: Run, timeout: float = 20.0) -> Played:
    """Each run once, all at once."""
    return await (await player(engines, timeout)).open(runs, [0.0] * len(runs))


def slow(engines: FakeEngines) -> None:
    for engine in engines.engines:
        engine.seconds = ROUND


async def test_a_call_waits_for_all_that_it_joins(engines: FakeEngines) -> None:
    slow(engines)
    one, two = call("a", "one"), call("b", "two")
    later = call("b", "then", (two,))
    join = call("a", "join", (one, later))
    played = await play(engines, Run("r", "join", [one, two, later, join]))
    first, second, third, last = sorted(played.calls, key=lambda record: record.index)
    assert abs(first.sent - second.sent) < ROUND / 2
    assert third.sent >= second.finished
    assert last.sent >= max(first.finished, third.finished)


async def test_a_call_that_needs_one_of_two_starts_with_the_first_and_the_other_goes_on(engines: FakeEngines) -> None:
    slow(engines)
    fast, slower = call("a", "fast"), call("b", "slow", gap=4 * ROUND)
    either = call("c", "either", (fast, slower), need=1)
    played = await play(engines, Run("r", "or", [fast, slower, either]))
    by_index = {record.index: record for record in played.calls}
    assert by_index[0].finished <= by_index[2].sent < by_index[1].finished
    assert played.runs[0].finished >= by_index[1].finished


async def test_a_gap_passes_after_what_a_call_waits_for(engines: FakeEngines) -> None:
    played = await play(engines, chain("r", calls=2, gap=0.2))
    before, after = sorted(played.calls, key=lambda record: record.sent)
    assert after.sent >= before.finished + 0.2


async def test_every_call_is_one_streamed_chat_of_fixed_length_with_a_session(engines: FakeEngines) -> None:
    await play(engines, chain("r", calls=2, root=TOOLS))
    headers, fields = engines.engines[0].received[-1]
    assert headers["x-session-id"] == "r.main"
    assert [message["role"] for message in fields["messages"]] == ["system", "user", "assistant", "user"]
    assert (fields["max_tokens"], fields["temperature"], fields["ignore_eos"]) == (2, 0, True)
    assert fields["stream"] is True
    assert fields["stream_options"] == {"include_usage": True}
    assert "seed" not in fields


async def test_the_first_token_counts_even_without_text_but_not_the_chunk_with_the_role(engines: FakeEngines) -> None:
    slow(engines)
    (record,) = (await play(engines, chain("r", calls=1))).calls
    assert record.first_token - record.sent >= ROUND * 0.9
    assert record.first_token <= record.finished
    assert record.output == 2


async def test_ideal_is_what_a_cache_without_limit_had(engines: FakeEngines) -> None:
    del engines.engines[1:]
    fork = chain("fork", calls=3, root=TOOLS)
    branch = call("side", "a question on the side")
    branch.prompt.parent, branch.after = fork.calls[1].prompt, (fork.calls[2],)
    branch.prompt.__post_init__()
    fork.calls.append(branch)
    runs = [chain("one", root=TOOLS), fork, chain("one", root=TOOLS).again("~1"), chain("alone")]
    played = await (await player(engines)).open(runs, [0.0, 0.5, 1.0, 1.5])
    assert [record.ideal for record in played.calls] == [record.cached for record in played.calls]
    assert sum(record.ideal for record in played.calls) > 0
    assert played.calls[0].ideal == 0


async def test_a_run_drawn_again_shares_only_the_shared_pieces(engines: FakeEngines) -> None:
    del engines.engines[1:]
    run = chain("r", root=TOOLS)
    played = await play(engines, run)
    again = await play(engines, run.again("~1"))
    assert played.calls[0].cached == 0
    assert again.calls[0].cached == (1 + len((TOOLS.text or "").split())) // 4 * 4


async def test_a_failed_call_is_one_error_and_is_not_sent_again_while_the_run_goes_on(engines: FakeEngines) -> None:
    bad = call("a", "poison")
    played = await play(engines, Run("r", "bad", [bad, call("a", "and then", (bad,))]))
    failed, after = played.calls
    assert failed.error is not None
    assert failed.error.startswith("500")
    assert (failed.first_token, failed.finished) == (None, None)
    assert after.error is None
    assert played.runs[0].finished is not None
    assert sum(len(engine.received) for engine in engines.engines) == 2


async def test_a_call_that_takes_too_long_fails_and_the_server_is_left(engines: FakeEngines) -> None:
    played = await play(engines, Run("r", "hangs", [call("a", "silent")]), timeout=0.3)
    assert played.calls[0].error == "no answer within 0.3 s"
    assert played.extra["timeout"] == 0.3
    await asyncio.sleep(0.1)
    assert sum(engine.flying for engine in engines.engines) == 0


async def test_a_server_that_is_not_there_is_an_error(engines: FakeEngines) -> None:
    ready = await player(engines)
    for engine in engines.engines:
        await engine.stop()
    played = await ready.open([chain("r", calls=1)], [0.0])
    assert played.calls[0].error


async def test_a_closed_loop_keeps_its_slots_full_until_the_supply_ends_and_counts_all_but_first_runs(
    engines: FakeEngines,
) -> None:
    slow(engines)
    del engines.engines[1:]  # one that sees all calls
    runs = [*workload(runs=11, calls=4).runs, chain("long", calls=20)]
    played = await (await player(engines)).closed(runs, quick(3))
    assert engines.engines[0].most == 3
    begin, end = played.window
    assert 0 < begin < end
    assert [run.run for run in played.runs if run.warm] == [run.id for run in runs[:3]]
    assert {run.run for run in played.runs if not run.warm} == {run.id for run in runs[3:]}
    assert all(run.finished is not None for run in played.runs)
    assert next(run.finished for run in played.runs if run.run == "long") > end
    assert played.extra["starved"] == 0


async def test_what_does_not_end_after_the_supply_is_cut_off(engines: FakeEngines) -> None:
    silent = [Run(f"silent{i}", "hangs", [call("a", "x"), call("b", "silent")]) for i in range(2)]
    runs = [*workload(runs=3).runs, *silent]
    ready = await player(engines, timeout=0.5)
    played = await ready.closed([*runs, chain("hours", gap=100.0)], quick(3))
    by_id = {run.run: run for run in played.runs}
    hours = by_id["hours"]
    assert (hours.finished, hours.warm) == (None, False)
    assert hours.until is not None
    assert hours.until >= played.window[1] + 0.4
    assert [call.error for call in played.calls if call.run == "hours"] == [None]


async def test_the_first_run_of_a_slot_starts_when_and_as_deep_as_it_is_said(engines: FakeEngines) -> None:
    begins = [(0.0, 0.0), (0.1, 0.3), (0.2, 0.74)]
    played = await (await player(engines)).closed(workload(runs=6, calls=8).runs, begins)
    first = {run.run: run.started for run in played.runs if run.run in ("run0", "run1", "run2")}
    assert {name: min(c.index for c in played.calls if c.run == name) for name in first} == {
        "run0": 0, "run1": 2, "run2": 5,
    }  # fmt: skip
    assert first["run1"] >= 0.1
    assert first["run2"] >= 0.2


def test_starts_are_spread_and_the_same_for_the_same_seed() -> None:
    begins = starts(3, 8, workload(), CPU)
    assert starts(3, 8, workload(), CPU) == begins
    assert starts(4, 8, workload(), CPU) != begins
    assert len(set(begins)) == 8
    assert all(delay >= 0 and 0 <= depth <= 0.75 for delay, depth in begins)


async def test_a_run_alone_takes_what_the_profile_says_where_no_answer_is_in_a_cache(engines: FakeEngines) -> None:
    one, two = chain("one", calls=9, output=40), chain("two")
    known = Player(engines.http, Stock(), Texts(1.0, 1.0, 1), engines.model, engines.block, profile=CPU)
    known._front = (await player(engines))._front
    known.reckon([one, two])
    played = await known.open([one, two], [0.0, 0.0])
    assert [run.unloaded for run in played.runs] == [CPU.unloaded(run, answers=False) for run in (one, two)]
    assert CPU.unloaded(one, answers=False) > CPU.unloaded(one)
    assert [run.unloaded for run in (await play(engines, one)).runs] == [None]


class Slow(Texts):
    """Takes its time to write a prompt."""

    def messages(self, run: Run, call: Call) -> list[dict[str, str]]:
        time.sleep(ROUND)
        return super().messages(run, call)


async def test_a_call_is_sent_when_its_text_is_written_which_its_gap_has_room_for(engines: FakeEngines) -> None:
    ready = await player(engines)
    ready._texts = Slow(1.0, 1.0, 1)
    played = await ready.open([chain("r", calls=2, gap=3 * ROUND)], [0.0])
    first, second = sorted(played.calls, key=lambda record: record.sent)
    assert first.sent >= played.runs[0].started + ROUND
    assert first.first_token - first.sent < ROUND
    assert 3 * ROUND <= second.sent - first.finished < 3.9 * ROUND


async def test_a_first_run_that_outlasts_the_supply_is_counted(engines: FakeEngines) -> None:
    starving = Run("starving", "hangs", [call("a", "x"), call("b", "y", gap=1.5)])
    runs = [starving, *workload(runs=6).runs]
    played = await (await player(engines)).closed(runs, quick(2))
    assert played.extra["starved"] == 1
    assert played.window[0] < played.window[1]
    found = {run.run: run for run in played.runs}
    assert found["starving"].warm is False
    assert found["starving"].finished > played.window[1]
    assert found["run0"].warm is True


async def test_an_open_loop_sends_runs_at_their_times_whatever_still_runs(engines: FakeEngines) -> None:
    slow(engines)
    runs = workload(runs=5, calls=2).runs
    times = [0.0, 0.05, 0.1, 0.15, 0.2]
    played = await (await player(engines)).open(runs, times)
    assert all(0 <= run.started - at < 0.1 for run, at in zip(played.runs, times, strict=True))
    assert all(run.finished is not None for run in played.runs)
    assert played.window == (0.05, 0.2)
    assert [run.warm for run in played.runs] == [True, False, False, False, False]


def test_poisson_arrivals_come_at_the_rate_and_the_same_for_the_same_seed() -> None:
    times = poisson(3600, 2000, seed=5)
    assert times == poisson(3600, 2000, seed=5)
    assert times == sorted(times)
    assert times[-1] / 2000 == pytest.approx(1.0, rel=0.1)


async def test_generated_texts_are_about_as_long_as_their_pieces_say(engines: FakeEngines) -> None:
    texts = await calibrate(engines.http, engines.urls[0], engines.model, seed=1)
    assert (texts.word, texts.message, texts.tail) == (pytest.approx(1.0), pytest.approx(1.0), 1)
    played = await play(engines, chain("r", calls=4))
    for record, one in zip(played.calls, chain("r", calls=4).calls, strict=True):
        assert record.prompt == pytest.approx(one.prompt.end + texts.tail, abs=3)  # the mark


async def test_the_seed_marks_the_runs(engines: FakeEngines) -> None:
    one, two = [await calibrate(engines.http, engines.urls[0], engines.model, seed) for seed in (1, 2)]
    run = chain("r", calls=1)
    assert one.messages(run, run.calls[0]) != two.messages(run, run.calls[0])
    assert one.messages(run, run.calls[0]) == one.messages(chain("r", calls=1), chain("r", calls=1).calls[0])


def test_a_workload_is_what_is_drawn() -> None:
    drawn = Workload("w", [chain("a")]).draw(1)
    assert [next(drawn).id for _ in range(2)] == ["a", "a~1"]
