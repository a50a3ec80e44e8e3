"""What an engine does with what it is told, however silly."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from json import dumps
from math import isnan
from struct import pack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import envelope
from kvcache.envelope import ACCEPTED, CLIPPED, LONGEST, MOST_ACTIONS, REJECTED, TYPES, UNSUPPORTED
from kvcache.hints import Hints
from kvcache.keeper import MOST_STRANGERS, Keeper
from kvcache.ledger import DEVICE
from kvcache.policy import DEAD, KNOWN, UNKNOWN, Hint, Policy
from kvcache.retention import Retention
from kvcache.saga import Saga


def message(*actions: tuple[str, dict[str, Any]], name: str = "m1") -> dict[str, Any]:
    listed = [
        {"action_id": str(number), "action_type": kind, "action_version": 1, "payload": payload}
        for number, (kind, payload) in enumerate(actions)
    ]
    return {"protocol_version": 1, "message_id": name, "actions": listed}


def packed(*values: float) -> str:
    """As a message has them."""
    return b64encode(pack(f"<{len(values)}f", *values)).decode()


ONE = packed(1.0)


def columns(
    owners: Iterable[str], idle: Sequence[float] = (), leased: Sequence[bool] = (), **others: Sequence[float]
) -> dict[str, Any]:
    """What is foretold of owners; of those not leased that stop just now where nothing is said."""
    names = [*owners]
    marks = b64encode(bytes(leased or len(names))).decode()
    figures = {name: packed(*column) for name, column in others.items()}
    return {"owners": names, "idle": packed(*(idle or [0.0] * len(names))), "leased": marks} | figures


def holding(policy: Policy) -> Keeper:
    """One with two owners of a block each."""
    kept = Keeper(policy, 16)
    for owner in "ab":
        kept.began(owner, (), 0.0)
        kept.wrote(owner, None, (owner,), 0.0)
        kept.ledger.gained(owner, DEVICE)
        kept.left(owner, 16, 0.0)
        kept.device.put([(ord(owner), owner)], 0.0)
    return kept


@pytest.fixture
def keeper() -> Keeper:
    return holding(Retention())


def statuses(answers: list[dict[str, str]]) -> list[str]:
    return [answer["status"] for answer in answers]


def first(keeper: Keeper, now: float) -> str:
    ((_, key),) = keeper.device.take(1, now)
    return str(key)


def test_what_is_needed_sooner_is_kept_longer(keeper: Keeper) -> None:
    told = message(("kv.retain", {"owner": "a", "next_use": 5}), ("kv.retain", {"owner": "b", "next_use": 50}))
    assert statuses(Hints(keeper).handle(told, 10.0)) == [ACCEPTED, ACCEPTED]
    assert first(keeper, 11.0) == "b"


def test_a_gap_is_told_as_its_index_against_the_idle_time(keeper: Keeper) -> None:
    """After two idle seconds it falls to nothing."""
    index = {"first": 1, "last": 4, "values": packed(4, 0.01)}
    told = message(
        ("kv.retain", {"owner": "a", "index": index, "idle": 5}), ("kv.retain", {"owner": "b", "index": index})
    )
    assert statuses(Hints(keeper).handle(told, 10.0)) == [ACCEPTED, ACCEPTED]
    assert first(keeper, 11.0) == "a"


@pytest.mark.parametrize("index", [
    None, 3, {}, {"first": 1, "last": 4, "values": ""}, {"first": 4, "last": 1, "values": ONE},
    {"first": 0, "last": 1, "values": ONE}, {"first": 1, "last": 2, "values": "AAA="}, {"first": 1, "last": 2, "values": "?"},
    {"first": 1, "last": 2, "values": [1]}, {"first": 1, "last": 2, "values": packed(*[1.0] * 257)}, {"first": 1, "values": ONE},
    {"first": float("nan"), "last": 2, "values": ONE}, {"first": 1, "last": float("inf"), "values": ONE},
])  # fmt: skip
def test_what_is_no_index_is_rejected(keeper: Keeper, index: object) -> None:
    assert statuses(Hints(keeper).handle(message(("kv.retain", {"owner": "a", "index": index})), 1.0)) == [REJECTED]


def test_many_owners_are_foretold_at_once_as_each_would_be(keeper: Keeper) -> None:
    """By columns: when they run next, or the indices of their gaps, one after the other."""
    values = packed(4, 0.01), packed(0.1, 0.02)
    singly = [
        ("kv.retain", {"owner": o, "index": {"first": 1, "last": 4, "values": v}, "idle": i, "leased": o == "b", "hold": 3, "reuse": r})
        for o, v, i, r in zip("ab", values, (5, 1), (0.5, 1), strict=True)
    ] + [("kv.retain", {"owner": "c", "next_use": 7})]  # fmt: skip
    index = {"first": 1, "last": 4, "values": packed(4, 0.01, 0.1, 0.02)}
    gaps = columns("ab", idle=(5, 1), leased=(False, True), hold=(3, 3), reuse=(0.5, 1)) | {"index": index}
    at_once = [("weft.retain", gaps), ("weft.retain", columns("c", next_use=[7]))]
    hints = []
    for told in (singly, at_once):
        kept = holding(policy := Retention())
        answers = Hints(kept).handle(message(*told), 10.0)
        assert statuses(answers) == [ACCEPTED, ACCEPTED, REJECTED]
        hints.append(policy._hints)
    assert hints[0] == hints[1]
    assert hints[0].keys() == {"a", "b", "c"}
    assert answers[2] == {"owner": "c", "status": REJECTED, "reason": "no such owner"}


def test_of_an_owner_that_stands_in_a_message_twice_the_last_word_counts(keeper: Keeper) -> None:
    told = message(("weft.retain", columns("aba", next_use=(1, 5, 9))))
    assert statuses(Hints(keeper).handle(told, 1.0)) == [ACCEPTED] * 3
    assert first(keeper, 1.0) == "a"


@pytest.mark.parametrize("broken", [
    {"idle": packed(1)}, {"idle": packed(1, 2, 3)}, {"idle": "AAA="}, {"idle": "?"}, {"idle": [1, 2]}, {"idle": 3}, {"idle": None},
    {"leased": "AQ=="}, {"leased": [True, False]}, {"leased": True}, {"next_use": packed(1)}, {"next_use": packed(1, 2, 3)}, {"hold": 3},
    {"reuse": ""}, {"owners": ["a"]}, {"owners": []}, {"owners": "ab"}, {"owners": ["a", 7]}, {"owners": ["a", ""]}, {"owners": ["a", "b" * 129]},
    {"index": {"first": 1, "last": 4, "values": ""}},
    {"index": {"first": 1, "last": 4, "values": packed(1, 2, 3)}}, {"index": {"first": 4, "last": 1, "values": packed(1, 2)}},
    {"index": {"first": 1, "last": 4, "values": packed(*[1.0] * 514)}},
])  # fmt: skip
def test_columns_that_do_not_fit_together_are_rejected_whole(keeper: Keeper, broken: dict[str, Any]) -> None:
    told = message(("weft.retain", columns("ab", idle=(1, 2), leased=(True, False)) | broken))
    assert statuses(Hints(keeper).handle(told, 1.0)) == [REJECTED]
    assert first(keeper, 2.0) == "a", "as if nothing had been said"


def test_more_owners_than_a_message_may_have_are_rejected_whole(keeper: Keeper) -> None:
    told = message(("weft.retain", columns([f"o{number}" for number in range(MOST_ACTIONS + 1)])))
    assert statuses(Hints(keeper).handle(told, 1.0)) == [REJECTED]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("figure", "counts"), [(-5, 0), (float("nan"), 0), (float("inf"), LONGEST), (1e30, LONGEST)])
def test_what_is_out_of_range_in_a_column_counts_as_the_nearest_in_it(
    keeper: Keeper, figure: float, counts: float, first: bool
) -> None:
    figures, owners = ((figure, 0.5), "ab") if first else ((0.5, figure), "ba")
    told = message(("weft.retain", columns(owners, idle=figures, next_use=figures, hold=figures, reuse=figures)))
    assert statuses(Hints(keeper).handle(told, 1.0)) == [ACCEPTED] * 2
    assert isinstance(keeper.policy, Retention)
    hint = Hint(1.0 - counts, next_use=1.0 + counts, hold=counts, reuse=min(counts, 1.0))
    assert keeper.policy._hints == {"a": hint, "b": Hint(0.5, next_use=1.5, hold=0.5, reuse=0.5)}


@pytest.mark.parametrize("broken", [
    b'{"action_id": 1e400}', b"[" * 600 + b"]" * 600, b"1" * 5000, b'"\xff"',
    b'{"action_version": 1, "action_type": "kv.retain", "payload": {"owner": "a", "idle": ' + b"[" * 600 + b"]" * 600 + b"}}",
])  # fmt: skip
def test_an_action_that_cannot_be_read_at_all_costs_no_other(keeper: Keeper, broken: bytes) -> None:
    release = b'{"action_id": "1", "action_version": 1, "action_type": "kv.release", "payload": {"owner": "b"}}'
    answers = Hints(keeper).handle(message() | {"actions": b"[" + broken + b"," + release + b"]"}, 1.0)
    assert answers[0]["status"] in (REJECTED, UNSUPPORTED)
    assert answers[1] == {"status": ACCEPTED}
    assert first(keeper, 2.0) == "b"


def test_owners_count_as_actions_do_where_more_are_sent_than_are_read(keeper: Keeper) -> None:
    many = [f"o{number}" for number in range(700)]
    told = message(*[("weft.retain", columns(many))] * 2, ("kv.release", {"owner": "a"}))
    answers = Hints(keeper).handle(told, 1.0)
    assert statuses(answers) == [REJECTED] * 700 + [ACCEPTED, CLIPPED], "what still fits is carried out"
    assert answers[-1]["reason"] == "700 more were not read"


@pytest.mark.parametrize("sent", [list, lambda actions: dumps(actions).encode()])
@pytest.mark.parametrize("junk", [0, {"action_type": "weft.retain", "action_version": 1, "payload": {
    "owners": [f"o{number}" for number in range(1000)], "idle": [-1] * 1000, "leased": [True] * 1000,
}}])  # fmt: skip
def test_of_actions_that_do_not_fit_no_more_are_looked_at_than_are_read(
    keeper: Keeper, junk: object, sent: Any
) -> None:
    """However many there are: an engine waits for each."""
    answers = Hints(keeper).handle(message() | {"actions": sent([junk] * 5000)}, 1.0)
    assert len(answers) <= MOST_ACTIONS + 1
    assert int(answers[-1]["reason"].split()[0]) >= 5000 - MOST_ACTIONS


def test_what_is_released_goes_first_and_its_owner_is_gone_with_its_last_block(keeper: Keeper) -> None:
    engine = Hints(keeper)
    assert statuses(engine.handle(message(("kv.release", {"owner": "b"})), 10.0)) == [ACCEPTED]
    assert first(keeper, 11.0) == "b"
    assert statuses(engine.handle(message(("kv.release", {"owner": "b"}), name="m2"), 12.0)) == [REJECTED]


def test_priorities_are_passed_on_and_kept(keeper: Keeper) -> None:
    asked: list[str] = []
    engine = Hints(keeper, reordered=asked.append)
    engine.handle(message(("weft.priority", {"owner": "a", "priority": -3})), 1.0)
    assert (asked, dict(engine.priorities)) == (["a"], {"a": -3.0})


def test_an_engine_says_what_it_cannot_do(keeper: Keeper) -> None:
    told = message(("kv.prefetch", {"owner": "a"}), ("weft.priority", {"owner": "a", "priority": 1}), ("kv.pin", {}))
    assert statuses(Hints(keeper).handle(told, 1.0)) == [UNSUPPORTED] * 3
    assert statuses(Hints(keeper).handle(told | {"protocol_version": 2, "message_id": "x"}, 1.0)) == [UNSUPPORTED]


@pytest.mark.parametrize("payload", [
    {}, {"owner": ""}, {"owner": 7}, {"owner": "a" * 129}, {"owner": "a", "next_use": "soon"},
    {"owner": "a", "next_use": float("nan")}, {"owner": "a", "idle": True}, {"owner": "a", "index": None}, {"owner": "a", "next_use": 10**400},
])  # fmt: skip
def test_what_cannot_be_understood_is_rejected_alone(keeper: Keeper, payload: dict[str, Any]) -> None:
    told = message(("kv.retain", payload), ("kv.retain", {"owner": "b", "next_use": 5}))
    assert statuses(Hints(keeper).handle(told, 1.0)) == [REJECTED, ACCEPTED]


@pytest.mark.parametrize(("broken", "status"), [
    ({"action_type": "\ud800"}, UNSUPPORTED), ({"action_type": ["kv.retain"]}, UNSUPPORTED),
    ({"action_type": {}}, UNSUPPORTED), ({"action_version": 2}, UNSUPPORTED), ({"action_version": []}, UNSUPPORTED),
    ({"\ud800": 1}, REJECTED),
])  # fmt: skip
def test_an_action_of_no_known_type_is_unsupported_and_the_others_are_carried_out(
    keeper: Keeper, broken: dict[str, Any], status: str
) -> None:
    told = message(("kv.retain", {"owner": "a", "next_use": 5}), ("kv.retain", {"owner": "b", "next_use": 5}))
    told["actions"][0] |= broken
    assert statuses(Hints(keeper).handle(told, 1.0)) == [status, ACCEPTED]


def test_what_is_said_of_an_owner_counts_in_the_order_in_which_it_is_said(keeper: Keeper) -> None:
    told = message(
        ("kv.retain", {"owner": "a", "next_use": 5}), ("kv.retain", {"owner": "b", "next_use": 5}),
        ("kv.release", {"owner": "b"}), ("kv.release", {"owner": "a"}), ("kv.retain", {"owner": "a", "next_use": 50}),
    )  # fmt: skip
    assert statuses(Hints(keeper).handle(told, 1.0)) == [ACCEPTED] * 4 + [REJECTED]
    assert keeper.policy.rank(keeper.device.stack(ord("b")), 2.0)[0] == DEAD  # type: ignore[arg-type]


@pytest.mark.parametrize("figure", [float("inf"), -float("inf"), 1e301])
def test_what_is_no_finite_figure_is_rejected(keeper: Keeper, figure: float) -> None:
    told = message(("kv.retain", {"owner": "a", "next_use": figure}))
    assert statuses(Hints(keeper).handle(told, 10.0)) == [REJECTED]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -1.0, 1e10])
def test_a_value_of_a_curve_that_is_none_is_worth_nothing(keeper: Keeper, value: float) -> None:
    told = [
        ("kv.retain", {"owner": o, "index": {"first": 1, "last": 4, "values": packed(v)}})
        for o, v in (("a", value), ("b", 0.1))
    ]
    assert statuses(Hints(keeper).handle(message(*told), 10.0)) == [ACCEPTED, ACCEPTED]
    assert first(keeper, 11.0) == "a"


def test_figures_out_of_range_are_clipped(keeper: Keeper) -> None:
    told = message(("kv.retain", {"owner": "a", "next_use": -5}), ("kv.retain", {"owner": "b", "next_use": 1e30}))
    assert statuses(Hints(keeper).handle(told, 10.0)) == [CLIPPED, CLIPPED]
    assert first(keeper, 11.0) == "b"


def test_a_message_that_is_sent_again_is_not_carried_out_again(keeper: Keeper) -> None:
    engine = Hints(keeper)
    engine.handle(message(("kv.retain", {"owner": "a", "next_use": 5})), 1.0)
    engine.handle(message(("kv.release", {"owner": "a"}), name="m2"), 2.0)
    again = engine.handle(message(("kv.retain", {"owner": "a", "next_use": 5})), 3.0)
    assert again == [{"status": REJECTED, "reason": "sent before"}]
    assert first(keeper, 4.0) == "a"


@pytest.mark.parametrize("at", [lambda start: 1.0, lambda start: 1.0 + start / 30_000], ids=["at once", "in a second"])
def test_a_million_unknown_owners_are_forgotten_again(keeper: Keeper, at: Callable[[int], float]) -> None:
    engine = Hints(keeper, reordered=lambda owner: None)
    for start in range(0, 30_000, 1000):
        actions = [("kv.retain", {"owner": f"o{n}", "next_use": 1}) for n in range(start, start + 1000)]
        assert set(statuses(engine.handle(message(*actions, name=str(start)), at(start)))) == {REJECTED}
        assert len(keeper._told) <= MOST_STRANGERS + 2
    keeper.settle(2.0, at_once=True)
    assert isinstance(keeper.policy, Retention)
    assert len(keeper.policy._hints) <= MOST_STRANGERS + 2
    assert keeper.policy.rank(next(iter(keeper.device.order)), 2.0)[0] == UNKNOWN


def test_more_actions_than_are_read_are_said_to_be(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MOST_ACTIONS", 1)
    told = message(("kv.retain", {"owner": "a", "next_use": 5}), ("kv.retain", {"owner": "b", "next_use": 5}))
    answers = Hints(keeper).handle(told, 1.0)
    assert answers[0]["status"] == ACCEPTED
    assert answers[1] == {"status": CLIPPED, "reason": "1 more were not read"}


def test_what_was_told_before_the_first_block_counts_when_it_comes(keeper: Keeper) -> None:
    Hints(keeper).handle(message(("kv.retain", {"owner": "c", "next_use": 5})), 1.0)
    keeper.began("c", (), 2.0)
    keeper.wrote("c", None, ("c",), 3.0)
    keeper.ledger.gained("c", DEVICE)
    keeper.left("c", 16, 3.0)
    keeper.device.put([(99, "c")], 3.0)
    assert [keeper.policy.rank(stack, 4.0)[0] for stack in keeper.device.order] == [UNKNOWN, UNKNOWN, KNOWN]


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "b", "c", "kv.retain", ""])
    | st.lists(st.floats(width=32), min_size=1, max_size=3).map(lambda column: packed(*column)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["owner", "owners", "next_use", "idle", "leased", "index", "first", "last", "values", "priority", "hold", "within"]), inner, max_size=6
    ),
    max_leaves=12,
)  # fmt: skip


FITS = [
    ("kv.retain", {"owner": "a", "next_use": 5, "leased": True}),
    ("kv.retain", {"owner": "b", "index": {"first": 1, "last": 4, "values": packed(4, 0.01)}, "hold": 3, "reuse": 0.5}),
    ("weft.retain", columns("ab", idle=(5, 1), leased=(False, True), next_use=(1, 2.5))),
    ("weft.retain", columns("a") | {"index": {"first": 1, "last": 4, "values": ONE}}),
    ("weft.retain", columns("a\U0001f600", idle=[1])), ("kv.release", {"owner": "b"}),
    ("kv.prefetch", {"owner": "a", "within": 3, "unknown": [{}]}), ("weft.priority", {"owner": "a", "priority": -3}),
]  # fmt: skip


def heard(sent: bytes) -> tuple[list[dict[str, str]], dict[str, Hint]]:
    """What is answered to such actions, and what is known of owners then."""
    engine = Hints(holding(policy := Retention()), prefetch=lambda owner, within: True, reordered=lambda owner: None)
    return engine.handle(message() | {"actions": sent}, 1.0), policy._hints


@given(st.lists(st.sampled_from(FITS), min_size=1, max_size=8), st.lists(st.text(max_size=200) | st.none(), max_size=8))
def test_packed_actions_say_what_the_json_said(actions: list[tuple[str, Any]], names: list[str | None]) -> None:
    listed = [one | {"action_id": name} for one, name in zip_longest(message(*actions)["actions"], names) if one]
    try:
        plain = dumps(listed, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        plain = dumps(listed).encode()
        assert envelope.packed(plain) is plain
        return
    assert envelope.packed(plain)[:1] >= b"\x80"
    assert envelope.read(envelope.packed(plain)) == envelope.read(plain)
    assert heard(envelope.packed(plain)) == heard(plain)
    assert heard(envelope.packed(dumps(listed).encode())) == heard(plain), "escaped, too"


@given(st.lists(st.tuples(st.sampled_from([*TYPES]), json), min_size=1))
def test_what_is_packed_of_anything_that_can_be_sent_says_the_same(actions: list[tuple[str, Any]]) -> None:
    plain = dumps(message(*actions)["actions"]).encode()
    assert heard(envelope.packed(plain)) == heard(plain)


def acting(payload: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """One action that fits, but for these parts of it."""
    (action,) = message(("kv.retain", {"owner": "a", "leased": True} | (payload or {})))["actions"]
    return dumps([action | fields]).encode()


@pytest.mark.parametrize("plain", [
    b"", b"[]", b"{}", b"[0]", acting()[:-1], acting()[:-1] + b",0]", acting(action_version=2), acting(action_id=7), acting(action_id=[[]]),
    acting(payload={"leased": 10**30}), acting(payload={"leased": 1}), acting(payload={"idle": -1}), acting(payload={"owner": ""}),
    acting(action_id="x" * envelope.LONGEST_PACKED), b"[" + b"[]," * 1000 + b"0]",
])  # fmt: skip
def test_actions_of_which_one_does_not_fit_are_passed_on_as_they_are(plain: bytes) -> None:
    assert envelope.packed(acting()) != acting()
    assert envelope.packed(plain) is plain


def test_a_message_whose_packing_is_broken_is_turned_away_whole(keeper: Keeper) -> None:
    assert statuses(Hints(keeper).handle(message() | {"actions": envelope.packed(acting())[:-1]}, 1.0)) == [REJECTED]


def test_what_is_fetched_goes_by_what_was_told_before_it(keeper: Keeper) -> None:
    """However much was told of others: hints that wait for their time do not wait for this."""
    fetched: list[float | None] = []
    policy = keeper.policy
    assert isinstance(policy, Retention)

    def prefetch(owner: str, within: float) -> bool:
        fetched.append(policy._hints[owner].next_use)
        return True

    engine = Hints(keeper, prefetch)
    for turn in range(3):
        many = ["a", *(f"o{n}" for n in range(999))]
        told = columns(many, next_use=[turn] * 1000)
        engine.handle(message(("weft.retain", told), ("kv.prefetch", {"owner": "a"}), name=str(turn)), 1.0)
    assert fetched == [1.0, 2.0, 3.0]


FLOATS = st.lists(st.floats(width=32), min_size=2, max_size=2)


@given(st.fixed_dictionaries({"idle": FLOATS}, optional=dict.fromkeys(("next_use", "hold", "reuse"), FLOATS)))
def test_whatever_stands_in_a_column_both_owners_can_be_ranked(figures: dict[str, list[float]]) -> None:
    for policy in (Retention(), Saga()):
        kept = holding(policy)
        told = message(("weft.retain", columns("ab", **figures)))
        assert statuses(Hints(kept).handle(told, 1.0)) == [ACCEPTED] * 2
        assert len(list(kept.device)) == 2
        for _, value in (policy.rank(stack, 2.0) for stack in kept.device.order):
            assert not isnan(value)


@given(st.lists(st.tuples(st.sampled_from([*TYPES]), json)))
def test_nothing_that_can_be_sent_raises(actions: list[tuple[str, Any]]) -> None:
    kept = Keeper(Retention(), 16)
    engine = Hints(kept, prefetch=lambda owner, within: True, reordered=lambda owner: None)
    answers = engine.handle(message(*actions), 1.0)
    assert len(answers) == len(actions)
    engine.handle(actions, 2.0)


def test_saga_gets_from_the_same_message_how_long_to_protect_and_how_likely_a_return_is() -> None:
    kept = holding(Saga())
    index = {"first": 0.1, "last": 100.0, "values": ONE}
    told = message(
        ("kv.retain", {"owner": "a", "index": index, "hold": 60.0, "reuse": 0.1}),
        ("kv.retain", {"owner": "b", "index": index, "hold": 0.0, "reuse": 7.0}),
    )
    assert statuses(Hints(kept).handle(told, 0.0)) == [ACCEPTED, CLIPPED]
    assert first(kept, 10.0) == "b", "the other is protected"
