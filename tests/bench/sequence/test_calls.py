"""Calls come when they are due, and a piece of prompt is always the same tokens."""

from __future__ import annotations

from bench.sequence.calls import Tokens, order
from bench.workloads.runs import Call, Piece, Run, Workload


def run(name: str, gaps: tuple[float, ...]) -> Run:
    made: list[Call] = []
    for number, gap in enumerate(gaps):
        made.append(Call("main", "agent", Piece(f"{name}/{number}", 10), 5, tuple(made[-1:]), gap=gap))
    return Run(name, "program", made)


def played(runs: list[Run], live: int, seconds: float) -> list[tuple[str, int, float]]:
    calls, seen, now = order(Workload("w", runs), live, len(runs)), [], 0.0
    try:
        due, of, call = next(calls)
        while True:
            now = max(now, due)
            seen.append((of.id, of.calls.index(call), now))
            now += seconds
            due, of, call = calls.send(now)
    except StopIteration:
        return seen


def test_one_run_at_a_time_waits_for_its_own_gaps() -> None:
    assert played([run("a", (0.0, 5.0)), run("b", (0.0,))], 1, 1.0) == [("a", 0, 0.0), ("a", 1, 6.0), ("b", 0, 7.0)]


def test_of_several_live_runs_the_one_that_is_due_first_goes_first() -> None:
    seen = played([run("a", (0.0, 50.0)), run("b", (0.0, 2.0)), run("c", (0.0,))], 2, 1.0)
    assert [(name, number) for name, number, _ in seen] == [("a", 0), ("b", 0), ("b", 1), ("c", 0), ("a", 1)]


def test_an_or_join_does_not_wait_for_all() -> None:
    first, late = Call("x", "x", Piece("x", 1), 1), Call("y", "y", Piece("y", 1), 1, gap=100.0)
    join = Call("z", "z", Piece("z", 1), 1, (first, late), need=1)
    seen = played([Run("r", "p", [first, late, join])], 1, 1.0)
    assert [number for _, number, _ in seen] == [0, 2, 1]


def test_tokens_are_of_the_pieces_names_and_an_answer_is_what_was_generated() -> None:
    one, two = Tokens(1000), Tokens(1000)
    system = Piece("system", 8)
    answer = Piece("answer", 4, system)
    assert one.prompt(system) == two.prompt(system)
    assert len(one.prompt(answer)) == 12
    two.answered(answer, [5, 6, 7])
    assert two.prompt(answer)[:11] == [*one.prompt(system), 5, 6, 7]
    assert len(two.prompt(answer)) == 12
