"""The words in which the core tells an engine of its owners: the actions of vLLM's `kv_hints` envelope, and answers.

A message is `{protocol_version: 1, message_id, actions: [{action_id, action_type, action_version: 1, payload}]}`; its
actions may also be that list as bytes, in JSON or `packed`, which is read fastest. Names are owners, never requests.
Times are spans in seconds as of the message, since clocks differ. Advice only: whatever is in it, nothing fails, blocks
or grows without bound.

`kv.retain`      {owner, idle, next_use | index{first, last, values}, seconds_per_token, leased, hold, reuse}; `values`
                 are little-endian float32 in base64 (`kvcache.curve`)
`weft.retain`    the same of many owners, by columns, which a message of the core has: {owners, idle, leased, next_use |
                 index{first, last, values}, hold, reuse}; `owners` a list, `leased` a byte for each in base64, the rest
                 as `values` are, which are those of all in one; a figure out of range counts as the nearest in it, what
                 is none as 0
`kv.release`     {owner}
`kv.prefetch`    {owner, within}
`weft.priority`  {owner, priority}: of its steps that wait, the lowest first

Each action is answered `accepted`, `clipped` (a figure was out of range, or more were sent than are read), `rejected`
(no such owner here, not understood, sent before) or `unsupported`; a `weft.retain` that is understood with `accepted`
or `rejected` for each owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import isnan
from struct import unpack
from typing import Annotated, Any, Literal, NamedTuple, get_args

from msgspec import UNSET, DecodeError, Meta, Raw, Struct, UnsetType, convert, msgpack
from msgspec.json import Decoder, decode

from kvcache.curve import LogCurve
from kvcache.policy import Hint

ACCEPTED, CLIPPED, REJECTED, UNSUPPORTED = "accepted", "clipped", "rejected", "unsupported"

VERSION = 1
MOST_ACTIONS = 1024  # or owners; some times what the core sends at once
LONGEST_PACKED = 1 << 20  # bytes; some times what the core sends at once
LONGEST_NAME = 128
LONGEST = 1e7  # seconds
DEAREST = 10.0  # seconds a token
FARTHEST = 1e12  # priority
ABSURD = 1e300

Answer = dict[str, str]
DONE: Answer = {"status": ACCEPTED}
Owner = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]
Span = Annotated[float, Meta(ge=0.0, le=LONGEST)]
Cost = Annotated[float, Meta(ge=0.0, le=DEAREST)]
Chance = Annotated[float, Meta(ge=0.0, le=1.0)]
Place = Annotated[float, Meta(ge=-FARTHEST, le=FARTHEST)]
_FIGURES = {
    "next_use": Span, "idle": Span, "hold": Span, "within": Span, "seconds_per_token": Cost, "reuse": Chance,
    "priority": Place,
}  # fmt: skip
_AS_MANY = Meta(max_length=MOST_ACTIONS)


class Retained(Struct, gc=False):
    """What is foretold of an owner."""

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

    def size(self, number: int) -> int:
        """Bytes of each of so many curves. ValueError where they are none."""
        size, rest = divmod(len(self.values), number)
        if rest:
            raise ValueError("not as many values for each")
        LogCurve(self.first, self.last, self.values[:size]).check()
        return size

    def curve(self, place: int, size: int) -> LogCurve:
        """The one of the owner at this place."""
        return LogCurve(self.first, self.last, self.values[place * size : (place + 1) * size])


class Foretold(Struct, gc=False):
    """What is foretold of many owners, by columns: float32 of each, of `leased` bytes. `Rows` reads them."""

    owners: Annotated[list[Owner], Meta(min_length=1), _AS_MANY]
    idle: bytes
    leased: bytes
    next_use: bytes | UnsetType = UNSET
    index: _Indices | UnsetType = UNSET
    hold: bytes | UnsetType = UNSET
    reuse: bytes | UnsetType = UNSET


class Rows(Mapping[str, Hint]):
    """What columns say of each owner, told at `now` in seconds; of one that stands there twice, the last counts.

    A hint is made when it is looked up: where much is told, most are out of date by then. ValueError where a column is
    longer or shorter.
    """

    def __init__(self, said: Foretold, now: float) -> None:
        number, columns = len(said.owners), (said.idle, said.next_use, said.hold, said.reuse)
        if len(said.leased) != number or any(column is not UNSET and len(column) != 4 * number for column in columns):
            raise ValueError("not as many figures as owners")
        self._curve = 0 if said.index is UNSET else said.index.size(number)  # bytes of each
        self._said, self._now = said, now

    def __iter__(self) -> Iterator[str]:
        return iter(self._said.owners)

    def __len__(self) -> int:
        return len(self._said.owners)

    def __getitem__(self, owner: str) -> Hint:
        place, index = self._places[owner], self._said.index
        curve = None if index is UNSET else index.curve(place, self._curve)
        since, next_use, hold, reuse, leased = self._rows[place]
        return Hint(since, curve, None, next_use, hold, reuse, 1.0, leased)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {owner: place for place, owner in enumerate(self._said.owners)}

    @cached_property
    def _rows(self) -> list[tuple[float, float | None, float | None, float | None, bool]]:
        said, now, nothing = self._said, self._now, [None] * len(self._said.owners)
        since = [now - idle for idle in _figures(said.idle, LONGEST)]
        ahead = said.next_use if said.index is UNSET else UNSET
        uses = nothing if ahead is UNSET else [now + seconds for seconds in _figures(ahead, LONGEST)]
        holds = nothing if said.hold is UNSET else _figures(said.hold, LONGEST)
        reuses = nothing if said.reuse is UNSET else _figures(said.reuse, 1.0)
        return list(zip(since, uses, holds, reuses, map(bool, said.leased), strict=True))


def _figures(column: bytes, most: float) -> Sequence[float]:
    """The numbers of a column, each the nearest from 0 to `most`; what is none is 0."""
    figures: Sequence[float] = unpack(f"<{len(column) // 4}f", column)
    if min(figures) >= 0.0 and max(figures) <= most and not isnan(sum(figures)):
        return figures
    return [min(max(0.0, figure), most) for figure in figures]


class Released(Struct, gc=False):
    """Whose KV is dead."""

    owner: Owner


class Fetched(Struct, gc=False):
    """Whose KV is to be on the device within so many seconds."""

    owner: Owner
    within: Span = LONGEST


class Placed(Struct, gc=False):
    """Whose steps stand where."""

    owner: Owner
    priority: Place


class _Action(Struct, tag_field="action_type", kw_only=True, gc=False):
    action_version: Literal[1]
    action_id: Any = None


class Retain(_Action, tag="kv.retain", kw_only=True, gc=False):
    """Of one owner."""

    payload: Retained


class Foretell(_Action, tag="weft.retain", kw_only=True, gc=False):
    """Of many."""

    payload: Foretold


class Release(_Action, tag="kv.release", kw_only=True, gc=False):
    """The owner's KV is dead."""

    payload: Released


class Prefetch(_Action, tag="kv.prefetch", kw_only=True, gc=False):
    """The owner's KV will be needed."""

    payload: Fetched


class Priority(_Action, tag="weft.priority", kw_only=True, gc=False):
    """The order of steps that wait."""

    payload: Placed


Action = Retain | Foretell | Release | Prefetch | Priority
TYPES = tuple(kind.__struct_config__.tag for kind in get_args(Action))
Actions = Annotated[list[Action], _AS_MANY]
_ALL, _PACKED, _EACH, _ONE = Decoder(Actions), msgpack.Decoder(Actions), Decoder(list[Raw]), Decoder(Action)
_MSGPACK = b"\x80"  # and above: no JSON begins so, and each list in MessagePack does
BROKEN = (DecodeError, UnicodeError, RecursionError)


class Clipped(NamedTuple):
    """An action of which a figure was out of range and is the nearest in it."""

    action: Action


def packed(actions: bytes) -> bytes:
    """Actions in JSON as an engine reads them fastest: in MessagePack, where all of them fit, else as they are."""
    if len(actions) > LONGEST_PACKED:
        return actions
    try:
        read = _ALL.decode(actions)
        return msgpack.encode(read) if read and all(map(_is_plain, read)) else actions
    except BROKEN:
        return actions


def _is_plain(action: Action) -> bool:
    """Whether the parts of it that may be of any type are of those that the core sends: others may not be packable."""
    leased = action.payload.leased if isinstance(action, Retain) else True
    return isinstance(action.action_id, str | None) and isinstance(leased, bool)


def read(actions: list[Any] | bytes) -> tuple[Sequence[Action | Clipped | Answer], int]:
    """The actions, or the answer to one that cannot be understood, and how many more there are.

    All at once where all fit, else each alone, as many as are read at most. Raises `BROKEN` where it is no list in
    JSON, or was packed by another.
    """
    try:
        if isinstance(actions, bytes):
            return (_PACKED if actions[:1] >= _MSGPACK else _ALL).decode(actions), 0
        return convert(actions, Actions), 0
    except BROKEN:
        each = _EACH.decode(actions) if isinstance(actions, bytes) else actions
        found: list[Action | Clipped | Answer] = []
        for place, action in enumerate(each):
            if len(found) >= MOST_ACTIONS:
                return found, len(each) - place
            found.append(_read_one(action))
        return found, 0


def _read_one(action: Any) -> Action | Clipped | Answer:
    """An action that may not fit: with what is out of range clipped, or the answer to it."""
    try:
        if isinstance(action, Raw):
            return _ONE.decode(action)
        return _understood(action)
    except BROKEN as why:
        answer: Answer = {"status": REJECTED, "reason": str(why)}
    try:
        said = decode(action) if isinstance(action, Raw) else action
    except BROKEN:
        return answer
    try:
        inside = _inside(said)
        understood = _understood(inside)
        return understood if inside == said else Clipped(understood)
    except BROKEN:
        pass
    if not isinstance(said, dict):
        return answer
    if said.get("action_type") not in TYPES or said.get("action_version") != 1:
        answer = {"status": UNSUPPORTED}
    return named(said.get("action_id")) | answer


def _understood(action: Any) -> Action:
    understood: Action = convert(action, Action)
    return understood


def _inside(action: Any) -> Any:
    """The same with each finite figure in range."""
    payload = action.get("payload") if isinstance(action, dict) else None
    if not isinstance(payload, dict):
        return action
    inside = {}
    for name, value in payload.items():
        if name in _FIGURES and isinstance(value, int | float) and -ABSURD < value < ABSURD:
            meta = get_args(_FIGURES[name])[1]
            inside[name] = min(max(value, meta.ge), meta.le)
    return action | {"payload": payload | inside}


def asked_for(actions: object) -> int:
    """How many answers are asked for; of an engine that gives none."""
    try:
        found, unread = read(actions) if isinstance(actions, list | bytes) else ([], 0)
        return sum(map(size, found)) + unread
    except Exception:  # it may be what has turned our part of the engine off
        return 0


def size(action: Action | Clipped | Answer) -> int:
    """How many answers it has."""
    return len(action.payload.owners) if isinstance(action, Foretell) else 1


def named(name: Any) -> Answer:
    """The beginning of an answer to the action of that name."""
    return {"action_id": name[:LONGEST_NAME]} if isinstance(name, str) else {}
