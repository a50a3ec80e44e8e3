"""What one engine knows of the owners of its KV: their steps, their blocks in both tiers, and what was foretold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice

from kvcache.ledger import ANONYMOUS, DEVICE, Key, Ledger
from kvcache.policy import INFINITY, Hint, Policy
from kvcache.tier import Tier

MOST_STRANGERS = 4096
"""Owners without a block or a step of which something may have been told, the latest."""

PACE, BURST = 1000.0, 256
"""Owners a second of which hints are taken in, and most at once. What comes faster waits until as many may be as wait,
or `BURST`: of each owner the last word alone, of whoever has waited longest first. So taking in has a bounded share of
an engine's time."""


class Keeper:
    """The events of an engine, passed on to ledger, policy and the order of both tiers. Times in seconds.

    `device` names its blocks by number, `host` by key; `block` tokens each.
    """

    def __init__(self, policy: Policy, block: int) -> None:
        self.policy, self.block = policy, block
        self.ledger = Ledger()
        self.device: Tier[int] = Tier(policy, self.ledger, block)
        self.host: Tier[Key] = Tier(policy, self.ledger, block)
        self._leaving: dict[str, None] = {}  # released while a step of theirs waits or runs
        self._strangers: OrderedDict[str, None] = OrderedDict()
        self._told: dict[str, Mapping[str, Hint]] = {}  # the latest message that is not taken in yet, by owner
        self._may = float(BURST)  # owners of which hints may be taken in, at the time `_since`
        self._since = -INFINITY

    def began(self, owner: str, keys: Sequence[Key] | None, now: float) -> int:
        """A step waits or runs; `keys` are the full blocks of its prompt, None where nobody knows.

        Returns its number.
        """
        self._strangers.pop(owner, None)
        self._leaving.pop(owner, None)
        if owner != ANONYMOUS:
            self.hear(owner, now)
            self.policy.started(owner, now)
        step = self.ledger.began(owner, keys, now)
        self._changed(owner, now)
        return step

    def wrote(self, owner: str, role: str | None, keys: Sequence[Key], now: float, step: int | None = None) -> None:
        """A step leaves these blocks: it ends, or was preempted and waits on. `step` is its number; None: the latest.

        Where a step of the owner that began later has written before, its word stands.
        """
        self.ledger.wrote(owner, role, keys, now, step)
        for known in (owner, role):
            if known is not None and known in self.ledger:
                self._strangers.pop(known, None)

    def left(self, owner: str, tokens: int, now: float) -> None:
        """The step has ended, well or not, with so many tokens of context."""
        if owner != ANONYMOUS:
            self.hear(owner, now)
            self.policy.finished(owner, tokens, now)
        self.ledger.left(owner)
        if owner in self._leaving and not self.ledger.runs(owner):
            del self._leaving[owner]
            self.released(owner, now)
        self._changed(owner, now)
        self.sweep()

    def told(self, hints: Mapping[str, Hint], now: float) -> list[str]:
        """Something is foretold of owners; it counts now, or from a later `settle` on. `hints` change no more.

        Of those of whom nothing is known here, which it returns, it is kept for a while.
        """
        self._told.update(dict.fromkeys(hints, hints))
        self.settle(now)
        unknown, strangers = self.ledger.strangers(hints), self._strangers
        for owner in unknown:
            strangers[owner] = None
            strangers.move_to_end(owner)
        while len(strangers) > MOST_STRANGERS:
            oldest, _ = strangers.popitem(last=False)
            if oldest not in self.ledger:
                self._forget(oldest)
        return unknown

    def settle(self, now: float, at_once: bool = False) -> None:
        """Take in what was told, where the `PACE` lets it. To be called before each step of the engine.

        What an owner was told counts before its own next event in any case.
        """
        if not (waiting := self._told):
            return
        self._may = min(BURST, self._may + PACE * max(0.0, now - self._since))
        self._since = now
        number = len(waiting) if at_once else min(BURST, len(waiting))
        if number > self._may and not at_once:
            return
        self._may = max(0.0, self._may - number)
        told = {owner: waiting.pop(owner)[owner] for owner in [*islice(waiting, number)]}
        self.policy.told(told, now)
        for tier in (self.device, self.host):
            if tier:
                tier.order.all_changed(told, now)

    def hear(self, owner: str, now: float) -> None:
        """Take in what was told of this owner."""
        if (hints := self._told.pop(owner, None)) is not None:
            self.policy.told({owner: hints[owner]}, now)
            self._changed(owner, now)

    def released(self, owner: str, now: float) -> bool:
        """The owner's KV is dead; once its steps have left, if some wait or run. False where nothing is known of it."""
        if self.ledger.runs(owner):
            self._leaving[owner] = None
            return True
        known = owner in self.ledger
        self._told.pop(owner, None)
        self.policy.released(owner, now)
        self.ledger.released(owner, now)
        self._changed(owner, now)
        self.sweep()
        if not known:
            self._strangers.pop(owner, None)
            self._forget(owner)
        return known

    def rerank(self, now: float) -> None:
        """The policy has changed its mind: all free blocks are ranked anew."""
        self.settle(now, at_once=True)
        self.device.order.rerank(now)
        self.host.order.rerank(now)

    def sweep(self) -> None:
        """Forget what was told of owners that have no block any more."""
        ledger = self.ledger
        while ledger.forgotten:
            owner, _ = ledger.forgotten.popitem()
            if owner not in ledger:
                self._forget(owner)

    def held(self, owner: str) -> tuple[int, int]:
        """Tokens of an owner on the device and on the host."""
        device, host = self.ledger.held(owner)
        return device * self.block, host * self.block

    def residency(self, full: bool = False) -> dict[str, tuple[int, int]]:
        """Tokens on the device and on the host, of the owners for which that changed since the last call.

        (0, 0) of those gone; full: of all that hold any. At most `MOST_REPORTED` owners, the others at the next call.
        """
        report = self.ledger.residency(full)
        return {owner: (device * self.block, host * self.block) for owner, (device, host) in report.items()}

    def cleared(self, tier: int) -> None:
        """A tier was emptied."""
        (self.device if tier == DEVICE else self.host).clear()
        self.ledger.clear(tier)
        self.sweep()

    def _forget(self, owner: str) -> None:
        self._told.pop(owner, None)
        self.policy.forgotten(owner)

    def _changed(self, owner: str, now: float) -> None:
        if owner != ANONYMOUS:
            self.device.order.changed(owner, now)
            self.host.order.changed(owner, now)
