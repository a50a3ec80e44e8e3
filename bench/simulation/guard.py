"""Our plug-in's guard over a modelled engine: the shadow of what stock vLLM would have found, of a sample of blocks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from bench.workloads.runs import Piece
from kvcache.policy import Policy
from kvcache.shadow import Guarded, Shadow

SAMPLED = 2048
"""Of larger memories every n-th block of each prompt is looked at, so that there are about so many."""


class Guard:
    """Judges one policy by an LRU cache of `blocks` blocks, and has both tiers follow. Tokens are those of a prompt.

    `blocks` are those of the larger tier: under LRU it holds what the other holds, too. Each method returns whether
    all ranks have changed.
    """

    def __init__(self, device: Policy, host: Policy, blocks: int, block: int) -> None:
        self._every = max(1, blocks // SAMPLED)
        self._width = self._every * block
        shadow = Shadow(blocks // self._every)
        self.device, self.host = Guarded(device, shadow), Guarded(host, shadow)

    def looked(self, step: Hashable, prompt: Piece, most: int, found: int, used: int, now_used: int) -> bool:
        """A step runs: of at most `most` tokens it found the first so many. Blocks in use before and after that."""
        before, after = used // self._every, now_used // self._every
        self.device.looked(step, self._keys(prompt, most), found // self._width, before, after - before)
        return self._judged()

    def freed(self, step: Hashable, line: Piece, tokens: int, used: int) -> bool:
        """A step frees its blocks, of which the first so many tokens of a line are computed. `used` until now."""
        self.device.freed(step, self._keys(line, tokens), used // self._every)
        return self._judged()

    def _judged(self) -> bool:
        changed = self.device.judged()
        self.host.weight = self.device.weight
        return changed

    def _keys(self, piece: Piece | None, tokens: int) -> Sequence[Hashable]:
        """The sampled blocks of a line's first tokens: each by its piece, the one in which it ends, and its place."""
        keys: list[Hashable] = []
        while piece is not None:
            first, last = piece.start // self._width + 1, min(piece.end, tokens) // self._width
            keys += [(piece, place) for place in range(last, first - 1, -1)]
            piece = piece.parent
        return keys[::-1]
