"""What a clairvoyant cache would have had of the blocks that calls asked for, one call after another."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import takewhile

Asked = tuple[Sequence[int], Sequence[int]]
"""The blocks that a call looks for, in the order of its prompt, and all that it leaves, which hold at once."""

NEVER = 1 << 62


def belady(asked: Sequence[Asked], room: int) -> list[int]:
    """Blocks found by each call in a cache of `room` blocks that gives up what is asked for last (Belady, 1966).

    A block is found only behind those before it in its prompt; of equals the deepest goes first. The blocks of the call
    that runs are never given up.
    """
    uses: dict[int, deque[int]] = defaultdict(deque)
    for number, (wanted, _) in enumerate(asked):
        for block in wanted:
            uses[block].append(number)
    cache: dict[int, int] = {}  # its depth in its prompt
    found = []
    for wanted, left in asked:
        found.append(sum(1 for _ in takewhile(cache.__contains__, wanted)))
        for block in wanted:
            uses[block].popleft()
        mine = set(left)
        cache |= {block: depth for depth, block in enumerate(left)}
        over = len(cache) - room
        if over > 0:
            others = (block for block in cache if block not in mine)
            order = sorted(others, key=lambda block: (uses[block][0] if uses[block] else NEVER, cache[block]))
            for block in order[max(0, len(order) - over) :]:
                del cache[block]
    return found


def unlimited(asked: Sequence[Asked]) -> list[int]:
    """The same in a cache without limit."""
    return belady(asked, NEVER)
