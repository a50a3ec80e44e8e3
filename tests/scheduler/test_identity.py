from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.identity import Identity, clean, resolve


def who(headers: dict[str, str] | None = None, **body: Any) -> Identity:
    return resolve("acme", headers or {}, body)


def test_a_call_that_says_nothing_is_anonymous() -> None:
    assert who() == Identity(tenant="acme", rule="anonymous")


@pytest.mark.parametrize("form", [lambda c: c, json.dumps], ids=["object", "json-string"])
def test_agentic_context_is_read_as_an_object_and_as_a_json_string(form: Any) -> None:
    context = {
        "program_id": "p2",
        "root_program_id": "p1",
        "parent_program_id": "p1",
        "agent_role": "critic",
        "expected_resume": False,
    }
    found = who(vllm_xargs={"agentic_context": form(context)})
    assert (found.workflow, found.session, found.parent, found.role) == ("p1", "p2", "p1", "critic")
    assert found.final
    assert found.rule == "agentic_context"


def test_explicit_fields_win_over_headers_field_by_field() -> None:
    found = who({"x-session-id": "s"}, metadata={"workflow_id": "run-7", "workflow": "review", "node": "plan"})
    assert (found.workflow, found.session, found.role, found.template) == ("run-7", "s", "plan", "review")
    assert found.rule == "metadata"


def test_one_harness_is_read_and_never_mixed_with_another() -> None:
    found = who({"x-dynamo-session-id": "d", "x-claude-code-session-id": "c", "x-claude-code-agent-type": "Explore"})
    assert (found.session, found.workflow, found.role, found.rule) == ("d", None, None, "dynamo")


def test_a_claude_code_sub_agent_is_a_session_of_its_root_workflow() -> None:
    headers = {"x-claude-code-session-id": "root", "x-claude-code-agent-id": "a1"}
    found = who(headers)
    assert (found.workflow, found.session, found.parent) == ("root", "a1", "root")


def test_unprefixed_names_count_only_from_codex() -> None:
    headers = {"session-id": "s", "thread-id": "t"}
    assert who(headers).rule == "anonymous"
    found = who(headers | {"user-agent": "codex_cli_rs/0.99"})
    assert (found.workflow, found.session, found.rule) == ("s", "t", "codex")


def test_any_vendors_session_header_is_understood() -> None:
    assert who({"x-hermes-session-id": "h"}).session == "h"


def test_a_vendors_parent_is_never_taken_for_its_session() -> None:
    found = who({"x-foo-parent-session-id": "p", "x-foo-session-id": "c"})
    assert (found.session, found.parent, found.rule) == ("c", "p", "vendor")
    assert who({"x-foo-session-id": "", "x-bar-session-id": "b"}).session == "b"


def test_x_session_id_may_name_its_parent() -> None:
    found = who({"x-session-id": "child", "x-parent-session-id": "root"})
    assert (found.session, found.parent, found.rule) == ("child", "root", "x-session-id")


def test_user_and_request_ids_are_no_identity() -> None:
    assert who({"x-request-id": "r", "x-user-id": "u"}, user="u").rule == "anonymous"


@pytest.mark.parametrize("hostile", ["x" * 257, "a\nb", "naïve", "\ud800"])
def test_ids_that_are_long_or_unprintable_are_hashed(hostile: str) -> None:
    made = clean(hostile)
    assert made is not None
    assert made.startswith("h-")
    assert len(made) == 34


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["vllm_xargs", "metadata", "model"]),
        json_values | st.fixed_dictionaries({"agentic_context": json_values, "workflow_id": json_values}),
    ),
    st.dictionaries(
        st.sampled_from(["x-session-id", "x-dynamo-session-id", "user-agent", "x-a-session-id"]), st.text()
    ),
)
def test_identity_is_never_an_error(body: dict[str, Any], headers: dict[str, str]) -> None:
    found = resolve("acme", headers, body)
    assert found.tenant == "acme"
