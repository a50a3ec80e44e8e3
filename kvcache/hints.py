"""What the core tells an engine of its owners, in the shape of vLLM's `kv_hints` envelope, and what the engine answers.

A message is `{protocol_version: 1, message_id, actions: [{action_id, action_type, action_version: 1, payload}]}`. Names
are owners, never requests. Times are spans in seconds as of the message, since clocks differ. Advice only: whatever is
in it, nothing fails, blocks or grows without bound.

`kv.retain`      {owner, idle, next_use | index{first, last, values[]}, seconds_per_token, leased, hold, reuse}
`kv.release`     {owner}
`kv.prefetch`    {owner, within}
`weft.priority`  {owner, priority}: of its steps that wait, the lowest first

Each action is answered `accepted`, `clipped` (a figure was out of range, or more were sent than are read), `rejected`
(no such owner here, not understood, sent before) or `unsupported`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from kvcache.curve import LogCurve
from kvcache.keeper import Keeper
from kvcache.ledger import ANONYMOUS
from kvcache.policy import Hint

ACCEPTED, CLIPPED, REJECTED, UNSUPPORTED = "accepted", "clipped", "rejected", "unsupported"

VERSION = 1
MOST_ACTIONS = 10_000
MOST_VALUES = 256
MOST_VALUES_IN_ALL = 65_536  # of the curves in one message
MOST_PRIORITIES = 65_536
LONGEST_NAME = 128
LONGEST = 1e7  # seconds
DEAREST = 10.0  # seconds a token
REMEMBERED = 1024  # messages

Answer = dict[str, str]
Payload = Mapping[str, Any]


class _Unfit(Exception):
    """An action that cannot be understood; why."""


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
        self._values = 0  # of curves in this message
        self._does = {
            "kv.retain": self._retain,
            "kv.release": self._release,
            "kv.prefetch": self._fetch,
            "weft.priority": self._priority,
        }

    def handle(self, message: object, now: float) -> list[Answer]:
        """Carry out a message; an answer for each of its actions that has an id, or one without for the whole."""
        if not isinstance(message, dict) or not isinstance(message.get("actions"), list):
            return [{"status": REJECTED, "reason": "no message with actions"}]
        if message.get("protocol_version") != VERSION:
            return [{"status": UNSUPPORTED, "reason": "protocol_version"}]
        name = message.get("message_id")
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            return [{"status": REJECTED, "reason": "message_id"}]
        if name in self._seen:
            return [{"status": REJECTED, "reason": "sent before"}]
        self._seen[name] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        actions = message["actions"]
        self._values = 0
        answers = [self._act(action, now) for action in actions[:MOST_ACTIONS]]
        if len(actions) > MOST_ACTIONS:
            answers.append({"status": CLIPPED, "reason": f"{len(actions) - MOST_ACTIONS} actions were not read"})
        return answers

    def _act(self, action: object, now: float) -> Answer:
        if not isinstance(action, dict):
            return {"status": REJECTED, "reason": "no action"}
        name = action.get("action_id")
        answer = {"action_id": name[:LONGEST_NAME]} if isinstance(name, str) else {}
        does = self._does.get(str(action.get("action_type")))
        if does is None or action.get("action_version") != 1:
            return answer | {"status": UNSUPPORTED}
        try:
            payload = action.get("payload")
            if not isinstance(payload, dict):
                raise _Unfit("no payload")
            answer["status"] = does(payload, now)
        except _Unfit as why:
            answer |= {"status": REJECTED, "reason": str(why)}
        return answer

    def _retain(self, payload: Payload, now: float) -> str:
        owner, clipped = _name(payload, "owner"), [False]
        idle = _number(payload, "idle", 0.0, LONGEST, clipped, 0.0)
        cost = _number(payload, "seconds_per_token", 0.0, DEAREST, clipped, 1.0)
        leased = payload.get("leased") is True
        next_use, curve = None, None
        if "index" in payload:
            curve = self._curve(payload["index"])
        elif "next_use" in payload:
            next_use = now + _number(payload, "next_use", 0.0, LONGEST, clipped)
        hold = _number(payload, "hold", 0.0, LONGEST, clipped) if "hold" in payload else None
        reuse = _number(payload, "reuse", 0.0, 1.0, clipped) if "reuse" in payload else None
        hint = Hint(
            now - idle, gap=curve, next_use=next_use, hold=hold, reuse=reuse, seconds_per_token=cost, leased=leased
        )
        if not self._keeper.told(owner, hint, now):
            raise _Unfit("no such owner")
        return CLIPPED if clipped[0] else ACCEPTED

    def _curve(self, value: object) -> LogCurve:
        if not isinstance(value, dict) or not isinstance(values := value.get("values"), list):
            raise _Unfit("index")
        if len(values) > MOST_VALUES:
            raise _Unfit(f"index: more than {MOST_VALUES} values")
        self._values += len(values)
        if self._values > MOST_VALUES_IN_ALL:
            raise _Unfit(f"index: more than {MOST_VALUES_IN_ALL} values in a message")
        kept = [_number({"value": one}, "value", 0.0, 1e9, [False]) for one in values]
        first, last = (_number(value, name, 0.0, LONGEST, [False]) for name in ("first", "last"))
        try:
            return LogCurve(first, last, kept)
        except ValueError as why:
            raise _Unfit(f"index: {why}") from None

    def _release(self, payload: Payload, now: float) -> str:
        owner = _name(payload, "owner")
        self.priorities.pop(owner, None)
        if not self._keeper.released(owner, now):
            raise _Unfit("no such owner")
        return ACCEPTED

    def _fetch(self, payload: Payload, now: float) -> str:
        owner, clipped = _name(payload, "owner"), [False]
        within = _number(payload, "within", 0.0, LONGEST, clipped, LONGEST)
        if self._prefetch is None:
            return UNSUPPORTED
        if not self._prefetch(owner, within):
            raise _Unfit("nothing to fetch")
        return CLIPPED if clipped[0] else ACCEPTED

    def _priority(self, payload: Payload, now: float) -> str:
        owner, clipped = _name(payload, "owner"), [False]
        priority = _number(payload, "priority", -1e12, 1e12, clipped)
        if self._reordered is None:
            return UNSUPPORTED
        self.priorities[owner] = priority
        self.priorities.move_to_end(owner)
        if len(self.priorities) > MOST_PRIORITIES:
            self.priorities.popitem(last=False)
        self._reordered(owner)
        return CLIPPED if clipped[0] else ACCEPTED


def _name(payload: Payload, field: str) -> str:
    value = payload.get(field)
    if not isinstance(value, str) or value == ANONYMOUS or len(value) > LONGEST_NAME:
        raise _Unfit(field)
    return value


def _number(
    payload: Payload, field: str, least: float, most: float, clipped: list[bool], default: float | None = None
) -> float:
    value = payload.get(field, default)
    if type(value) is float and least <= value <= most:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise _Unfit(field)
    if not least <= value <= most:
        clipped[0] = True
    return min(most, max(least, float(value)))
