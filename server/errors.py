"""Errors in the API's own shape: OpenAI's everywhere but on Anthropic's routes."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from starlette.responses import Response

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "invalid_api_key",
    404: "NotFoundError",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is refused. `retry_after` is in seconds, at most 60: clients give up at once above that."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after


def body(status: int, message: str, param: str | None = None, *, anthropic: bool = False) -> bytes:
    """The JSON error body of the API."""
    if anthropic:
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
    kind = _OPENAI_TYPES.get(status, "api_error")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


def response(error: ApiError, *, anthropic: bool = False, headers: dict[str, str] | None = None) -> Response:
    """The whole error response; a refusal that passes says so (`Retry-After`, `x-should-retry`)."""
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers |= {"retry-after": str(min(60, error.retry_after)), "x-should-retry": "true"}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    content = body(error.status, error.message, error.param, anthropic=anthropic)
    return Response(content, error.status, headers, media_type="application/json")


def is_anthropic(path: str) -> bool:
    """Whether a route speaks Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")
