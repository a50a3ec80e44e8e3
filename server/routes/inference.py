"""The hot routes, and what passes by them: OpenAI's and Anthropic's APIs, as vLLM implements them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from scheduler.identity import ANONYMOUS
from server.call import STEERING, Call, model_of, outgoing, parse, parse_object, read_body
from server.core import Endpoint
from server.dialects import Chat, Completions, Dialect, Messages, Responses
from server.errors import ApiError
from server.forward import forward
from server.relay import Exchange
from server.state import State, authenticate, state_of
from server.stored import Made

Handler = Callable[[Request], Awaitable[Response]]

STEPS: Mapping[str, type[Dialect]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completions,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
}
PASSED = (
    "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/v1/embeddings", "/v2/embed", "/pooling", "/classify",
    "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render",
    "/v1/responses/render",
)  # fmt: skip
"""vLLM's other public routes. What is not listed here (sleep, profile, cache resets, ...) is the operator's alone."""

_MULTIPART_STEERING = re.compile(rb'name="(%s)"\r\n' % b"|".join(name.encode() for name in (*STEERING, "vllm_xargs")))
_MULTIPART_MODEL = re.compile(rb'name="model"\r\n\r\n([^\r\n]{1,256})\r\n')


def attach(app: FastAPI) -> dict[str, Handler]:
    """Add the routes as plain handlers: unknown fields and the bytes themselves must survive.

    Returns the handlers of the steps, by path, for whoever can call them without going through `app`.
    """
    steps = {path: _step(dialect) for path, dialect in STEPS.items()}
    for path, handler in steps.items():
        app.add_route(path, handler, methods=["POST"])
    for path in PASSED:
        app.add_route(path, _pass, methods=["POST"])
    app.add_route("/v1/responses/{id}", _stored_response, methods=["GET"])
    app.add_route("/v1/responses/{id}/cancel", _stored_response, methods=["POST"])
    app.add_route("/v1/models", _models, methods=["GET"])
    app.add_route("/v1/models/{id:path}", _model, methods=["GET"])
    return steps


def _step(dialect: type[Dialect]) -> Handler:
    async def handle(request: Request) -> Response:
        state = state_of(request)
        tenant = authenticate(request)
        call = parse(request, await read_body(request), tenant, dialect, state.core.default_model)
        made = await _previous(state, call)
        if made and made.session and call.identity.rule == ANONYMOUS:
            who = dataclasses.replace(
                call.identity, workflow=made.workflow, session=made.session, rule="previous_response_id"
            )
            call = dataclasses.replace(call, identity=who)
        if state.core.draining and not state.core.knows(call):
            raise ApiError(503, "Weft is shutting down and takes no new workflow.", retry_after=30)
        return Exchange(call, state.core, state.client, made.worker if made else None)

    return handle


async def _previous(state: State, call: Call) -> Made | None:
    """Who made the response that this call goes on from. Raises ApiError 404 where that may be another tenant's."""
    response = call.fields.get("previous_response_id")
    if not isinstance(response, str) or not response:
        return None
    made = await state.responses.find(response, call.tenant.name, state)
    if made is None and state.keys.several:
        raise ApiError(404, f"Response with id {response!r} not found.", "previous_response_id")
    return made


async def _pass(request: Request) -> Response:
    state = state_of(request)
    tenant = authenticate(request)
    body = await read_body(request)
    if request.headers.get("content-type", "").startswith("multipart/"):
        if (steering := _MULTIPART_STEERING.search(body)) and not tenant.trusted:
            raise ApiError(400, f"`{steering[1].decode()}` is not for clients.", steering[1].decode())
        found = _MULTIPART_MODEL.search(body)
        model = found[1].decode("utf-8", "replace") if found else None
    else:
        fields = parse_object(body)
        model = model_of(fields)
        body = outgoing(body, fields, tenant)
    return await forward(request, body, _serving(state, model or state.core.default_model()), state.client)


def _serving(state: State, model: str) -> list[Endpoint]:
    """The workers of a model, least loaded first. Raises ApiError as the scheduler would refuse a step."""
    core = state.core
    found = [endpoint for endpoint in core.endpoints.values() if model in endpoint.models]
    if not found:
        raise core.missing(model)
    return sorted(found, key=lambda endpoint: (core.in_flight[endpoint.worker], endpoint.worker))


async def _stored_response(request: Request) -> Response:
    state = state_of(request)
    tenant = authenticate(request)
    wanted = request.path_params["id"]
    made = await state.responses.find(wanted, tenant.name, state)
    if made is None:
        raise ApiError(404, f"Response with id {wanted!r} not found.")
    endpoint = state.core.endpoints.get(made.worker)
    if endpoint is None:
        raise ApiError(503, "The worker that made this response is down.", retry_after=5)
    return await forward(request, await read_body(request), [endpoint], state.client)


async def _models(request: Request) -> Response:
    authenticate(request)
    return JSONResponse({"object": "list", "data": list(_union(state_of(request)).values())})


async def _model(request: Request) -> Response:
    authenticate(request)
    wanted = request.path_params["id"]
    card = _union(state_of(request)).get(wanted)
    if card is None:
        raise ApiError(404, f"The model `{wanted}` does not exist.", "model")
    return Response(orjson.dumps(card), media_type="application/json")


def _union(state: State) -> dict[str, Any]:
    """The model cards of all workers, as vLLM made them, each model once."""
    return {card["id"]: card for e in state.core.endpoints.values() for card in e.cards}
