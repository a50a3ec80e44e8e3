"""The web application: routes, error shapes, and what lives as long as the front end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from scheduler.identity import clean
from server import errors
from server import log as step_log
from server.auth import Keys
from server.control import Control
from server.core import Core
from server.errors import ApiError
from server.fleet import Fleet, follow
from server.memory import Memory, keep
from server.metrics import Metrics
from server.relay import Message, Receive, Send, upstream_client
from server.routes import inference, native
from server.state import State
from server.stored import ResponseIndex
from server.trace import Trace

log = structlog.get_logger("weft")


class Front:
    """The application. Steps go straight to their handlers: no middleware, no router wraps a token."""

    def __init__(self, app: FastAPI, steps: Mapping[str, inference.Handler]) -> None:
        self.app, self._steps = app, steps

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        handler = self._steps.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        scope["app"] = self.app
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except ApiError as error:
            response = _respond(request, error)
        except Exception as error:
            response = _unexpected(request, error)
        await response(scope, receive, send)


def build(core: Core, keys: Keys, fleet: Fleet, trace: Trace | None = None, memory: Memory | None = None) -> Front:
    """Put the front end together. `fleet` is watched while the application runs; `app.state.weft` is its `State`."""
    if memory is not None:
        for wrong in core.scheduler.knowledge.restore(memory.read()):
            log.warning("what was learned could not be read", what=wrong)
    core.scheduler.shares.weights, core.scheduler.quotas.of = keys.weights, keys.quotas
    metrics, responses = Metrics(core), ResponseIndex()
    core.watchers += [metrics.watch, responses.watch, step_log.watch]
    if trace is not None:
        core.watchers.append(trace.watch)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with upstream_client() as client:
            app.state.weft = State(core, keys, client, responses, memory)
            metrics.control = control = Control(core, client)
            tasks = [asyncio.create_task(work) for work in (core.tick(), follow(fleet, core, client), control.run())]
            if memory is not None:
                tasks.append(asyncio.create_task(keep(core, memory)))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
                if trace is not None:
                    trace.close()

    app = FastAPI(title="Weft", version=version("weft"), lifespan=lifespan, docs_url=None, redoc_url=None)
    steps = inference.attach(app)
    app.include_router(native.probes(metrics))
    app.include_router(native.native)
    _attach_errors(app)
    return Front(app, steps)


def _attach_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return _respond(request, error)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        text = {404: f"There is no route {request.scope['path']}", 405: f"{request.method} is not allowed here"}
        response = _respond(request, ApiError(error.status_code, text.get(error.status_code, str(error.detail))))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _respond(request, ApiError(422, str(first["msg"]), ".".join(map(str, first["loc"]))))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _unexpected(request, error)


def _unexpected(request: Request, error: Exception) -> Response:
    log.error("a request failed", path=request.scope["path"], exc_info=error)
    return _respond(request, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "Weft failed on this request."))


def _respond(request: Request, error: ApiError) -> Response:
    own = {"x-request-id": given} if (given := clean(request.headers.get("x-request-id"))) else None
    return errors.response(error, anthropic=errors.is_anthropic(request.scope["path"]), headers=own)
