"""Successions: a client with a fixed number of runs at once tells of an end by the next beginning."""

from __future__ import annotations

import random

import pytest

from scheduler.accounts import Account
from scheduler.events import FirstToken, StepFinished, Tick, Usage
from scheduler.prompt import Answer, ToolCall
from tests.scheduler.test_admission import Play

SLOTS = 6


def accounts(play: Play) -> dict[str, Account]:
    """The accounts of all workflows, by the name of their session."""
    books = play.scheduler.gate.books.values()
    return {session.id: one for book in books for one in book.accounts.values() for session in one.contexts}


def turn(play: Play, session: str, seconds: float = 0.5) -> None:
    play.now += seconds
    play.send(Tick())
    play.done(play.call(session, 200))


def some_turn(play: Play, rng: random.Random, live: dict[str, int]) -> None:
    """A turn of one of the live runs, which have so many left."""
    session = rng.choice(list(live))
    turn(play, session)
    live[session] -= 1
    if not live[session]:
        del live[session]


def test_who_stopped_last_when_another_begins_is_taken_to_have_ended_once_that_has_been_so() -> None:
    play, rng = Play(workers=2), random.Random(1)
    live: dict[str, int] = {}
    begun = 0
    while begun < 120:
        while len(live) < SLOTS:
            begun += 1
            live[f"run{begun}"] = rng.randint(3, 8)
            turn(play, f"run{begun}", 0.0)
        some_turn(play, rng, live)
    known = accounts(play)
    assert all(known[one].alive > 0.4 for one in live)
    ended = [known[one].alive for one in known if one not in live]
    assert all(alive < 0.3 for alive in ended[-3:])
    assert sum(book.present for book in play.scheduler.gate.books.values()) <= SLOTS + 1


def test_whether_a_run_comes_back_is_judged_by_what_others_have_shown_since() -> None:
    play = Play(workers=2)
    turn(play, "first", 0.0)
    one = accounts(play)["first"]
    believed_then = one.returns(24.0)
    for number in range(40):
        turn(play, f"busy{number % 2}")
    assert 23.0 < play.now - one.since < 25.0
    assert one.alive < 0.6 * believed_then
    assert sum(book.present for book in play.scheduler.gate.books.values()) == 2


def test_the_first_run_that_another_one_follows_is_half_believed_to_have_ended_and_that_takes_its_place() -> None:
    play = Play(workers=2)
    first = [play.call(session, 200) for session in ("a", "b", "c", "d")]
    at = {step: play.worker(step) for step in first}
    play.done(first[2])
    assert play.worker(play.call("new", 200)) == at[first[2]], "two live everywhere"
    assert accounts(play)["c"].followed
    assert accounts(play)["c"].alive == pytest.approx(0.5 * accounts(play)["c"].hoped)


def test_a_beginning_tells_nothing_where_runs_begin_by_themselves() -> None:
    play, rng = Play(workers=2), random.Random(2)
    live: dict[str, int] = {}
    for number in range(600):
        if number % 5 == 0:
            live[f"run{number}"] = 5
            turn(play, f"run{number}")
        some_turn(play, rng, live)
    known = accounts(play)
    assert all(known[one].alive > 0.5 for one in live)


def test_who_comes_back_had_not_ended_and_only_runs_of_the_same_program_tell() -> None:
    play = Play()
    turn(play, "a")
    play.call("other", 200, role="other")
    stops = accounts(play)["a"].stood
    assert stops is not None
    assert not accounts(play)["a"].followed
    play.call("b", 200)
    assert accounts(play)["a"].followed
    assert stops.followed == [0, 0], "nobody knows yet"
    turn(play, "a", 5.0)
    assert stops.followed == [1, 1]
    assert not accounts(play)["a"].followed


def test_runs_that_are_all_away_for_long_do_not_count_as_gone() -> None:
    play = Play()
    chats = [f"chat{number}" for number in range(40)]
    for _ in range(6):  # each is away for minutes, and another begins every five seconds
        chats += [f"chat{len(chats) + number}" for number in range(6)]
        for chat in chats:
            turn(play, chat, 5.0)
    known = accounts(play)
    assert any(one.followed for one in known.values())
    assert all(known[chat].returning > 0.5 for chat in chats)


def test_what_a_client_calls_a_completed_answer_with_calls_is_the_stop_that_it_is() -> None:
    play = Play()
    for number in range(40):
        step = play.call(f"run{number % 3}", 200)
        play.send(FirstToken(step))
        answer = Answer(calls=(ToolCall("c", "bash", "{}"),))
        play.send(StepFinished(step, Usage(200, 0, 10), "completed", answer))
    account = accounts(play)["run0"]
    assert account.stood is not None
    assert 0 <= account.stood.returned <= account.stood.stopped
    assert play.scheduler.gate.habits.stopped(play.scheduler.graph.get("t", "run0").steps[-1]) is account.stood
