"""What the core tells an engine of its owners, in the shape of vLLM's `kv_hints` envelope, and what the engine answers.

A message is `{protocol_version: 1, message_id, actions: [{action_id, action_type, action_version: 1, payload}]}`. Names
are owners, never requests. Times are spans in seconds as of the message, since clocks differ. Advice only: whatever is
in it, nothing fails, blocks or grows without bound.

`kv.retain`      {owner, idle, next_use | index{first, last, values}, seconds_per_token, leased, hold, reuse}; `values`
                 are little-endian float32 in base64 (`kvcache.curve`)
`kv.release`     {owner}
`kv.prefetch`    {owner, within}
`weft.priority`  {owner, priority}: of its steps that wait, the lowest first

Each action is answered `accepted`, `clipped` (a figure was out of range, or more were sent than are read), `rejected`
(no such owner here, not understood, sent before) or `unsupported`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args

from msgspec import UNSET, Meta, Struct, UnsetType, ValidationError, convert

from kvcache.curve import LogCurve
from kvcache.keeper import Keeper
from kvcache.policy import Hint

ACCEPTED, CLIPPED, REJECTED, UNSUPPORTED = "accepted", "clipped", "rejected", "unsupported"

VERSION = 1
MOST_ACTIONS = 1024  # some times what the core sends at once
MOST_PRIORITIES = 65_536
LONGEST_NAME = 128
LONGEST = 1e7  # seconds
DEAREST = 10.0  # seconds a token
FARTHEST = 1e12  # priority
ABSURD = 1e300
REMEMBERED = 1024  # messages

STRANGER = "no such owner"

Answer = dict[str, str]
DONE: Answer = {"status": ACCEPTED}
Owner = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]
Figure = float | UnsetType


class _Index(Struct):
    first: float
    last: float
    values: bytes


class _Retained(Struct):
    owner: Owner
    next_use: Figure = UNSET
    index: _Index | UnsetType = UNSET
    idle: float = 0.0
    seconds_per_token: float = 1.0
    hold: Figure = UNSET
    reuse: Figure = UNSET
    leased: Any = False


class _Released(Struct):
    owner: Owner


class _Fetched(Struct):
    owner: Owner
    within: float = LONGEST


class _Placed(Struct):
    owner: Owner
    priority: float


class _Action(Struct, tag_field="action_type", kw_only=True):
    action_version: Literal[1]
    action_id: Any = None


class _Retain(_Action, tag="kv.retain", kw_only=True):
    payload: _Retained


class _Release(_Action, tag="kv.release", kw_only=True):
    payload: _Released


class _Prefetch(_Action, tag="kv.prefetch", kw_only=True):
    payload: _Fetched


class _Priority(_Action, tag="weft.priority", kw_only=True):
    payload: _Placed


Action = _Retain | _Release | _Prefetch | _Priority
TYPES = tuple(kind.__struct_config__.tag for kind in get_args(Action))


class _Unfit(Exception):
    """An action that cannot be carried out; why."""


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
        self._untold: dict[str, Hint] = {}  # of this message: of each owner the last counts
        self._does: dict[type, Callable[[Any, float], str]] = {
            _Retain: self._retain,
            _Release: self._release,
            _Prefetch: self._fetch,
            _Priority: self._priority,
        }

    def handle(self, message: object, now: float) -> list[Answer]:
        """Carry out a message; an answer for each action, `DONE` where it was accepted, or one for the whole."""
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
        answers = [self._act(action, now) for action in _read(actions[:MOST_ACTIONS])]
        self._tell(now)
        if len(actions) > MOST_ACTIONS:
            answers.append({"status": CLIPPED, "reason": f"{len(actions) - MOST_ACTIONS} actions were not read"})
        return answers

    def _act(self, action: Action | Answer, now: float) -> Answer:
        if isinstance(action, dict):
            return action
        try:
            status = self._does[type(action)](action.payload, now)
        except _Unfit as why:
            return _answer(action.action_id) | {"status": REJECTED, "reason": str(why)}
        return DONE if status is ACCEPTED else _answer(action.action_id) | {"status": status}

    def _retain(self, said: _Retained, now: float) -> str:
        owner, clipped = said.owner, [False]
        idle = _within(said.idle, 0.0, LONGEST, clipped)
        cost = _within(said.seconds_per_token, 0.0, DEAREST, clipped)
        next_use = curve = hold = reuse = None
        if said.index is not UNSET:
            curve = _curve(said.index)
        elif said.next_use is not UNSET:
            next_use = now + _within(said.next_use, 0.0, LONGEST, clipped)
        if said.hold is not UNSET:
            hold = _within(said.hold, 0.0, LONGEST, clipped)
        if said.reuse is not UNSET:
            reuse = _within(said.reuse, 0.0, 1.0, clipped)
        self._untold[owner] = Hint(now - idle, curve, None, next_use, hold, reuse, cost, said.leased is True)
        if owner not in self._keeper.ledger:
            raise _Unfit(STRANGER)
        return CLIPPED if clipped[0] else ACCEPTED

    def _release(self, said: _Released, now: float) -> str:
        self._tell(now)
        self.priorities.pop(said.owner, None)
        if not self._keeper.released(said.owner, now):
            raise _Unfit(STRANGER)
        return ACCEPTED

    def _fetch(self, said: _Fetched, now: float) -> str:
        self._tell(now)
        clipped = [False]
        within = _within(said.within, 0.0, LONGEST, clipped)
        if self._prefetch is None:
            return UNSUPPORTED
        if not self._prefetch(said.owner, within):
            raise _Unfit("nothing to fetch")
        return CLIPPED if clipped[0] else ACCEPTED

    def _priority(self, said: _Placed, now: float) -> str:
        clipped = [False]
        priority = _within(said.priority, -FARTHEST, FARTHEST, clipped)
        if self._reordered is None:
            return UNSUPPORTED
        self.priorities[said.owner] = priority
        self.priorities.move_to_end(said.owner)
        if len(self.priorities) > MOST_PRIORITIES:
            self.priorities.popitem(last=False)
        self._reordered(said.owner)
        return CLIPPED if clipped[0] else ACCEPTED

    def _tell(self, now: float) -> None:
        """What was said so far is foretold, before anything else is done."""
        if self._untold:
            self._keeper.told(self._untold, now)
            self._untold = {}


def _read(actions: list[Any]) -> Sequence[Action | Answer]:
    """The actions, or the answer to one that cannot be understood."""
    try:
        read: list[Action] = convert(actions, list[Action])
        return read
    except (ValidationError, UnicodeError):
        return [_read_one(action) for action in actions]


def _read_one(action: Any) -> Action | Answer:
    try:
        read: Action = convert(action, Action)
        return read
    except (ValidationError, UnicodeError) as why:
        if not isinstance(action, dict):
            return {"status": REJECTED, "reason": str(why)}
        answer = _answer(action.get("action_id"))
        if action.get("action_type") in TYPES and action.get("action_version") == 1:
            return answer | {"status": REJECTED, "reason": str(why)}
        return answer | {"status": UNSUPPORTED}


def _curve(index: _Index) -> LogCurve:
    try:
        return LogCurve.unpacked(index.first, index.last, index.values)
    except ValueError as why:
        raise _Unfit(f"index: {why}") from None


def _answer(name: Any) -> Answer:
    return {"action_id": name[:LONGEST_NAME]} if isinstance(name, str) else {}


def _within(value: float, least: float, most: float, clipped: list[bool]) -> float:
    """The value, or the nearest in range, and then `clipped`. `_Unfit` where it is no finite number."""
    if least <= value <= most:
        return value
    if not -ABSURD < value < ABSURD:
        raise _Unfit("no finite number")
    clipped[0] = True
    return least if value < least else most
