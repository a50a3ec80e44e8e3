"""What an engine does with what it is told of owners (`kvcache.envelope`): advice only, whatever is in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import UNSET

from kvcache import envelope
from kvcache.envelope import DONE, REJECTED, UNSUPPORTED, Action, Answer, Clipped
from kvcache.keeper import Keeper
from kvcache.policy import Hint

MOST_PRIORITIES = 65_536
REMEMBERED = 1024  # messages

STRANGER = "no such owner"
_ONE_DONE = (DONE,)


class _Unfit(Exception):
    """An action that cannot be carried out, and the answer to it."""

    def __init__(self, status: str, reason: str = "") -> None:
        self.answer: Answer = {"status": status} | ({"reason": reason} if reason else {})


class Hints:
    """Carries out what messages say. `prefetch(owner, within)` and `reordered(owner)` are the engine's, where it can.

    `priorities` are those told, of the latest owners.
    """

    def __init__(
        self, keeper: Keeper,
        prefetch: Callable[[str, float], bool] | None = None,
        reordered: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.priorities: OrderedDict[str, float] = OrderedDict()
        self._keeper, self._prefetch, self._reordered = keeper, prefetch, reordered
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._does: dict[type, Callable[[Any, float], Sequence[Answer] | None]] = {
            envelope.Retain: self._retain,
            envelope.Foretell: self._foretell,
            envelope.Release: self._release,
            envelope.Prefetch: self._fetch,
            envelope.Priority: self._priority,
        }

    def handle(self, message: object, now: float) -> list[Answer]:
        """Carry out a message; an answer for each action, `DONE` where it was accepted, or one for the whole."""
        if not isinstance(message, dict) or not isinstance(message.get("actions"), list | bytes):
            return [{"status": REJECTED, "reason": "no message with actions"}]
        if message.get("protocol_version") != envelope.VERSION:
            return [{"status": UNSUPPORTED, "reason": "protocol_version"}]
        name = message.get("message_id")
        if not isinstance(name, str) or len(name) > envelope.LONGEST_NAME:
            return [{"status": REJECTED, "reason": "message_id"}]
        if name in self._seen:
            return [{"status": REJECTED, "reason": "sent before"}]
        self._seen[name] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        try:
            actions, unread = envelope.read(message["actions"])
        except envelope.BROKEN:
            return [{"status": REJECTED, "reason": "actions cannot be read"}]
        answers: list[Answer] = []
        for action in actions:
            if len(answers) + envelope.size(action) > envelope.MOST_ACTIONS:
                unread += envelope.size(action)
            else:
                answers += self._act(action, now)
        if unread:
            answers.append({"status": envelope.CLIPPED, "reason": f"{unread} more were not read"})
        return answers

    def _act(self, action: Action | Clipped | Answer, now: float) -> Sequence[Answer]:
        if isinstance(action, dict):
            return (action,)
        if isinstance(action, Clipped):
            clipped = envelope.named(action.action.action_id) | {"status": envelope.CLIPPED}
            return [clipped if one is DONE else one for one in self._act(action.action, now)]
        try:
            return self._does[type(action)](action.payload, now) or _ONE_DONE
        except _Unfit as why:
            return (envelope.named(action.action_id) | why.answer,)

    def _foretell(self, said: envelope.Foretold, now: float) -> Sequence[Answer]:
        try:
            rows = envelope.Rows(said, now)
        except ValueError as why:
            raise _Unfit(REJECTED, str(why)) from None
        strangers = self._keeper.told(rows, now)
        if not strangers:
            return _ONE_DONE * len(said.owners)
        unknown: dict[str, Answer] = {
            owner: {"owner": owner, "status": REJECTED, "reason": STRANGER} for owner in strangers
        }
        return [unknown.get(owner, DONE) for owner in said.owners]

    def _retain(self, said: envelope.Retained, now: float) -> None:
        curve, next_use, hold, reuse = said.index, said.next_use, said.hold, said.reuse
        try:
            if curve is not UNSET:
                curve.check()
        except ValueError as why:
            raise _Unfit(REJECTED, f"index: {why}") from None
        hint = Hint(
            now - said.idle,
            None if curve is UNSET else curve,
            None,
            None if next_use is UNSET or curve is not UNSET else now + next_use,
            None if hold is UNSET else hold,
            None if reuse is UNSET else reuse,
            said.seconds_per_token,
            said.leased is True,
        )
        if self._keeper.told({said.owner: hint}, now):
            raise _Unfit(REJECTED, STRANGER)

    def _release(self, said: envelope.Released, now: float) -> None:
        self.priorities.pop(said.owner, None)
        if not self._keeper.released(said.owner, now):
            raise _Unfit(REJECTED, STRANGER)

    def _fetch(self, said: envelope.Fetched, now: float) -> None:
        if self._prefetch is None:
            raise _Unfit(UNSUPPORTED)
        self._keeper.hear(said.owner, now)
        if not self._prefetch(said.owner, said.within):
            raise _Unfit(REJECTED, "nothing to fetch")

    def _priority(self, said: envelope.Placed, now: float) -> None:
        if self._reordered is None:
            raise _Unfit(UNSUPPORTED)
        self.priorities[said.owner] = said.priority
        self.priorities.move_to_end(said.owner)
        if len(self.priorities) > MOST_PRIORITIES:
            self.priorities.popitem(last=False)
        self._reordered(said.owner)
