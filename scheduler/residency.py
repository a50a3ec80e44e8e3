"""Where KV lies: tokens of each owner on one worker's device and host, as its engine reports or as can be guessed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

MOST = 65_536
"""Owners of which something is known on one worker, the latest."""


class Residency:
    """The KV that one life of a worker holds.

    Until an engine reports, it is guessed: a step leaves its whole context on the device, and what was used longest ago
    goes first once that is more than the `room` in tokens (0: unknown, nothing goes).
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.reports = False
        self._tokens: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._sum = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, owner: str) -> tuple[int, int]:
        """What lies on the device and on the host."""
        return self._tokens.get(owner, (0, 0))

    def reported(self, owners: Mapping[str, Sequence[int]] | None, full: bool) -> None:
        """The engine says what has changed, or with `full` all that there is. None: nothing any more; what it said
        last is what is guessed from now on."""
        if owners is None:
            self.reports = False
            return
        if full or not self.reports:
            self.clear()
        self.reports = True
        for owner, (device, host) in owners.items():
            self._set(owner, device, host)

    def guessed(self, owner: str, tokens: int) -> None:
        """A step of the owner has ended with so long a context. Ignored where the engine reports."""
        if self.reports:
            return
        self._set(owner, tokens, 0)
        while self.room and self._sum > self.room and len(self._tokens) > 1:
            self._sum -= sum(self._tokens.popitem(last=False)[1])

    def dropped(self, owner: str) -> None:
        """The owner's KV is dead."""
        self._set(owner, 0, 0)

    def clear(self) -> None:
        """Nothing is held, as far as is known."""
        self._tokens.clear()
        self._sum = 0

    def _set(self, owner: str, device: int, host: int) -> None:
        self._sum -= sum(self._tokens.pop(owner, (0, 0)))
        if device or host:
            self._tokens[owner] = (device, host)
            self._sum += device + host
            if len(self._tokens) > MOST:
                self._sum -= sum(self._tokens.popitem(last=False)[1])
