"""One form for a prompt, whatever the API and whatever the client does to it between two turns."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scheduler.prompt import Answer, Prompt, ToolCall, read, said

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"b":1,"a":2}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "A door."},
        {"role": "assistant", "content": "There is a door."},
        {"role": "user", "content": "Open it."},
    ]
}  # fmt: skip
MESSAGES = {
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 2, "b": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "A door."}]}]},
        {"role": "assistant", "content": "There is a door."},
        {"role": "user", "content": "Open it."},
    ],
}  # fmt: skip
RESPONSES = {
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": "Look."},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "f1", "name": "look", "arguments": '{"a": 2, "b": 1}'},
        {"type": "function_call_output", "call_id": "f1", "output": "A door."},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "There is a door."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Open it."}]},
    ],
}


def prompt(body: dict[str, Any], tenant: str = "t") -> Prompt:
    made = read(tenant, body)
    assert made is not None
    return made


def test_the_three_apis_come_to_the_same_form() -> None:
    chat = prompt(CHAT)
    assert len(chat.messages) == 5
    for other in (prompt(MESSAGES), prompt(RESPONSES)):
        assert other.links == chat.links
        assert (other.head, other.role) == (chat.head, chat.role)


def test_what_clients_rewrite_between_turns_does_not_count() -> None:
    rewritten = json.loads(json.dumps(CHAT))
    call = rewritten["messages"][2]
    del call["reasoning"]
    call["content"] = ""
    call["name"] = "scout"
    call["tool_calls"][0]["id"] = rewritten["messages"][3]["tool_call_id"] = "mine"
    call["tool_calls"][0]["function"]["arguments"] = '{\n "a": 2,\n "b": 1\n}'
    rewritten["messages"][4] = {"content": [{"text": " There is a door.\n", "type": "text"}], "role": "assistant"}
    assert prompt(rewritten).links == prompt(CHAT).links


def test_what_was_said_counts() -> None:
    for place, text in ((1, "Look!"), (3, "A wall."), (4, "There is none."), (5, "Close it.")):
        other = json.loads(json.dumps(CHAT))
        other["messages"][place]["content"] = text
        links = prompt(other).links
        assert links[: place - 1] == prompt(CHAT).links[: place - 1]
        assert links[place - 1] != prompt(CHAT).links[place - 1]


def test_an_answer_has_the_digest_of_the_message_it_becomes() -> None:
    call = Answer("", (ToolCall("other-id", "look", '{"a": 2, "b": 1}'),))
    assert said("t", call) == prompt(CHAT).messages[1].digest
    assert said("t", Answer("There is a door.\n")) == prompt(CHAT).messages[3].digest
    assert said("t", Answer("<think>hm</think>\n\nThere is a door.")) == prompt(CHAT).messages[3].digest


def test_tenants_share_no_digest() -> None:
    mine, theirs = prompt(CHAT), prompt(CHAT, "u")
    assert not set(mine.links) & set(theirs.links)
    assert not {m.digest for m in mine.messages} & {m.digest for m in theirs.messages}


def test_the_role_is_the_system_prompt_without_dates_and_numbers_and_the_tools_names() -> None:
    def role(system: str, *tools: str) -> str:
        listed = [{"type": "function", "function": {"name": name, "description": "x"}} for name in tools]
        body = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": "a"}], "tools": listed}
        return prompt(body).role

    one = role("You are A. Today is Friday, November 20, 2026. Run /tmp/run-17 of 3f2a-99.", "look", "walk")
    assert one == role("You are A. Today is Saturday, December 1, 2027. Run /tmp/run-18 of 4b7c-12.", "walk", "look")
    assert one != role("You are B. Today is Friday, November 20, 2026. Run /tmp/run-17 of 3f2a-99.", "look", "walk")
    assert one != role("You are A. Today is Friday, November 20, 2026. Run /tmp/run-17 of 3f2a-99.", "look")


def test_what_has_no_messages_has_no_lineage() -> None:
    for body in ({}, {"prompt": "x"}, {"messages": []}, {"messages": "x"}, {"messages": [1]}, {"input": [[1, 2]]}):
        assert read("t", body) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
blocks = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "tool_use", "tool_result", "image"]), "text": json_values,
                  "id": json_values, "name": json_values, "input": json_values, "content": json_values})  # fmt: skip
calls = st.fixed_dictionaries({"function": json_values | st.fixed_dictionaries({"arguments": json_values})})
items = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "tool", "system"]) | json_values,
                  "type": st.sampled_from(["function_call", "function_call_output", "message"]),
                  "content": json_values | st.lists(blocks), "tool_calls": json_values | st.lists(calls),
                  "arguments": json_values, "output": json_values})  # fmt: skip


@given(st.lists(items | json_values, max_size=5), json_values, json_values)
def test_whatever_a_body_holds_reading_it_is_no_error(listed: list[Any], system: Any, tools: Any) -> None:
    made = read("t", {"messages": listed, "system": system, "tools": tools})
    assert made is None or len(made.links) == len(made.messages) > 0
