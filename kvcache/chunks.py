"""How much of a step a long prefill may take, so that a short one passes it."""

from __future__ import annotations

from collections.abc import Sequence

SHORT = 0.5  # of the tokens that decoding leaves of a step


def shortest(room: int) -> int:
    """The most tokens that a prefill may have left and count as short, where decoding leaves `room` of a step."""
    return int(SHORT * room)


def longest(room: int, left: Sequence[int], coming: Sequence[int]) -> int:
    """The most tokens that one prefill may take of a step of which decoding leaves `room`, where short ones come first.

    `left` tokens are still to be computed of each that runs, and `coming` of those which may join them. An engine
    serves prefills in the order in which they began, so that a turn with a few hundred new tokens waits behind a
    context of a hundred thousand. Long ones leave what is needed for short ones to join. All short ones together are
    given half, no matter how many come; where they have that already, nobody else is let in.
    """
    bound = shortest(room)
    long = sum(one > bound for one in left)
    running = sum(one for one in left if one <= bound)
    kept = min(sum(one for one in coming if one <= bound), bound - running)
    return max(1, (room - running - kept) // long) if long and kept > 0 else room
