"""One step as the client sent it, and as it goes to the worker: parsed once, its bytes kept wherever they can be."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from scheduler import identity, prompt
from scheduler.identity import Identity
from scheduler.prompt import Prompt
from server.auth import Tenant
from server.dialects import Chat, Completions, Dialect
from server.errors import ApiError

LARGEST_BODY = 32 * 1024 * 1024
LONGEST_MODEL = 256
_TRUE = (True, "true", "True", "1", "on", "yes", "y", "t")  # what vLLM takes for one
STEERING = frozenset({
    "session_id", "priority", "request_id", "kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode",
})  # fmt: skip
"""Body fields that steer the engine: Weft's own, dropped from clients that are not trusted."""
_HIDDEN = STEERING | {"agentic_context"}

_NOT_FORWARDED = frozenset({
    "host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "expect",
    "proxy-authorization", "authorization", "x-api-key", "cookie", "accept-encoding",
    "x-session-id", "x-vllm-priority", "x-request-id", "x-data-parallel-rank",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """A step ready to be scheduled. `body` is what goes to the worker, `dialect` reads what comes back."""

    id: str
    request_id: str
    path: str
    tenant: Tenant
    model: str
    identity: Identity
    prompt: Prompt | None
    stream: bool
    body: bytes
    headers: Mapping[str, str]
    dialect: Dialect
    fields: Mapping[str, Any]


async def read_body(request: Request) -> bytes:
    """The request's bytes. Raises ApiError 413 above `LARGEST_BODY`, as soon as that is known."""
    declared = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"The request body exceeds {LARGEST_BODY} bytes.")
    if declared.isdigit() and int(declared) > LARGEST_BODY:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > LARGEST_BODY:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "The client went away.") from None
    return b"".join(parts)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises ApiError 400 where it is none."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The request body is not a JSON object.")
    return fields


def parse(
    request: Request, raw: bytes, tenant: Tenant, dialect: type[Dialect], default_model: Callable[[], str]
) -> Call:
    """Read what scheduling needs and make the worker's body. Raises ApiError 400 on what no worker could serve."""
    fields = parse_object(raw)
    headers = plain_headers(request)
    model = model_of(fields) or default_model()
    who = identity.resolve(tenant.name, headers, fields)
    step = uuid.uuid4().hex
    stream = fields.get("stream") in _TRUE
    added = _usage_asked(fields) if stream and dialect in (Chat, Completions) else {}
    return Call(
        id=step,
        request_id=identity.clean(headers.get("x-request-id")) or step,
        path=request.scope["path"],
        tenant=tenant,
        model=model,
        identity=who,
        prompt=None if fields.get("previous_response_id") else _prompt(tenant, fields),
        stream=stream,
        body=outgoing(raw, fields, tenant, added),
        headers=forwarded(headers),
        dialect=dialect(drop_usage="stream_options" in added),
        fields=fields,
    )


def _prompt(tenant: Tenant, fields: Mapping[str, Any]) -> Prompt | None:
    """What lineage reads; nothing where the body is such that no worker will take it either."""
    try:
        return prompt.read(tenant.name, fields)
    except (TypeError, ValueError, RecursionError):
        return None


def plain_headers(request: Request) -> dict[str, str]:
    """The headers by lower-case name, the last of each: what Starlette's mapping searches anew at each look-up."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The client's headers that go on to the worker: all but the connection's, secrets, and those that are Weft's."""
    kept = {name: value for name, value in headers.items() if name not in _NOT_FORWARDED}
    kept["accept-encoding"] = "identity"
    return kept


def owned_headers(call: Call, owner: str, priority: int = 0) -> dict[str, str]:
    """The headers of the request to the worker. The client's request id stays here: the engine aborts by it.

    A `priority` other than 0 is an error to an engine that does not go by it.
    """
    headers = {**call.headers, "x-session-id": owner, "x-request-id": call.id}
    return headers | {"x-vllm-priority": str(priority)} if priority else headers


def owned_body(call: Call, owner: str) -> bytes:
    """The body for a worker that does not read the session from the header."""
    xargs = call.fields.get("vllm_xargs")
    kept = {k: v for k, v in xargs.items() if k not in _HIDDEN} if isinstance(xargs, dict) else {}
    return _splice(call.body, {"vllm_xargs": {**kept, "session_id": owner}})


def outgoing(raw: bytes, fields: Mapping[str, Any], tenant: Tenant, added: Mapping[str, Any] | None = None) -> bytes:
    """The worker's body: the client's bytes, less the fields that are Weft's, with `added` and the tenant's salt."""
    return _splice(_cleaned(raw, fields, tenant.trusted), {**(added or {}), **_salt(fields, tenant)})


def model_of(fields: Mapping[str, Any]) -> str | None:
    """The model that a body names. Raises ApiError where it is no name: 400, or 404 for one too long to exist."""
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, "`model` is not a string.", "model")
    if model and len(model) > LONGEST_MODEL:
        raise ApiError(404, f"The model `{model[:32]}...` does not exist.", "model")
    return model


def _cleaned(raw: bytes, fields: Mapping[str, Any], trusted: bool) -> bytes:
    dropped = frozenset() if trusted else STEERING
    xargs = fields.get("vllm_xargs")
    hidden = (dropped | {"agentic_context"}) & xargs.keys() if isinstance(xargs, dict) else frozenset()
    if not hidden and not dropped & fields.keys():
        return raw
    kept = {name: value for name, value in fields.items() if name not in dropped}
    if hidden and isinstance(xargs, dict):
        kept["vllm_xargs"] = {name: value for name, value in xargs.items() if name not in hidden}
        if not kept["vllm_xargs"]:
            del kept["vllm_xargs"]
    try:
        return orjson.dumps(kept)
    except TypeError:  # reads deeper than it writes
        raise ApiError(400, "The request body is nested too deeply.") from None


def _usage_asked(fields: Mapping[str, Any]) -> dict[str, Any]:
    options = fields.get("stream_options")
    if options is None or (isinstance(options, dict) and not options.get("include_usage")):
        return {"stream_options": {**(options or {}), "include_usage": True, "continuous_usage_stats": False}}
    return {}


def _salt(fields: Mapping[str, Any], tenant: Tenant) -> dict[str, str]:
    """An isolated tenant's own, and of every client's salt one that no other tenant can name."""
    own = fields.get("cache_salt") or ""
    if not isinstance(own, str) or not (own or tenant.isolated):
        return {}
    text = f"{tenant.name}\0{own}".encode("utf-8", "surrogatepass")
    return {"cache_salt": hashlib.blake2b(text, digest_size=16, key=tenant.salt).hexdigest()}


def _splice(raw: bytes, added: Mapping[str, Any]) -> bytes:
    """Put `added` at the end of the object: where a name occurs twice, JSON readers take the last."""
    if not added:
        return raw
    inner = raw.rstrip()[:-1].rstrip()
    comma = b"" if inner.endswith(b"{") else b","
    return inner + comma + orjson.dumps(added)[1:]
