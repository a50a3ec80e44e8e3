"""The gate: who may run where, so that what is held fits the memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from scheduler.actions import Action, Dispatch, Hold
from scheduler.events import (
    FirstToken,
    StepArrived,
    StepCancelled,
    StepFinished,
    Tick,
    Usage,
    WorkerDown,
    WorkerUp,
    WorkflowFinished,
)
from scheduler.identity import Identity
from scheduler.scheduler import Scheduler
from scheduler.workers import Worker

KV = 10_000


@dataclass
class Play:
    """Sessions `run/name` on workers of 10,000 tokens; a size is a token once the first step has ended."""

    workers: int = 1
    host: int = 0
    now: float = 0.0
    count: int = 0
    scheduler: Scheduler = field(default_factory=Scheduler)
    sent: dict[str, Dispatch] = field(default_factory=dict)
    held: dict[str, Hold] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number in range(self.workers):
            self.send(WorkerUp(f"w{number}", "pool", ("m",), "0", kv_tokens=KV, host_tokens=self.host))
        self.done(self.call("warm", 100))
        self.send(WorkflowFinished("t", "warm"))

    def send(self, event: object) -> list[Action]:
        actions = self.scheduler.handle(event, self.now)  # type: ignore[arg-type]
        for action in actions:
            if isinstance(action, Dispatch):
                self.sent[action.step] = action
                self.held.pop(action.step, None)
            elif isinstance(action, Hold):
                self.held[action.step] = action
        self.scheduler.check()
        return actions

    def call(self, session: str, tokens: int, *, flex: bool = False, role: str | None = None) -> str:
        self.count += 1
        step = f"s{self.count}"
        self.tokens[step] = tokens
        who = Identity(tenant="t", workflow=session.split("/")[0], session=session, role=role, rule="metadata")
        self.send(StepArrived(step, "m", who, size=tokens, flex=flex))
        return step

    def done(self, step: str, cached: int = 0) -> None:
        self.send(FirstToken(step))
        self.now += 0.1
        self.send(StepFinished(step, Usage(self.tokens[step], cached, 10), "tool_calls"))

    def turn(self, session: str, tokens: int, role: str | None = None) -> None:
        self.done(self.call(session, tokens, role=role))

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.send(Tick())

    def worker(self, step: str) -> str:
        return self.sent[step].decision.worker


def test_below_capacity_nobody_is_held() -> None:
    play = Play()
    for turn in range(4):
        for session in ("a", "b", "c"):
            play.turn(session, 2000 + 200 * turn)
    assert not play.held
    assert len(play.sent) == 13


def test_a_worker_of_unknown_size_holds_nobody() -> None:
    play = Play()
    play.send(WorkerUp("w0", "pool", ("m",), "0", kv_tokens=0))
    for session in "abcdefgh":
        play.call(session, 5000)
    assert not play.held


def test_what_does_not_fit_beside_running_steps_is_held_and_goes_when_there_is_room() -> None:
    play = Play()
    first, another = play.call("a", 6000), play.call("c", 2000)
    second = play.call("b", 4000)
    assert play.held.keys() == {second}
    assert "no room" in play.held[second].reason
    play.done(another)
    assert second not in play.sent, "that was not enough"
    play.done(first)
    assert second in play.sent, "computing the first anew costs less than a worker that waits for its return"
    assert play.sent[second].decision.terms["held_seconds"] == pytest.approx(0.2)


def test_a_workflow_with_a_lease_is_not_held_for_its_own_growth_nor_for_its_other_agents() -> None:
    play = Play()
    play.call("a/main", 6000)
    play.call("b", 5000)
    assert len(play.held) == 1
    for agent in ("one", "two", "three"):
        step = play.call(f"a/{agent}", 3000)
        assert step in play.sent


def test_idle_leases_are_revoked_for_who_waits_the_longest_idle_first() -> None:
    play = Play()
    for session in "abababababababab":  # both come back as a rule, after ten seconds
        play.turn(session, 4500)
        play.wait(5)
    play.wait(12)
    play.turn("b", 4500)
    book = play.scheduler.gate.books["w0"]
    assert book.room < 5500
    assert play.call("c", 5500, role="other") in play.sent  # of whose kind none has stopped
    leased = {account.workflow.id for account in book.accounts.values() if account.leased}
    assert leased == {"b", "c"}


@pytest.mark.parametrize(("memories", "price"), [(0, 1.0), (2, 2 / 3), (4, 0.5), (40, 0.5)])
def test_an_idle_lease_goes_while_its_memory_saves_less_prefill_than_the_price_for_so_much_held(
    memories: int, price: float
) -> None:
    play = Play()
    play.turn("idle", 4000)
    play.call("busy", 3000)
    gate, book = play.scheduler.gate, play.scheduler.gate.books["w0"]
    (idle,) = book.idle
    book.wanted = memories * KV
    idle.worth_until = float("inf")
    for share, goes in ((0.99, [idle]), (1.01, None)):
        idle.worth = share * price / KV  # prefill saved a second, for each token
        victims = gate._payable(book, int(book.room) + 1000, play.now)
        assert (victims and [victim for _, victim in victims]) == goes


def test_who_waits_is_let_in_when_there_is_room_for_what_the_others_will_have_grown_by_too() -> None:
    play = Play()
    for number in range(12):  # of four stops one is the last, and from each to the next 1,000 tokens come
        for turn in range(4):
            play.turn(f"run{number}", 500 + 1000 * turn)
        play.send(WorkflowFinished("t", f"run{number}"))
    running = {session: play.call(session, 3000) for session in ("a", "b", "c")}
    for step in running.values():
        play.send(FirstToken(step))
    waits = play.call("waits", 2000)
    book = play.scheduler.gate.books["w0"]
    assert book.kept == pytest.approx(1000 / 0.25, rel=0.1)
    assert f"{book.kept} kept free" in play.held[waits].reason
    for session in ("a", "b"):
        assert waits in play.held, "it fits, but not beside what is to come" if session == "b" else "it does not fit"
        play.done(running[session])
        play.send(WorkflowFinished("t", session))
    assert book.room > 0
    assert waits in play.sent


def test_who_must_compute_again_what_it_had_stands_ahead_of_who_has_not_begun() -> None:
    play = Play()
    play.turn("old", 4000)
    running = play.call("other", 9000)
    assert not play.scheduler.gate.books["w0"].idle, "the one that was idle has lost its lease"
    new, old = play.call("new", 4000), play.call("old", 4000)
    places = {step: play.scheduler.gate.held[step][0] for step in (new, old)}
    again = play.scheduler.workers["w0"].rates.recompute(4000)
    assert places[old].place == places[new].place - 3.0 * again
    play.done(running)
    assert old in play.sent
    assert new in play.held


def test_who_was_held_before_stands_ahead_by_half_of_that_but_a_minute_at_most() -> None:
    """So that waits do not gather on a few."""
    for waited, more, ahead in ((20, 0.0, 10.0), (100, 0.0, 50.0), (100, 900.0, 60.0)):
        play = Play()
        running = play.call("first", 9000)
        twice = play.call("twice", 4000)
        gate = play.scheduler.gate
        play.wait(waited)
        play.done(running)
        play.send(WorkflowFinished("t", "first"))
        play.done(twice)
        next(iter(gate.books["w0"].idle)).waits += more
        play.call("other", 9000)
        assert not gate.books["w0"].idle, "the one that was idle has lost its lease"
        new, again = play.call("new", 4000), play.call("twice", 4000)
        lost = 3.0 * play.scheduler.workers["w0"].rates.recompute(4000)
        other, hold = gate.held[new][0], gate.held[again][0]
        assert other.place - hold.place == pytest.approx(min(ahead + lost, hold.overdue - hold.since), abs=0.1)


def test_ends_are_learned_of_the_role_after_which_a_run_ends() -> None:
    play = Play()
    for number in range(40):
        for role in ("plan", "write", "check"):
            play.turn(f"run{number}", 500, role=role)
        play.send(WorkflowFinished("t", f"run{number}"))
    courses = play.scheduler.gate.habits._courses
    assert {role: (one.stopped, one.returned) for (_, role), one in courses.items() if role} == {
        "plan": (40, 40), "write": (40, 40), "check": (40, 0),
    }  # fmt: skip
    assert courses["t", "check"].ends > 0.9
    assert courses["t", "plan"].ends == 1 / 8


def test_a_run_that_was_let_in_elsewhere_has_a_course_there() -> None:
    play = Play(workers=2)
    running = [play.call(session, 9000) for session in ("a", "b")]
    waits = play.call("c", 4000)
    home = play.held[waits].worker
    for step in running:
        if play.worker(step) != home:
            play.done(step)
            play.send(WorkflowFinished("t", play.sent[step].workflow))
    play.wait(5)
    assert play.worker(waits) != home
    play.done(waits)
    play.turn("c", 4000)
    (course,) = (one for (_, role), one in play.scheduler.gate.habits._courses.items() if not role)
    assert 0 <= course.returned <= course.stopped


def test_growth_keeps_at_most_half_of_the_memory_free() -> None:
    play = Play()
    book = play.scheduler.gate.books["w0"]
    assert book.reserve(90_000.0, 0.5) == 5000
    assert book.reserve(-1.0, 0.5) == book.reserve(0.0, 0.0) == 0.0


def test_a_new_session_that_calls_twice_at_once_gains_no_place_by_it() -> None:
    play = Play()
    play.call("a", 9500)
    first, second = play.call("new", 4000), play.call("new", 4000)
    assert [play.scheduler.gate.held[step][0].place for step in (first, second)] == [play.now, play.now]


def test_runs_whose_worker_is_lost_are_not_taken_to_have_ended() -> None:
    play = Play(workers=2)
    for session in ("a", "b", "c", "d"):
        play.turn(session, 500)
    accounts = [one for book in play.scheduler.gate.books.values() for one in book.accounts.values()]
    stood = {id(one.stood): one.stood for one in accounts if one.stood is not None}
    before = sum(one.stopped for one in stood.values())
    play.send(WorkerDown("w0"))
    after = sum(one.stopped for one in stood.values())
    assert after == before - 2


def test_who_has_waited_longest_goes_first_whatever_its_size() -> None:
    play = Play()
    running = play.call("a", 9000)
    large, small = play.call("b", 8000), play.call("c", 500)
    assert play.held.keys() == {large, small}
    play.done(running)
    play.send(WorkflowFinished("t", "a"))
    assert large in play.sent


def test_a_hold_ends_at_its_deadline_even_where_there_is_no_room() -> None:
    play = Play()
    play.call("a", 9000)
    step = play.call("b", 9000)
    deadline = play.held[step].deadline
    play.wait(int(deadline - play.now) - 3)
    assert step in play.held
    play.wait(3)
    assert play.now <= deadline
    assert "deadline" in play.sent[step].decision.reason


def test_what_exceeds_the_memory_alone_is_let_in_alone() -> None:
    play = Play()
    step = play.call("a", 30_000)
    assert step in play.sent


def test_a_workflow_larger_than_the_memory_does_not_wait_for_what_there_will_never_be() -> None:
    play = Play()
    for agent in "abc":
        play.turn(f"large/{agent}", 5000)
    for number in range(8):
        play.turn(f"small{number}", 2000)
    play.wait(30)
    step = play.call("large/a", 5100)
    play.wait(5)
    assert step in play.sent, "the others are idle, and worth little"


def test_a_step_that_is_sent_again_takes_over_the_age_of_the_one_before() -> None:
    play = Play()
    running = play.call("a", 9000)
    first = play.call("b", 4000)
    play.wait(30)
    other = play.call("c", 8500)
    play.send(StepCancelled(first))
    del play.held[first]
    again = play.call("b", 4000)
    assert play.held.keys() == {other, again}
    play.done(running)
    play.send(WorkflowFinished("t", "a"))
    assert again in play.sent, "it came before the other, in its first form"
    assert play.sent[again].decision.terms["held_seconds"] > 30


def test_leaving_the_gate_frees_the_place_at_once() -> None:
    play = Play()
    play.call("a", 9000)
    step = play.call("b", 4000)
    play.send(StepCancelled(step))
    book = play.scheduler.gate.books["w0"]
    assert (book.wanted, len(book.waiting), play.scheduler.gate.held) == (0, 0, {})


def test_a_workflow_that_never_returns_fades_without_a_word_from_its_client() -> None:
    play = Play()
    for number in range(40):  # most runs end without a word after an answer: that is learned when they are forgotten
        play.turn(f"old{number}", 50)
    play.wait(4000)
    play.turn("a", 9000)
    book = play.scheduler.gate.books["w0"]
    before = book.claimed
    play.wait(600)
    assert book.claimed < before / 2
    assert play.call("b", 6000) in play.sent


def test_a_run_that_ends_without_a_word_counts_for_little_once_its_usual_gap_has_passed() -> None:
    play = Play()
    for number in range(20):  # four steps each, a second apart; nobody has been quiet for long enough to be given up
        for _ in range(4):
            play.turn(f"old{number}", 50)
            play.wait(1)
    for _ in range(2):
        play.wait(1)
        play.turn("a", 9000)
    book = play.scheduler.gate.books["w0"]
    account = next(one for one in book.accounts.values() if one.workflow.id == "a")
    before = account.claim
    assert before > 4500
    play.wait(5)
    assert account.claim < before / 4


def test_new_runs_go_to_the_worker_whose_runs_are_over() -> None:
    play = Play(workers=2)
    for _ in range(8):
        for session in ("a", "b"):
            play.turn(session, 50)
        play.wait(1)
    homes = {session: play.scheduler.graph.workflows["t", session].sessions[session] for session in "ab"}
    seats = {session: next(iter(one.seats.values()))[0] for session, one in homes.items()}
    assert seats["a"] != seats["b"]
    play.wait(8)
    play.turn("a", 50)
    play.turn("c", 50)
    assert play.worker(f"s{play.count}") == seats["b"]


def test_a_held_step_goes_to_another_worker_with_room() -> None:
    play = Play(workers=2)
    play.turn("a", 5000)
    home = play.worker(f"s{play.count}")
    other = "w1" if home == "w0" else "w0"
    play.scheduler.workers[other].draining = True
    play.call("b", 4000)
    play.call("c", 4500)
    play.scheduler.workers[other].draining = False
    step = play.call("a", 9500)
    play.wait(2)
    assert step in play.sent
    assert len({play.worker(one) for one in play.sent if one != "s1"}) == 2


def test_steps_held_at_a_worker_that_dies_go_elsewhere() -> None:
    play = Play(workers=2)
    for session in ("a", "b"):
        play.call(session, 9000)
    step = play.call("c", 9000)
    dies = play.held[step].worker
    play.send(WorkerDown(dies))
    assert play.scheduler.gate.held[step][1].worker.id != dies


def test_a_host_tier_counts_as_capacity() -> None:
    play = Play(host=20_000)
    for session in "abcd":
        play.turn(session, 5000)
    assert not play.held
    assert play.scheduler.gate.books["w0"].capacity > 20_000


def test_shared_prefixes_count_once() -> None:
    play = Play()
    play.turn("a", 6000)
    for session in "bcd":
        step = play.call(session, 6500)
        if step in play.held:
            play.wait(200)
        play.done(step, cached=6000)
    book = play.scheduler.gate.books["w0"]
    assert book.demand < 6000 + 4 * 1000


def test_a_worker_whose_size_is_not_known_lets_in_who_is_held_elsewhere() -> None:
    play = Play()
    play.call("a", 9000)
    step = play.call("b", 9000)
    assert step in play.held
    play.send(WorkerUp("w1", "pool", ("m",), "0", kv_tokens=0))
    play.wait(3)
    assert play.worker(step) == "w1"


def test_what_returns_to_a_restarted_worker_counts_there() -> None:
    play = Play()
    play.turn("a", 6000)
    play.send(WorkerDown("w0"))
    play.send(WorkerUp("w0", "pool", ("m",), "1", kv_tokens=KV))
    play.call("a", 6000)
    assert play.scheduler.gate.books["w0"].claimed >= 6000
    assert play.call("b", 9000) in play.held


def test_a_stated_deadline_stands_when_the_worker_is_lost() -> None:
    play = Play(workers=2)
    for session in ("a", "b"):
        play.call(session, 9000)
    step = play.call("c", 9000)
    stated = play.held[step]
    play.wait(int(stated.deadline - play.now) - 20)
    play.send(WorkerDown(stated.worker))
    play.wait(21)
    assert step in play.sent
    assert play.now <= stated.deadline + 1.0


def test_a_workflow_that_is_back_counts_once() -> None:
    play = Play()
    for _ in range(3):
        play.turn("a", 5500)
    book = play.scheduler.gate.books["w0"]
    (account,) = (one for one in book.accounts.values() if one.workflow.id == "a")
    account.leased = False
    book.settle(account)
    play.call("b", 3000)
    assert play.call("a", 5600) in play.sent


def test_agents_that_wait_go_when_another_of_their_run_gets_a_lease() -> None:
    play = Play()
    play.call("b", 9000)
    step = play.call("a/one", 4000)
    assert step in play.held
    who = Identity(tenant="t", workflow="a", session="a/two", rule="metadata")
    play.send(StepArrived("pinned", "m", who, pinned="w0", size=100))
    assert "leased" in play.sent[step].decision.reason


def turns(play: Play, sessions: str, rounds: int) -> list[dict[str, str]]:
    """Every session calls again a second after its last answer; where each step of a round ran."""
    flying: dict[str, str] = {}
    seen = []
    for _ in range(rounds):
        for session in sessions:
            if session not in flying:
                flying[session] = play.call(session, 2400)
        seen.append({session: play.worker(step) for session, step in flying.items() if step in play.sent})
        for session in seen[-1]:
            play.done(flying.pop(session))
        play.wait(1)
    return seen


def test_a_hot_worker_locks_nobody_in() -> None:
    # prime-rl #3255: sessions stick to the worker that they began on, thrash it, and another one idles beside it.
    play, sessions = Play(), "abcdefgh"
    assert all(len(round_) < len(sessions) for round_ in turns(play, sessions, 5)), "one worker is too small for all"
    play.send(WorkerUp("w1", "pool", ("m",), "0", kv_tokens=KV))
    turns(play, sessions, 10)
    later = turns(play, sessions, 5)
    assert all(len(round_) == len(sessions) for round_ in later), "together they are large enough, and nobody waits"
    assert all(sorted(round_.values()).count("w1") == len(sessions) // 2 for round_ in later)
    assert all(round_ == later[0] for round_ in later), "and who has moved stays"


def test_a_worker_that_is_gone_does_not_shorten_the_others_holds() -> None:
    def stated(dead: int) -> float:
        play = Play(workers=1 + dead)
        for number in range(1, 1 + dead):
            play.send(WorkerDown(f"w{number}", failed=True))
        for session in "abcdefgh":
            play.call(session, 5000)
        return max(hold.deadline for hold in play.held.values()) - play.now

    assert stated(5) == pytest.approx(stated(0))


def test_agents_that_are_asked_once_stop_counting_for_their_run() -> None:
    play = Play()
    for number in range(20):
        play.turn(f"run{number}/main", 500, role="main")
        for agent in "abc":
            play.turn(f"run{number}/{agent}", 1000, role="agent")
        play.turn(f"run{number}/main", 600, role="main")
        play.send(WorkflowFinished("t", f"run{number}"))
    book = play.scheduler.gate.books["w0"]
    play.turn("last/main", 500, role="main")
    for agent in "abc":
        play.turn(f"last/{agent}", 1000, role="agent")
    contexts = {session.id: tokens for session, tokens in book.of[next(iter(book.of))].contexts.items()}
    assert contexts["last/main"] > 500, "it is called again"
    assert sum(contexts.values()) < 1500, "the others are not"


def test_an_agent_counts_by_the_chance_that_it_is_called_again_as_the_first_runs_have_shown() -> None:
    def counted(asked: int) -> int:
        """What an agent of a fifth run counts for, where each of four others was asked so many times."""
        play = Play()
        for number, times in enumerate([asked] * 4 + [1]):
            play.send(WorkflowFinished("t", f"run{number - 1}"))
            play.turn(f"run{number}/main", 500, role="main")
            for _ in range(times):
                play.turn(f"run{number}/agent", 1000, role="agent")
            play.turn(f"run{number}/main", 600, role="main")
        (account,) = play.scheduler.gate.books["w0"].accounts.values()
        return next(tokens for session, tokens in account.contexts.items() if session.id == "run4/agent")

    assert 300 < counted(1) < 600 < 800 < counted(8)


def test_agents_that_have_only_just_begun_count_in_full() -> None:
    play = Play()
    for step in [play.call(f"run/{agent}", 200, role="agent") for agent in "abcdefghijklmnopqrst"]:
        play.done(step)
    (account,) = play.scheduler.gate.books["w0"].accounts.values()
    assert account.tokens >= 20 * 200, "none has come back yet, but none has had the time"


def test_an_agent_that_always_returns_counts_in_full_where_it_makes_several_calls_at_once() -> None:
    play = Play()
    for _ in range(10):
        for step in [play.call("run/main", 500, role="main") for _ in range(6)]:
            play.done(step)
    (account,) = play.scheduler.gate.books["w0"].accounts.values()
    assert account.tokens >= 500


def test_of_many_workers_the_few_with_room_are_found_among_small_ones_with_fewer_sessions() -> None:
    play = Play()
    step = play.scheduler.running[play.call("run", 100)]
    small = [Worker(f"small{number}", kv_tokens=KV) for number in range(40)]
    large = [Worker(f"large{number}", kv_tokens=100 * KV, placed=5) for number in range(4)]
    for worker in small:
        book = play.scheduler.gate.book(worker)
        book.demand, book.cost = 2 * KV, 100.0
    assert play.scheduler.placement.place(step, [*small, *large]).worker.startswith("large")
