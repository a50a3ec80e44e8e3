"""Our plug-in's guard over a modelled engine: the shadow of what stock vLLM would have found, of a sample of blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from zlib import crc32

from bench.workloads.runs import Piece
from kvcache.policy import Policy
from kvcache.shadow import Guarded, Shadow

SAMPLED = 2048
"""Of larger memories every n-th block of each piece is looked at, from one on that its name says, so that there are
about so many."""

Key = tuple[Piece, int]
"""A block: the piece in which it ends, and its place in the prompt."""


class Guard:
    """Judges one policy by an LRU cache of `blocks` blocks, and has both tiers follow. Tokens are those of a prompt.

    `blocks` are those of the larger tier: under LRU it holds what the other holds, too. `changed` is called where all
    ranks have changed.
    """

    def __init__(self, device: Policy, host: Policy, blocks: int, block: int, changed: Callable[[float], None]) -> None:
        self._every, self._block, self._changed = -(-blocks // SAMPLED), block, changed
        shadow = Shadow(blocks // self._every)
        self.device, self.host = Guarded(device, shadow), Guarded(host, shadow)

    def looked(self, step: Hashable, prompt: Piece, most: int, found: int, used: tuple[int, int], now: float) -> None:
        """A step runs: of at most `most` tokens it found the first so many. `used`: blocks in use before and after."""
        keys = self._keys(prompt, most)
        hits = sum((place + 1) * self._block <= found for _, place in keys)
        before, after = (blocks // self._every for blocks in used)
        self.device.looked(step, keys, hits, before, after - before)
        self._judge(now)

    def freed(self, step: Hashable, line: Piece, tokens: int, used: int, now: float) -> None:
        """A step frees its blocks, of which the first so many tokens of a line are computed. `used` until now."""
        self.device.freed(step, self._keys(line, tokens), used // self._every)
        self._judge(now)

    def _judge(self, now: float) -> None:
        if self.device.judged():
            self.host.weight = self.device.weight
            self._changed(now)

    def _keys(self, line: Piece, tokens: int) -> list[Key]:
        """The sampled blocks of a line's first tokens."""
        keys: list[Key] = []
        at: Piece | None = line
        while at is not None:
            first, end = at.start // self._block, min(at.end, tokens) // self._block
            first += (crc32(at.name.encode()) - first) % self._every
            keys += [(at, place) for place in reversed(range(first, end, self._every))]
            at = at.parent
        return keys[::-1]
