"""Who sent this call: tenant, workflow, session, role, parent, and which rule said so.

One table, first hit per field: explicit fields of the body, then the headers of one harness, then standard fields of
the body. What is still missing is for lineage to find. Never an error: what cannot be read does not count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import unquote

Headers = Mapping[str, str]
"""Header names in lower case."""

LONGEST_ID = 256
ANONYMOUS = "anonymous"

_USER_SESSION = re.compile(r"_session_([0-9A-Za-z-]{8,})$")
_UNSAFE = re.compile(r"[^!-~]")
_VENDOR_SESSION = re.compile(r"x-([a-z0-9-]+)-session-id")


@dataclass(frozen=True, slots=True)
class Claim:
    """What one rule read off a call. `final` says that the session makes no further call.

    `after` names the roles whose steps this one follows. `deadline`: seconds from the workflow's first step in which it
    is to be done; `budget`: tokens that it may use.
    """

    workflow: str | None = None
    session: str | None = None
    parent: str | None = None
    role: str | None = None
    template: str | None = None
    after: tuple[str, ...] = ()
    final: bool = False
    deadline: float | None = None
    budget: float | None = None


@dataclass(frozen=True, slots=True)
class Identity(Claim):
    """The claims of all rules, first hit per field. `rule` is the one that named the session or the workflow."""

    tenant: str = ""
    rule: str = ANONYMOUS


_FIELDS = tuple(field.name for field in fields(Claim))

Rule = Callable[[Headers, Mapping[str, Any]], Claim | None]


def resolve(tenant: str, headers: Headers, body: Mapping[str, Any]) -> Identity:
    """Merge what explicit fields, one harness's headers and standard fields say. Linear in the number of headers."""
    claims = [(name, claim) for name, field, read in EXPLICIT if field in body and (claim := read(headers, body))]
    for name, triggers, read in HARNESSES:
        if not triggers.isdisjoint(headers) and (claim := read(headers, body)):
            claims.append((name, claim))
            break
    else:
        if vendor := _vendor(headers):
            claims.append(vendor)
    claims += [(name, claim) for name, field, read in STANDARD if field in body and (claim := read(headers, body))]
    if "baggage" in headers and (claim := _baggage(headers, body)):
        claims.append(("baggage", claim))
    if not claims:
        return Identity(tenant=tenant)
    found: dict[str, Any] = {}
    for field in _FIELDS:
        for _, claim in claims:
            if value := getattr(claim, field):
                found[field] = value
                break
    rule = next((name for name, c in claims if c.session or c.workflow), ANONYMOUS)
    return Identity(**found, tenant=tenant, rule=rule)


def clean(value: object) -> str | None:
    """An id as we keep it: printable ASCII of at most `LONGEST_ID` characters, else its hash; None if empty."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        return None
    text = str(value)
    if len(text) <= LONGEST_ID and not _UNSAFE.search(text):
        return text
    return "h-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def agentic_context(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `vllm_xargs.agentic_context` of vllm-router's contract: an object, or a JSON string of one."""
    xargs = body.get("vllm_xargs")
    context = xargs.get("agentic_context") if isinstance(xargs, Mapping) else None
    if isinstance(context, str):
        context = _json_object(context)
    return context if isinstance(context, Mapping) else {}


def _json_object(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _first(source: Mapping[str, Any], *names: str) -> str | None:
    return next((value for name in names if (value := clean(source.get(name)))), None)


def _amount(value: object) -> float | None:
    """A positive number, or a string of one, as OpenAI's metadata has only strings."""
    try:
        amount = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return None
    return amount if 0.0 < amount < float("inf") else None


def _claim(**found: Any) -> Claim | None:
    return Claim(**found) if any(found.values()) else None


def _agentic_context(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    context = agentic_context(body)
    return _claim(
        workflow=_first(context, "root_program_id", "task_id", "session_id", "program_id"),
        session=_first(context, "program_id", "agent_id", "session_id"),
        parent=_first(context, "parent_program_id"),
        role=_first(context, "agent_role"),
        final=context.get("expected_resume") is False,
    )


def _metadata(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    metadata = body.get("metadata")
    if not isinstance(metadata, Mapping):
        return None
    after = metadata.get("after")
    return _claim(
        workflow=_first(metadata, "workflow_id"),
        session=_first(metadata, "session_id"),
        role=_first(metadata, "node"),
        template=_first(metadata, "workflow"),
        after=tuple(filter(None, (clean(name.strip()) for name in after.split(",")))) if isinstance(after, str) else (),
        deadline=_amount(metadata.get("deadline_seconds")),
        budget=_amount(metadata.get("token_budget")),
    )


def _nvext(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    """Dynamo's body fields: a session is a run, its trajectories are the agents in it."""
    nvext = body.get("nvext")
    context = nvext.get("agent_context") if isinstance(nvext, Mapping) else None
    if not isinstance(context, Mapping):
        return None
    return _claim(
        workflow=_first(context, "session_id"),
        session=_first(context, "trajectory_id"),
        parent=_first(context, "parent_trajectory_id"),
        template=_first(context, "session_type_id"),
    )


def _dynamo(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    return _claim(
        session=_first(headers, "x-dynamo-session-id"),
        parent=_first(headers, "x-dynamo-parent-session-id"),
        final=headers.get("x-dynamo-session-final", "").lower() in ("1", "true"),
    )


def _claude_code(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    root = _first(headers, "x-claude-code-session-id")
    agent = _first(headers, "x-claude-code-agent-id")
    parent = _first(headers, "x-claude-code-parent-agent-id")
    kind = _first(headers, "x-claude-code-request-class")
    return _claim(
        workflow=root,
        session=agent or root,
        parent=parent or (root if agent else None),
        role=_first(headers, "x-claude-code-agent-type") or (kind if kind != "main" else None),
    )


def _codex(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    # Unprefixed names are too generic to trust from any other client.
    if not headers.get("user-agent", "").lower().startswith("codex") and "x-codex-window-id" not in headers:
        return None
    told = _json_object(headers.get("x-codex-turn-metadata", ""))
    turn: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    root = _first(headers, "session-id", "session_id") or _first(turn, "session_id")
    return _claim(
        workflow=root,
        session=_first(headers, "thread-id", "conversation_id") or _first(turn, "thread_id") or root,
        parent=_first(headers, "x-codex-parent-thread-id") or _first(turn, "parent_thread_id", "forked_from_thread_id"),
        role=_first(headers, "x-openai-subagent") or _first(turn, "subagent_kind"),
    )


def _session_header(session: str, parent: str | None = None) -> Rule:
    def read(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
        return _claim(session=_first(headers, session), parent=_first(headers, parent) if parent else None)

    return read


def _vendor(headers: Headers) -> tuple[str, Claim] | None:
    """`x-session-id` and its like, and any `x-<vendor>-session-id` before them."""
    for name in headers:
        vendor = _VENDOR_SESSION.fullmatch(name) if name.endswith("-session-id") else None
        if vendor and not name.endswith("-parent-session-id") and (session := _first(headers, name)):
            return "vendor", Claim(session=session, parent=_first(headers, f"x-{vendor[1]}-parent-session-id"))
    for name in ("x-session-id", "x-session-affinity", "x-correlation-id"):
        if name in headers and (session := _first(headers, name)):
            parent = _first(headers, "x-parent-session-id") if name == "x-session-id" else None
            return name, Claim(session=session, parent=parent)
    return None


def _conversation(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    """OpenAI's `conversation`: an id, or an object with one."""
    told = body.get("conversation")
    return _claim(session=_first(told, "id") if isinstance(told, Mapping) else clean(told))


def _anthropic_user(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    """Claude Code behind a proxy that strips headers: its sub-agents share the id, so that it names the workflow."""
    metadata = body.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    if not isinstance(user, str):
        return None
    told = _json_object(user) if user.startswith("{") else None
    if isinstance(told, Mapping):
        return _claim(workflow=_first(told, "parent_session_id", "session_id"))
    session = _USER_SESSION.search(user)
    return _claim(workflow=session[1]) if session else None


def _baggage(headers: Headers, body: Mapping[str, Any]) -> Claim | None:
    """W3C baggage with an id of OpenTelemetry's: `session.id` or `gen_ai.conversation.id`."""
    pairs = (entry.partition(";")[0].partition("=") for entry in headers["baggage"].split(","))
    told = {name.strip(): unquote(value.strip()) for name, _, value in pairs}
    return _claim(session=_first(told, "gen_ai.conversation.id", "session.id"))


EXPLICIT: tuple[tuple[str, str, Rule], ...] = (
    ("agentic_context", "vllm_xargs", _agentic_context),
    ("nvext", "nvext", _nvext),
    ("metadata", "metadata", _metadata),
    (
        "litellm_session_id",
        "litellm_session_id",
        lambda headers, body: _claim(session=_first(body, "litellm_session_id")),
    ),
)
"""Rules on the body: name, the field without which it need not be asked, and the rule."""

_DEEPSEEK = ("x-deepseek-harness-session-id", "x-deepseek-harness-parent-session-id")

STANDARD: tuple[tuple[str, str, Rule], ...] = (
    ("conversation", "conversation", _conversation),
    ("metadata.user_id", "metadata", _anthropic_user),
)
"""As `EXPLICIT`, asked after the headers. Not `user` nor `prompt_cache_key`: applications send one for all runs."""

HARNESSES: tuple[tuple[str, frozenset[str], Rule], ...] = (
    ("dynamo", frozenset({"x-dynamo-session-id"}), _dynamo),
    ("claude-code", frozenset({"x-claude-code-session-id"}), _claude_code),
    (
        "codex",
        frozenset({"session-id", "session_id", "thread-id", "conversation_id", "x-codex-turn-metadata"}),
        _codex,
    ),
    ("deepseek", frozenset({_DEEPSEEK[0]}), _session_header(*_DEEPSEEK)),
    ("litellm", frozenset({"x-litellm-session-id"}), _session_header("x-litellm-session-id")),
)
"""Rules on headers: name, the headers without any of which it need not be asked, and the rule. Then `_vendor`."""
