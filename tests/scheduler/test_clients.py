"""What each client puts on the wire, and who Weft takes it for. One recorded header set a client.

Versions: Claude Code 2.1.273, Codex (codex-rs, 2026), OpenCode, OpenHands SDK, Dynamo 1.6, vllm-router 0.1.17, LiteLLM
1.109, AIPerf 0.13.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from scheduler.identity import Identity, resolve

CLAUDE = {
    "user-agent": "claude-cli/2.1.273 (external, cli)",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "x-app": "cli",
    "x-stainless-lang": "js",
    "x-claude-code-session-id": "6f1c2a52-9d0e-4d52-a9a3-7d7f3e0c11aa",
}
CODEX = {
    "user-agent": "codex_cli_rs/0.99.0 (Debian 12; x86_64) xterm",
    "originator": "codex_cli_rs",
    "session-id": "019a0000-aaaa-7000-8000-000000000001",
    "thread-id": "019a0000-bbbb-7000-8000-000000000002",
    "x-client-request-id": "019a0000-bbbb-7000-8000-000000000002",
    "x-codex-window-id": "019a0000-bbbb-7000-8000-000000000002:0",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
OPENCODE = {
    "user-agent": "opencode/1.4 ai-sdk/provider-utils",
    "x-session-affinity": "ses_child",
    "x-session-id": "ses_child",
    "x-parent-session-id": "ses_root",
}

CLIENTS: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any]]] = {
    "claude-code main": (
        CLAUDE,
        {"metadata": {"user_id": "user_1f_account__session_6f1c2a52-9d0e-4d52-a9a3-7d7f3e0c11aa"}},
        {"workflow": CLAUDE["x-claude-code-session-id"], "session": CLAUDE["x-claude-code-session-id"],
         "parent": None, "role": None, "rule": "claude-code"},
    ),
    "claude-code sub-agent with hints": (
        CLAUDE | {"x-claude-code-agent-id": "a-9", "x-claude-code-agent-type": "Explore",
                  "x-claude-code-request-class": "subagent", "x-claude-code-prev-tool-durations": "Bash=742;Read=9"},
        {},
        {"workflow": CLAUDE["x-claude-code-session-id"], "session": "a-9",
         "parent": CLAUDE["x-claude-code-session-id"], "role": "Explore"},
    ),
    "claude-code nested sub-agent": (
        CLAUDE | {"x-claude-code-agent-id": "a-10", "x-claude-code-parent-agent-id": "a-9"},
        {},
        {"workflow": CLAUDE["x-claude-code-session-id"], "session": "a-10", "parent": "a-9"},
    ),
    "claude-code auxiliary call": (
        CLAUDE | {"x-claude-code-request-class": "auxiliary"},
        {},
        {"session": CLAUDE["x-claude-code-session-id"], "role": "auxiliary"},
    ),
    "claude-code behind a proxy that strips headers": (
        {"user-agent": "proxy"},
        {"metadata": {"user_id": "user_1f_account__session_6f1c2a52-9d0e-4d52-a9a3-7d7f3e0c11aa"}},
        {"workflow": "6f1c2a52-9d0e-4d52-a9a3-7d7f3e0c11aa", "session": None, "rule": "metadata.user_id"},
    ),
    "claude-code behind such a proxy, new form": (
        {"user-agent": "proxy"},
        {"metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "child", "parent_session_id": "root"})}},
        {"workflow": "root", "session": None, "rule": "metadata.user_id"},
    ),
    "codex": (
        CODEX,
        {"prompt_cache_key": CODEX["thread-id"]},
        {"workflow": CODEX["session-id"], "session": CODEX["thread-id"], "parent": None, "rule": "codex"},
    ),
    "codex review sub-agent": (
        CODEX | {"x-openai-subagent": "review", "x-codex-parent-thread-id": "019a-parent"},
        {},
        {"workflow": CODEX["session-id"], "parent": "019a-parent", "role": "review"},
    ),
    "codex by its turn metadata alone": (
        {"user-agent": "codex_exec/0.99", "x-codex-turn-metadata": json.dumps(
            {"session_id": "S", "thread_id": "T", "parent_thread_id": "P", "subagent_kind": "compact"})},
        {},
        {"workflow": "S", "session": "T", "parent": "P", "role": "compact"},
    ),
    "codex, older": (
        {"user-agent": "codex_cli_rs/0.40", "session_id": "s", "conversation_id": "c"},
        {},
        {"workflow": "s", "session": "c", "rule": "codex"},
    ),
    "opencode": (OPENCODE, {}, {"session": "ses_child", "parent": "ses_root", "rule": "x-session-id"}),
    "openhands": (
        {"user-agent": "OpenAI/Python 3.54", "x-litellm-session-id": "conv-1"},
        {"prompt_cache_key": "conv-1"},
        {"session": "conv-1", "rule": "litellm"},
    ),
    "dynamo client": (
        {"x-dynamo-session-id": "run:researcher", "x-dynamo-parent-session-id": "run:planner",
         "x-dynamo-session-final": "true"},
        {"nvext": {"agent_hints": {"priority": 5, "osl": 1024}}},
        {"session": "run:researcher", "parent": "run:planner", "final": True, "rule": "dynamo"},
    ),
    "dynamo client, by the body": (
        {},
        {"nvext": {"agent_context": {"session_type_id": "deep_research", "session_id": "run-42",
                                     "trajectory_id": "run-42:r", "parent_trajectory_id": "run-42:p"}}},
        {"workflow": "run-42", "session": "run-42:r", "parent": "run-42:p", "template": "deep_research",
         "rule": "nvext"},
    ),
    "vllm-router client": (
        {"user-agent": "OpenAI/Python 3.54"},
        {"vllm_xargs": {"agentic_context": {"root_program_id": "p0", "program_id": "p1", "parent_program_id": "p0",
                                            "agent_role": "coder", "expected_resume": True}}},
        {"workflow": "p0", "session": "p1", "parent": "p0", "role": "coder", "final": False,
         "rule": "agentic_context"},
    ),
    "litellm proxy": (
        {"user-agent": "litellm/1.109", "x-litellm-session-id": "s-1", "x-litellm-trace-id": "t-1",
         "baggage": "session.id=other"},
        {},
        {"session": "s-1", "rule": "litellm"},
    ),
    "litellm, by the body": ({}, {"litellm_session_id": "s-2"}, {"session": "s-2", "rule": "litellm_session_id"}),
    "opentelemetry baggage": (
        {"baggage": "userId=alice,gen_ai.conversation.id=conv%2D7;prop=1"},
        {},
        {"session": "conv-7", "rule": "baggage"},
    ),
    "openai conversation": ({}, {"conversation": {"id": "conv_1"}}, {"session": "conv_1", "rule": "conversation"}),
    "hermes": ({"x-hermes-session-id": "h"}, {}, {"session": "h", "rule": "vendor"}),
    "deepseek harness": (
        {"x-deepseek-harness-session-id": "d", "x-deepseek-harness-parent-session-id": "p"},
        {},
        {"session": "d", "parent": "p", "rule": "deepseek"},
    ),
    "aiperf": (
        {"x-correlation-id": "conv-3", "x-session-affinity": "conv-3", "user-agent": "aiperf/0.13"},
        {},
        {"session": "conv-3", "rule": "x-session-affinity"},
    ),
    "weft's own words": (
        {},
        {"metadata": {"workflow_id": "run", "workflow": "report", "node": "write", "after": "search, read",
                      "join": "2"}},
        {"workflow": "run", "template": "report", "role": "write", "after": ("search", "read")},
    ),
    "an openai sdk that says nothing": (
        {"user-agent": "OpenAI/Python 3.54", "x-stainless-lang": "python", "x-stainless-retry-count": "0",
         "x-request-id": "r"},
        {"user": "alice", "safety_identifier": "x", "prompt_cache_key": "my-app", "metadata": {"topic": "demo"}},
        {"workflow": None, "session": None, "rule": "anonymous"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("client", list(CLIENTS))
def test_a_client_is_taken_for_who_it_is(client: str) -> None:
    headers, body, expected = CLIENTS[client]
    found: Identity = resolve("acme", headers, body)
    assert found.tenant == "acme"
    assert {name: getattr(found, name) for name in expected} == expected
