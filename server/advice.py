"""What the core says of its owners, in the words that an engine reads (`kvcache.envelope`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvcache.curve import column
from kvcache.policy import Hint
from scheduler.actions import Advice, Prefetch, Release, Reprioritise, Retain
from scheduler.gaps import Gap

Columns = Callable[[Sequence[Hint], float], dict[str, Any]]


def actions(prefix: str, advice: Sequence[Advice], now: float) -> list[dict[str, Any]]:
    """The actions of a message, as of `now` in seconds; their names begin so.

    What is foretold comes first, so that what is fetched goes by it, and by columns, of all owners at once whose next
    use is known, or whose gap, or neither: that is what there is most of, and so it is made and read in no time.
    """
    groups: dict[Columns, list[Retain]] = {_uses: [], _gaps: [], _nothing: []}
    others = []
    for one in advice:
        if isinstance(one, Retain):
            groups[_columns(one.hint)].append(one)
        else:
            others.append(_action(one))
    made = [("weft.retain", _foretold(group, columns, now)) for columns, group in groups.items() if group] + others
    return [
        {"action_id": f"{prefix}{place}", "action_type": kind, "action_version": 1, "payload": payload}
        for place, (kind, payload) in enumerate(made)
    ]


def _action(advice: Advice) -> tuple[str, dict[str, Any]]:
    if isinstance(advice, Prefetch):
        return "kv.prefetch", {"owner": advice.owner, "within": advice.within}
    if isinstance(advice, Reprioritise):
        return "weft.priority", {"owner": advice.owner, "priority": advice.priority}
    assert isinstance(advice, Release)
    return "kv.release", {"owner": advice.owner}


def _columns(hint: Hint) -> Columns:
    """What says when its owner runs next."""
    if hint.next_use is not None:
        return _uses
    return _gaps if isinstance(hint.gap, Gap) else _nothing


def _foretold(retained: Sequence[Retain], columns: Columns, now: float) -> dict[str, Any]:
    """Clocks differ: times are sent as spans."""
    hints = [one.hint for one in retained]
    idle, leased = column([max(0.0, now - hint.since) for hint in hints]), bytes(hint.leased for hint in hints)
    return {"owners": [one.owner for one in retained], "idle": idle, "leased": leased} | columns(hints, now)


def _uses(hints: Sequence[Hint], now: float) -> dict[str, Any]:
    return {"next_use": column([max(0.0, (hint.next_use or 0.0) - now) for hint in hints])}


def _gaps(hints: Sequence[Hint], now: float) -> dict[str, Any]:
    curves = [hint.gap.curve() for hint in hints if isinstance(hint.gap, Gap)]
    values = b"".join(curve.values for curve in curves)  # all of them against the same times
    return {
        "hold": column([hint.hold or 0.0 for hint in hints]),
        "reuse": column([hint.reuse or 0.0 for hint in hints]),
        "index": {"first": curves[0].first, "last": curves[0].last, "values": values},
    }


def _nothing(hints: Sequence[Hint], now: float) -> dict[str, Any]:
    return {}
