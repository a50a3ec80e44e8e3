from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from bench.workloads.runs import Call, Piece, Run, Workload, common


@st.composite
def trees(draw: st.DrawFn) -> list[Piece]:
    pieces: list[Piece] = []
    for number in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from([None, *pieces]))
        shared = draw(st.booleans()) and (parent is None or parent.shared)
        pieces.append(Piece(str(number), draw(st.integers(0, 5)), parent, shared=shared))
    return pieces


@given(trees(), st.data())
def test_prompts_have_the_tokens_in_common_that_their_paths_begin_with(
    pieces: list[Piece], data: st.DataObject
) -> None:
    one, two = data.draw(st.sampled_from(pieces)), data.draw(st.sampled_from(pieces))
    same = [a for a, b in zip(one.path(), two.path(), strict=False) if a is b]
    assert common(one, two) == sum(piece.tokens for piece in same)
    assert one.end == sum(piece.tokens for piece in one.path())


@given(trees())
def test_a_run_played_again_has_the_same_shared_pieces_and_no_other(pieces: list[Piece]) -> None:
    calls: list[Call] = []
    for piece in pieces:
        calls.append(Call("s", "r", piece, 3, tuple(calls[-1:]), gap=1.5))
    run = Run("run", "program", calls, "tenant", hints={"template": {}})
    again = run.again("~1")
    old = {piece for call in calls for piece in call.prompt.path()}
    new = {piece for call in again.calls for piece in call.prompt.path()}
    assert old & new == {piece for piece in old if piece.shared}
    assert len({piece.name for piece in old | new}) == len(old | new)
    assert [c.prompt.end for c in again.calls] == [c.prompt.end for c in calls]
    for one in calls:
        for two in calls:
            first, second = again.calls[calls.index(one)], again.calls[calls.index(two)]
            assert common(first.prompt, second.prompt) == common(one.prompt, two.prompt)
    assert all(
        a is b for call, two in zip(again.calls, again.calls[1:], strict=False) for a, b in [(call, two.after[0])]
    )
    assert (again.id, again.tenant, again.hints) == ("run~1", "tenant", {"template": {}})


def test_runs_are_drawn_without_end_and_always_with_new_names() -> None:
    runs = [Run(str(n), "p", [Call("s", "r", Piece(str(n), 1), 1)]) for n in range(3)]
    workload = Workload("w", runs)
    drawn = list(islice(workload.draw(7), 9))
    assert len({run.id for run in drawn}) == 9
    assert {run.id for run in drawn[:3]} == {"0", "1", "2"}
    assert [run.id for run in islice(workload.draw(7), 9)] == [run.id for run in drawn]
