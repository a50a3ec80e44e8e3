"""How much of a step a long prefill may take, so that a short one passes it."""

from __future__ import annotations

from collections.abc import Sequence

SHORT = 0.5  # of a step's tokens, that a prefill may have left and count as short


def longest(budget: int, decoding: int, left: Sequence[int], coming: Sequence[int] = ()) -> int:
    """The most tokens that one prefill may take of a step of `budget` tokens; `budget` where it may take all there are.

    `decoding` of them go to requests that decode; `left` tokens are still to be computed of each prefill that runs, and
    `coming` of those which may join them. An engine serves prefills in the order in which they began, so
    that a turn with a few hundred new tokens waits behind a context of a hundred thousand. Long ones leave room for
    what short ones need, at most for what is short of a step. Among long ones, or short ones, nothing changes.
    """
    short = int(SHORT * budget)
    long = sum(one > short for one in left)
    needed = sum(one for one in (*left, *coming) if one <= short)
    if not long or not needed:
        return budget
    return max(1, max(budget - short, budget - decoding - needed) // long)
