from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from server.auth import OPEN, Keys, Tenant
from server.call import STEERING, Call, parse
from server.dialects import Chat, Messages
from server.errors import ApiError


def call(raw: bytes | dict[str, Any], tenant: Tenant = OPEN, dialect: type = Chat, **headers: str) -> Call:
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "method": "POST", "path": "/v1/x", "query_string": b"", "headers": encoded})
    return parse(
        request, raw if isinstance(raw, bytes) else json.dumps(raw).encode(), tenant, dialect, lambda: "default-model"
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["messages", "stream", "stream_options", "vllm_xargs", "cache_salt", "x", *STEERING])


@given(st.dictionaries(names, json_values), st.sampled_from([OPEN, Tenant(name="i", isolated=True)]), st.booleans())
def test_what_a_client_sends_survives_but_for_what_is_wefts(body: dict[str, Any], tenant: Tenant, pretty: bool) -> None:
    made = call(json.dumps(body, indent=2 if pretty else None).encode(), tenant)
    sent = json.loads(made.body)
    assert not STEERING & sent.keys()
    ours = {"stream_options", "cache_salt", "vllm_xargs"}
    assert {k: v for k, v in sent.items() if k not in ours} == {
        k: v for k, v in body.items() if k not in ours | STEERING
    }
    assert ("cache_salt" in sent) >= tenant.isolated


def test_steering_fields_cannot_hide_in_escapes_or_repeats() -> None:
    made = call(b'{"model":"m","session\\u005fid":"x","priority":0,"priority":5,"messages":[]}')
    assert json.loads(made.body) == {"model": "m", "messages": []}


def test_a_trusted_tenant_may_steer() -> None:
    raw = {"model": "m", "priority": 3, "session_id": "s"}
    assert json.loads(call(raw, Tenant(name="t", trusted=True)).body) == raw


def test_isolated_tenants_get_salts_of_their_own() -> None:
    def salt(tenant: str, own: str | None) -> str:
        body = {"model": "m"} | ({"cache_salt": own} if own else {})
        return json.loads(call(body, Tenant(name=tenant, isolated=True)).body)["cache_salt"]

    salts = {salt("a", None), salt("b", None), salt("a", "x"), salt("b", "x")}
    assert len(salts) == 4
    assert salt("a", "x") == salt("a", "x")


def test_an_isolated_tenants_salt_cannot_be_named_by_another() -> None:
    keys = Keys([Tenant(name="victim", isolated=True, keys=("k",)), Tenant(name="other", keys=("l",))], salt=b"secret")
    victim, other = keys._tenants["k"], keys._tenants["l"]  # type: ignore[index]
    salt = json.loads(call({"model": "m"}, victim).body)["cache_salt"]
    stolen = json.loads(call({"model": "m", "cache_salt": salt}, other).body)["cache_salt"]
    assert stolen != salt
    assert salt != hashlib.blake2b(b"victim\0", digest_size=16).hexdigest()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"include_usage": True, "continuous_usage_stats": False}),
        ({"include_usage": False, "x": 1}, {"include_usage": True, "x": 1, "continuous_usage_stats": False}),
        ({"include_usage": True}, {"include_usage": True}),
        ({"continuous_usage_stats": True}, {"include_usage": True, "continuous_usage_stats": False}),
    ],
)
def test_usage_is_asked_for_where_a_chat_stream_did_not(options: Any, expected: Any) -> None:
    body = {"model": "m", "stream": True} | ({"stream_options": options} if options is not None else {})
    assert json.loads(call(body).body)["stream_options"] == expected
    assert call(body).dialect.drop_usage == (options != {"include_usage": True})
    assert "stream_options" not in json.loads(call(body | {"stream": False}).body) or options is not None
    assert json.loads(call(body, dialect=Messages).body) == body


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b'{"model": "\xff"}', b'{"model": 5}', b"[" * 5000])
def test_a_body_that_no_worker_could_serve_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as error:
        call(raw)
    assert error.value.status == 400


def test_a_request_id_is_echoed_if_it_is_clean() -> None:
    assert call({}, x_request_id="abc").request_id == "abc"
    assert call({}, x_request_id="a b").request_id.startswith("h-")
    assert call({}).request_id
