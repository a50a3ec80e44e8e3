"""The messages of the core to an engine, and its answers.

A message is vLLM's `kv_hints` envelope (`kvcache.envelope`), maybe without actions; with `"residency": {"seen": N}`,
the number of the last answer that the asker has or -1, it asks for the residency, too. The answer:

    {"counts": {"accepted": n, "clipped": n, "rejected": n, "unsupported": n},
     "answers": [those of the actions that were not accepted, the first 1,000],
     "residency": {"number": N + 1, "full": whether it is all, "owners": {owner: [tokens on device, on host]}},
     "gauges": {name: number}}

An engine that keeps no owners leaves the residency out. Where `seen` is not the last number given out, it is all of it,
else what has changed; [0, 0] is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcache.envelope import ACCEPTED, CLIPPED, DONE, REJECTED, UNSUPPORTED, asked_for
from kvcache.hints import Hints
from kvcache.keeper import Keeper

MOST_ANSWERS = 1000
NOTHING: tuple[object, ...] = (None, [], b"[]", b"null")

Message = dict[str, Any]


def stock(message: object) -> Message:
    """What an engine answers that keeps no owners: it does not know where their KV lies."""
    counts = dict.fromkeys((ACCEPTED, CLIPPED, REJECTED, UNSUPPORTED), 0)
    counts[UNSUPPORTED] = asked_for(message.get("actions")) if isinstance(message, dict) else 0
    return {"counts": counts, "answers": [], "gauges": {}}


class Control:
    """Answers messages. `gauges` are asked for with each."""

    def __init__(self, keeper: Keeper, hints: Hints, gauges: Callable[[], dict[str, float]]) -> None:
        self._keeper, self._hints, self._gauges = keeper, hints, gauges
        self._given = -1

    def answer(self, message: object, now: float) -> Message:
        """Carry out a message, `now` in seconds."""
        said = stock(None)
        asked = message if isinstance(message, dict) else {}
        if asked is not message or asked.get("actions") not in NOTHING:
            counts = said["counts"]
            answers = self._hints.handle(message, now)
            counts[ACCEPTED] = answers.count(DONE)
            others = [one for one in answers if one != DONE] if counts[ACCEPTED] < len(answers) else []
            for one in others:
                counts[one["status"]] += 1
            said["answers"] = [{name: _sendable(value) for name, value in one.items()} for one in others[:MOST_ANSWERS]]
        if "residency" in asked:
            said["residency"] = self._residency(asked["residency"])
        said["gauges"] = self._gauges()
        return said

    def _residency(self, asked: object) -> Message:
        seen = asked.get("seen") if isinstance(asked, dict) else None
        full = self._given < 0 or seen is None or seen != self._given
        self._given += 1
        return {"number": self._given, "full": full, "owners": {
            _sendable(owner): list(tokens) for owner, tokens in self._keeper.residency(full).items()
        }}  # fmt: skip


def _sendable(text: str) -> str:
    """Half of a surrogate pair cannot be sent, and vLLM would not survive the attempt."""
    return text.encode("utf-8", "replace").decode()
