from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workloads.blocks import Prompts, share
from bench.workloads.runs import Call, Run, common

BLOCK = 4


def hashed(texts: list[str]) -> list[list[int]]:
    """Chained ids of the full blocks, as the traces have them."""
    known: dict[str, int] = {}
    return [[known.setdefault(text[:end], len(known)) for end in range(BLOCK, len(text) + 1, BLOCK)] for text in texts]


def equal(one: str, two: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


texts = st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=8)


@given(texts)
def test_prompts_share_the_blocks_that_their_hashes_share(texts: list[str]) -> None:
    prompts = Prompts("p", BLOCK)
    spots = [prompts.add(ids, len(text)) for ids, text in zip(hashed(texts), texts, strict=True)]
    prompts.build()
    pieces = [prompts.piece(spot) for spot in spots]
    assert [piece.end for piece in pieces] == [len(text) for text in texts]
    for one, a in zip(pieces, texts, strict=True):
        for two, b in zip(pieces, texts, strict=True):
            assert one is two or common(one, two) == equal(a, b) // BLOCK * BLOCK


@given(texts, st.integers(1, 12), st.sampled_from([1.0, 2.0, 7.5]))
def test_an_answer_follows_its_prompt_and_is_in_the_next(texts: list[str], output: int, scale: float) -> None:
    prompts = Prompts("p", BLOCK, scale)
    spots = prompts.follow(zip(hashed(texts), map(len, texts), strict=True))
    ends = [prompts.answered(one, two, output) for one, two in pairwise(spots)]
    prompts.build()
    for (one, two), end, (before, after) in zip(pairwise(spots), ends, pairwise(texts), strict=True):
        extended = len(after) > len(before) and equal(before, after) >= len(before) // BLOCK * BLOCK
        assert end is None or extended
        answer = prompts.answer(one, end)
        if answer is not None:
            assert answer.parent is prompts.piece(one)
            assert answer in prompts.piece(two).path()
            assert answer.tokens <= prompts.scaled(output) + 1
        if scale == 1 and prompts.piece(one) is not prompts.piece(two):
            shared = common(prompts.piece(one), prompts.piece(two))
            assert shared in (equal(before, after) // BLOCK * BLOCK, len(before))
    assert [prompts.piece(spot).end for spot in spots] == [max(1, round(len(text) / scale)) for text in texts]


def test_the_answer_is_what_the_next_prompt_goes_on_with() -> None:
    prompts = Prompts("p", BLOCK)
    first, second = prompts.follow([([0], 6), ([0, 1, 2, 3], 17)])
    end = prompts.answered(first, second, 5)
    prompts.build()
    answer = prompts.answer(first, end)
    assert answer is not None
    assert (answer.start, answer.tokens, answer.speaker) == (6, 5, "assistant")
    assert [piece.tokens for piece in prompts.piece(second).path()] == [6, 5, 6]


def test_a_repeated_prompt_that_goes_on_differently_has_its_own_answer() -> None:
    prompts = Prompts("p", BLOCK)
    first, second = prompts.follow([([0], 6), ([0, 1, 2], 12)])
    again, third = prompts.follow([([0], 6), ([0, 8, 9], 13)])
    ends = [prompts.answered(first, second, 3), prompts.answered(again, third, 4)]
    same = prompts.follow([([0, 1, 2], 12), ([0, 1, 2, 3], 18)])
    other = prompts.add([0, 1, 2, 7], 17, same[0])
    ends += [prompts.answered(same[0], same[1], 5), prompts.answered(same[0], other, 4)]
    prompts.build()
    told = [prompts.answer(*pair) for pair in zip([first, again, same[0], same[0]], ends, strict=True)]
    for answer, tokens, following in zip(told, (3, 4, 5, 4), (second, third, same[1], other), strict=True):
        assert answer is not None
        assert answer.tokens == tokens
        assert answer in prompts.piece(following).path()
    assert len(set(told)) == 4


def test_hashes_that_do_not_stand_for_what_is_before_them_are_refused() -> None:
    prompts = Prompts("p", BLOCK)
    prompts.add([1, 2], 8)
    with pytest.raises(ValueError, match="two places"):
        prompts.add([2, 3], 8)


def test_what_two_runs_have_is_shared() -> None:
    prompts = Prompts("p", BLOCK)
    spots = [prompts.add([0, 1], 8), prompts.add([0, 2], 8)]
    prompts.build()
    runs = [Run(str(n), "p", [Call("s", "r", prompts.piece(spot), 1)]) for n, spot in enumerate(spots)]
    share(runs)
    assert [[piece.shared for piece in run.calls[0].prompt.path()] for run in runs] == [[True, False]] * 2
