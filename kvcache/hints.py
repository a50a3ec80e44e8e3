"""What the core tells an engine of its owners, in the shape of vLLM's `kv_hints` envelope, and what the engine answers.

A message is `{protocol_version: 1, message_id, actions: [{action_id, action_type, action_version: 1, payload}]}`; its
actions may also be the JSON of that list as bytes, which is read fastest. Names are owners, never requests. Times are
spans in seconds as of the message, since clocks differ. Advice only: whatever is in it, nothing fails, blocks or grows
without bound.

`kv.retain`      {owner, idle, next_use | index{first, last, values}, seconds_per_token, leased, hold, reuse}; `values`
                 are little-endian float32 in base64 (`kvcache.curve`)
`weft.retain`    the same of many owners, by columns, which a message of the core has: {owners, idle, leased, next_use |
                 index{first, last, values}, hold, reuse}, lists of equal length; `values` those of all in one
`kv.release`     {owner}
`kv.prefetch`    {owner, within}
`weft.priority`  {owner, priority}: of its steps that wait, the lowest first

Each action, or each owner of a `weft.retain`, is answered `accepted`, `clipped` (a figure was out of range, or more
were sent than are read), `rejected` (no such owner here, not understood, sent before) or `unsupported`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from msgspec import UNSET, DecodeError, Meta, Struct, UnsetType, ValidationError, convert
from msgspec.json import Decoder

from kvcache.curve import LogCurve
from kvcache.keeper import Keeper
from kvcache.policy import Hint

ACCEPTED, CLIPPED, REJECTED, UNSUPPORTED = "accepted", "clipped", "rejected", "unsupported"

VERSION = 1
MOST_ACTIONS = 1024  # or owners; some times what the core sends at once
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
_ONE_DONE = (DONE,)
Owner = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]
Span = Annotated[float, Meta(ge=0.0, le=LONGEST)]
Cost = Annotated[float, Meta(ge=0.0, le=DEAREST)]
Chance = Annotated[float, Meta(ge=0.0, le=1.0)]
Place = Annotated[float, Meta(ge=-FARTHEST, le=FARTHEST)]


class _Retained(Struct, gc=False):
    owner: Owner
    next_use: Span | UnsetType = UNSET
    index: LogCurve | UnsetType = UNSET
    idle: Span = 0.0
    seconds_per_token: Cost = 1.0
    hold: Span | UnsetType = UNSET
    reuse: Chance | UnsetType = UNSET
    leased: Any = False


class _Indices(Struct, gc=False):
    first: float
    last: float
    values: bytes

    def curves(self, number: int) -> list[LogCurve]:
        """One for each of so many owners. ValueError where they are none."""
        first, last, values = self.first, self.last, self.values
        size, rest = divmod(len(values), number)
        if rest:
            raise ValueError("not as many values for each")
        LogCurve(first, last, values[:size]).check()
        return [LogCurve(first, last, values[at : at + size]) for at in range(0, len(values), size)]


class _Foretold(Struct, gc=False):
    owners: Annotated[list[Owner], Meta(min_length=1, max_length=MOST_ACTIONS)]
    idle: list[Span]
    leased: list[bool]
    next_use: list[Span] | UnsetType = UNSET
    index: _Indices | UnsetType = UNSET
    hold: list[Span] | UnsetType = UNSET
    reuse: list[Chance] | UnsetType = UNSET

    def hints(self, now: float) -> list[Hint]:
        """One for each owner. ValueError where a list is longer or shorter."""
        number = len(self.owners)
        nothing: list[None] = [None] * number
        curves = nothing if self.index is UNSET else self.index.curves(number)
        uses = nothing if self.next_use is UNSET or curves is not nothing else [now + ahead for ahead in self.next_use]
        holds = nothing if self.hold is UNSET else self.hold
        reuses = nothing if self.reuse is UNSET else self.reuse
        columns = zip(self.idle, curves, uses, holds, reuses, self.leased, strict=True)
        hints = [
            Hint(now - idle, curve, None, next_use, hold, reuse, 1.0, leased)
            for idle, curve, next_use, hold, reuse, leased in columns
        ]
        if len(hints) != number:
            raise ValueError("as many idle times as owners")
        return hints


class _Released(Struct, gc=False):
    owner: Owner


class _Fetched(Struct, gc=False):
    owner: Owner
    within: Span = LONGEST


class _Placed(Struct, gc=False):
    owner: Owner
    priority: Place


_RANGES: dict[str, tuple[float, float]] = {
    "next_use": (0.0, LONGEST), "idle": (0.0, LONGEST), "hold": (0.0, LONGEST), "within": (0.0, LONGEST),
    "seconds_per_token": (0.0, DEAREST), "reuse": (0.0, 1.0), "priority": (-FARTHEST, FARTHEST),
}  # fmt: skip


class _Action(Struct, tag_field="action_type", kw_only=True, gc=False):
    action_version: Literal[1]
    action_id: Any = None


class _Retain(_Action, tag="kv.retain", kw_only=True, gc=False):
    payload: _Retained


class _Foretell(_Action, tag="weft.retain", kw_only=True, gc=False):
    payload: _Foretold


class _Release(_Action, tag="kv.release", kw_only=True, gc=False):
    payload: _Released


class _Prefetch(_Action, tag="kv.prefetch", kw_only=True, gc=False):
    payload: _Fetched


class _Priority(_Action, tag="weft.priority", kw_only=True, gc=False):
    payload: _Placed


Action = _Retain | _Foretell | _Release | _Prefetch | _Priority
TYPES = tuple(kind.__struct_config__.tag for kind in get_args(Action))
_ACTIONS, _ANYTHING = Decoder(list[Action]), Decoder(list[Any])


class _Clipped(NamedTuple):
    """An action of which a figure was out of range and is the nearest in it."""

    action: Action


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
            _Retain: self._retain,
            _Foretell: self._foretell,
            _Release: self._release,
            _Prefetch: self._fetch,
            _Priority: self._priority,
        }

    def handle(self, message: object, now: float) -> list[Answer]:
        """Carry out a message; an answer for each action, `DONE` where it was accepted, or one for the whole."""
        if not isinstance(message, dict) or not isinstance(message.get("actions"), list | bytes):
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
        try:
            actions = _read(message["actions"])
        except (DecodeError, UnicodeError, RecursionError):
            return [{"status": REJECTED, "reason": "actions are no JSON"}]
        answers: list[Answer] = []
        for place, action in enumerate(actions):
            if len(answers) + _owners(action) > MOST_ACTIONS:
                answers.append({"status": CLIPPED, "reason": f"{len(actions) - place} actions were not read"})
                break
            answers += self._act(action, now)
        return answers

    def _act(self, action: Action | _Clipped | Answer, now: float) -> Sequence[Answer]:
        if isinstance(action, dict):
            return (action,)
        if isinstance(action, _Clipped):
            clipped = _answer(action.action.action_id) | {"status": CLIPPED}
            return [clipped if one is DONE else one for one in self._act(action.action, now)]
        try:
            return self._does[type(action)](action.payload, now) or _ONE_DONE
        except _Unfit as why:
            return (_answer(action.action_id) | why.answer,)

    def _foretell(self, said: _Foretold, now: float) -> Sequence[Answer]:
        try:
            hints = said.hints(now)
        except ValueError as why:
            raise _Unfit(REJECTED, str(why)) from None
        strangers = self._keeper.told(dict(zip(said.owners, hints, strict=True)), now)
        unknown: dict[str, Answer] = {
            owner: {"owner": owner, "status": REJECTED, "reason": STRANGER} for owner in strangers
        }
        return [unknown.get(owner, DONE) for owner in said.owners]

    def _retain(self, said: _Retained, now: float) -> None:
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

    def _release(self, said: _Released, now: float) -> None:
        self.priorities.pop(said.owner, None)
        if not self._keeper.released(said.owner, now):
            raise _Unfit(REJECTED, STRANGER)

    def _fetch(self, said: _Fetched, now: float) -> None:
        if self._prefetch is None:
            raise _Unfit(UNSUPPORTED)
        if not self._prefetch(said.owner, said.within):
            raise _Unfit(REJECTED, "nothing to fetch")

    def _priority(self, said: _Placed, now: float) -> None:
        if self._reordered is None:
            raise _Unfit(UNSUPPORTED)
        self.priorities[said.owner] = said.priority
        self.priorities.move_to_end(said.owner)
        if len(self.priorities) > MOST_PRIORITIES:
            self.priorities.popitem(last=False)
        self._reordered(said.owner)


def _read(actions: list[Any] | bytes) -> Sequence[Action | _Clipped | Answer]:
    """The actions, or the answer to one that cannot be understood. DecodeError where it is no JSON of a list."""
    try:
        read: list[Action] = _ACTIONS.decode(actions) if isinstance(actions, bytes) else convert(actions, list[Action])
        return read
    except (ValidationError, UnicodeError):
        listed = _ANYTHING.decode(actions) if isinstance(actions, bytes) else actions
        return [_read_one(action) for action in listed]


def _read_one(action: Any) -> Action | _Clipped | Answer:
    try:
        return _understood(action)
    except (ValidationError, UnicodeError):
        pass
    try:
        return _Clipped(_understood(_clipped(action)))
    except (ValidationError, UnicodeError) as why:
        if not isinstance(action, dict):
            return {"status": REJECTED, "reason": str(why)}
        answer = _answer(action.get("action_id"))
        if action.get("action_type") in TYPES and action.get("action_version") == 1:
            return answer | {"status": REJECTED, "reason": str(why)}
        return answer | {"status": UNSUPPORTED}


def _understood(action: Any) -> Action:
    read: Action = convert(action, Action)
    return read


def _clipped(action: Any) -> Any:
    """The same with each finite figure in range."""
    payload = action.get("payload") if isinstance(action, dict) else None
    if not isinstance(payload, dict):
        return action
    inside = {name: _inside(payload[name], low, high) for name, (low, high) in _RANGES.items() if name in payload}
    return action | {"payload": payload | inside}


def _inside(value: Any, low: float, high: float) -> Any:
    if isinstance(value, list):
        return [_inside(one, low, high) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and -ABSURD < value < ABSURD:
        return min(max(value, low), high)
    return value


def _owners(action: Action | _Clipped | Answer) -> int:
    """How many answers it will have."""
    if isinstance(action, _Clipped):
        action = action.action
    return len(action.payload.owners) if isinstance(action, _Foretell) else 1


def _answer(name: Any) -> Answer:
    return {"action_id": name[:LONGEST_NAME]} if isinstance(name, str) else {}
