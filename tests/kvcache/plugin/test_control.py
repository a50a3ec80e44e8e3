"""The core's messages: what is answered, and that nothing in them gets further than an answer."""

from __future__ import annotations

import json
from base64 import b64encode
from struct import pack
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.envelope import MOST_ACTIONS, TYPES
from kvcache.hints import Hints
from kvcache.keeper import Keeper
from kvcache.ledger import DEVICE
from kvcache.plugin.control import MOST_ANSWERS, Control, stock
from kvcache.retention import Retention

BLOCK = 16


class Engine:
    """A keeper and what answers for it."""

    def __init__(self) -> None:
        self.keeper, self.count = Keeper(Retention(), BLOCK), 0
        hints = Hints(self.keeper, prefetch=lambda owner, within: True, reordered=lambda owner: None)
        self.control = Control(self.keeper, hints, lambda: {"guard_weight": 1.0})

    def step(self, owner: str, blocks: int) -> None:
        number = self.keeper.began(owner, None, 0.0)
        keys = [f"{owner}/{place}".encode() for place in range(blocks)]
        self.keeper.wrote(owner, None, keys, 0.0, number)
        for key in keys:
            if not self.keeper.ledger.copies(key, DEVICE):
                self.keeper.ledger.gained(key, DEVICE, owner)
        self.keeper.left(owner, blocks * BLOCK, 0.0)

    def told(self, *actions: Any, **more: Any) -> dict[str, Any]:
        self.count += 1
        message = {"protocol_version": 1, "message_id": str(self.count), "actions": list(actions), **more}
        found: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(self.control.answer(message, 1.0)))
        return found

    def residency(self, seen: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.told(residency={"seen": seen})["residency"]
        return found


def action(name: str, kind: str, **payload: Any) -> dict[str, Any]:
    return {"action_id": name, "action_type": kind, "action_version": 1, "payload": payload}


def test_what_was_accepted_is_counted_and_only_the_rest_is_answered_one_by_one() -> None:
    engine = Engine()
    engine.step("a", 2)
    said = engine.told(
        action("1", "kv.retain", owner="a", next_use=3.0), action("2", "kv.retain", owner="a", next_use=-1.0),
        action("3", "kv.retain", owner="b", next_use=1.0), action("4", "kv.burn", owner="a"),
    )  # fmt: skip
    assert said["counts"] == {"accepted": 1, "clipped": 1, "rejected": 1, "unsupported": 1}
    assert [(one["action_id"], one["status"]) for one in said["answers"]] == [
        ("2", "clipped"), ("3", "rejected"), ("4", "unsupported"),
    ]  # fmt: skip
    assert said["gauges"] == {"guard_weight": 1.0}
    assert "residency" not in said


def test_answers_are_bounded_and_counts_are_not() -> None:
    said = Engine().told(*(action(str(number), "kv.burn") for number in range(MOST_ACTIONS)))
    assert len(said["answers"]) == MOST_ANSWERS
    assert said["counts"]["unsupported"] == MOST_ACTIONS > MOST_ANSWERS


def test_residency_is_all_at_first_then_what_changed_and_all_again_after_a_gap() -> None:
    engine = Engine()
    engine.step("a", 2)
    engine.step("b", 1)
    everything = {"a": [2 * BLOCK, 0], "b": [BLOCK, 0]}
    assert engine.residency(-1) == {"number": 0, "full": True, "owners": everything}
    assert engine.residency(0) == {"number": 1, "full": False, "owners": {}}
    engine.step("a", 3)
    engine.told(action("1", "kv.release", owner="b"))
    assert engine.residency(1) == {"number": 2, "full": False, "owners": {"a": [3 * BLOCK, 0], "b": [0, 0]}}
    for seen in (1, 7, -1, None, "2"):
        lost = engine.residency(seen)
        assert (lost["full"], lost["owners"]) == (True, {"a": [3 * BLOCK, 0]})


def test_who_asks_for_no_residency_takes_none_from_who_does() -> None:
    engine = Engine()
    assert engine.residency(-1)["number"] == 0
    engine.step("a", 2)
    engine.told(action("1", "kv.retain", owner="a", next_use=3.0))
    assert engine.residency(0) == {"number": 1, "full": False, "owners": {"a": [2 * BLOCK, 0]}}


@pytest.mark.parametrize("nothing", [[], b"[]", b"null", None])
def test_a_message_without_actions_only_asks_and_is_not_remembered(nothing: Any) -> None:
    engine = Engine()
    for _ in range(3):
        said = engine.control.answer({"message_id": "again", "actions": nothing, "residency": {"seen": -1}}, 1.0)
        assert sum(said["counts"].values()) == 0
        assert "residency" in said


def test_an_engine_that_keeps_no_owners_says_so() -> None:
    said = stock({"actions": [{}, {}], "residency": {"seen": 5}})
    assert said["counts"] == {"accepted": 0, "clipped": 0, "rejected": 0, "unsupported": 2}
    assert "residency" not in said  # nor an empty one, which would be believed
    assert stock({"actions": b"[{}, [1]]"})["counts"]["unsupported"] == 2
    columns = {"owners": ["a", "b", "c"], "idle": "AACAPwAAgD8AAIA/", "leased": "AQEB"}
    assert stock({"actions": [action("1", "weft.retain", **columns), 7]})["counts"]["unsupported"] == 4
    for broken in (b"[", b"{}", b"[" * 100_000):
        assert stock({"actions": broken}) == stock({})
    assert stock("nonsense") == stock({}) == {"counts": stock({})["counts"], "answers": [], "gauges": {}}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "a", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from([*TYPES, "?"])
payloads = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("owner", "owners", "next_use", "idle", "index", "priority", "within", "leased"), anything),
)
actions = st.fixed_dictionaries(
    {"action_version": st.just(1), "action_type": kinds},
    optional={"action_id": anything, "payload": payloads | anything},
)
messages = st.fixed_dictionaries(
    {}, optional={
        "protocol_version": st.just(1) | anything, "message_id": st.text() | anything,
        "actions": st.lists(actions | anything, max_size=4) | anything,
        "residency": st.fixed_dictionaries({"seen": anything}) | anything,
    },
)  # fmt: skip


@given(st.lists(messages | anything, min_size=1, max_size=4))
def test_whatever_is_sent_is_answered_with_what_can_be_sent(sent: list[Any]) -> None:
    engine = Engine()
    engine.step("a", 1)
    for message in sent:
        said = engine.control.answer(message, 1.0)
        assert set(said["counts"]) == {"accepted", "clipped", "rejected", "unsupported"}
        msgspec.msgpack.encode(said)
        json.dumps(said).encode()


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["a", "b", "AACAPw==", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["first", "last", "values"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def figures(figure: float, owners: list[str]) -> str:
    """A column of it."""
    return b64encode(pack("<f", figure) * len(owners)).decode()


columns = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).flatmap(lambda owners: st.fixed_dictionaries(
    {"owners": st.just(owners), "idle": st.just(figures(1.0, owners)), "leased": st.just(b64encode(bytes(len(owners))).decode())},
    optional=dict.fromkeys(("next_use", "index", "hold", "reuse"), plain | st.just(figures(0.5, owners))),
))  # fmt: skip
words = st.fixed_dictionaries(
    {"action_version": st.sampled_from([1, 1, 1, 2]), "action_type": kinds},
    optional={"action_id": plain, "payload": st.fixed_dictionaries({}, optional=dict.fromkeys(
        ("owner", "next_use", "idle", "index", "priority", "within", "leased", "reuse", "hold"), plain
    )) | columns | plain},
)  # fmt: skip


@given(st.lists(words | plain, max_size=4))
def test_actions_are_read_alike_as_a_list_and_as_bytes(told: list[Any]) -> None:
    answers = []
    for actions in (told, json.dumps(told).encode()):
        engine = Engine()
        engine.step("a", 1)
        answers.append(engine.control.answer({"protocol_version": 1, "message_id": "1", "actions": actions}, 1.0))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("broken", [b"[", b"{}", b"7", b"[" * 100_000, b'["\xff"]', b"[NaN]"])
def test_bytes_that_are_no_list_are_rejected_as_a_whole(broken: bytes) -> None:
    said = Engine().control.answer({"protocol_version": 1, "message_id": "1", "actions": broken}, 1.0)
    assert said["counts"] == {"accepted": 0, "clipped": 0, "rejected": 1, "unsupported": 0}


@pytest.mark.parametrize("name", ["\ud800", "x" * 10_000])
def test_a_name_that_cannot_be_sent_comes_back_as_one_that_can(name: str) -> None:
    said = Engine().control.answer({"protocol_version": 1, "message_id": "1", "actions": [action(name, "?")]}, 1.0)
    assert len(msgspec.msgpack.encode(said)) < 1000
