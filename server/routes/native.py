"""Weft's own routes: workflows, workers, and what operators probe. Typed, so that OpenAPI describes them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from starlette.requests import Request

from scheduler import view
from scheduler.events import WorkflowFinished
from scheduler.template import Template
from server.call import parse_object, read_body
from server.errors import ApiError
from server.metrics import Metrics
from server.state import authenticate, state_of


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


class WorkflowRow(BaseModel):
    """One workflow. Times are epoch seconds."""

    workflow: str
    tenant: str
    template: str | None
    state: str
    sessions: int
    steps: int
    arrived: float
    touched: float


class WorkflowList(BaseModel):
    """The tenant's workflows, the latest active first."""

    workflows: list[WorkflowRow]


class Returns(BaseModel):
    """When a waiting session's next step is expected: quantiles of the gap in seconds, and that it never comes."""

    p50: float
    p90: float
    p99: float
    never: float


class Resident(BaseModel):
    """Tokens of KV that lie on the device and in the host tier; guessed where the engine does not report."""

    device: int
    host: int


class SessionRow(BaseModel):
    """One growing context of a workflow."""

    id: str
    role: str | None
    parent: str | None
    worker: str | None
    state: str
    resident: Resident
    returns: Returns | None


class HeldRow(BaseModel):
    """Where a step waits, since when, until when at most (epoch seconds), and the tokens its context will have."""

    worker: str
    since: float
    deadline: float
    tokens: int


class StepRow(BaseModel):
    """One LLM call. Times are epoch seconds, None until they happen."""

    id: str
    session: str
    branch: str
    role: str | None
    after: list[str]
    rule: str
    tools: list[str]
    gap_seconds: float | None
    model: str
    worker: str | None
    state: str
    held: HeldRow | None
    arrived: float
    first_token: float | None
    finished: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    decision: str | None


class RoleAhead(BaseModel):
    """When a role runs next: in steps and seconds at the earliest, None where it cannot; and how likely it does."""

    steps_to_execution: float | None
    next_use_seconds: float | None
    probability: float


class AheadRow(BaseModel):
    """What is expected of a workflow from now on, as its template has it; `confidence` is in 0..1.

    `next` gives the chance of each role to follow the step that ended last, under "" that none does.
    """

    template: str
    declared: bool
    confidence: float
    steps: float
    prompt_tokens: float
    output_tokens: float
    work_seconds: float
    critical_seconds: float
    critical_path: list[str]
    roles: dict[str, RoleAhead]
    next: dict[str, float]


class TemplateRow(BaseModel):
    """How the runs of one agent program go. `declared` by a client, or learned from its runs.

    `believed` is what becomes of a declaration with what its runs have shown; null of what is learned.
    """

    name: str
    declared: bool
    nodes: dict[str, dict[str, Any]]
    edges: list[dict[str, Any]]
    starts: list[str]
    believed: dict[str, Any] | None = None


class AskedRow(BaseModel):
    """What the client asked of a run, and how likely that was when its latest step came."""

    deadline: float | None
    token_budget: float | None
    spent_tokens: int
    strict: bool
    in_time_probability: float | None = None
    in_budget_probability: float | None = None


class WorkflowDetail(BaseModel):
    """A workflow's run graph, and what is ahead of it."""

    workflow: str
    tenant: str
    template: str | None
    state: str
    sessions: list[SessionRow]
    steps: list[StepRow]
    ahead: AheadRow | None
    asked: AskedRow | None


class WorkerRow(BaseModel):
    """One vLLM engine. `engine` is what its plug-in says it can do, empty without the plug-in."""

    worker: str
    pool: str
    models: list[str]
    state: str
    kv_tokens: int
    host_tokens: int
    resident_owners: int
    engine: dict[str, Any]
    running_steps: int
    live_sessions: int
    capacity_tokens: int
    claimed_tokens: int
    held_steps: int


class WorkerList(BaseModel):
    """All workers."""

    workers: list[WorkerRow]


class Version(BaseModel):
    """What runs here: Weft, and the vLLM of each worker that is up."""

    version: str
    workers: dict[str, str]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


native = APIRouter()


@native.get("/v1/workflows", responses=_errors(401, 422))
async def workflows(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> WorkflowList:
    """The workflows that the caller's tenant has run lately."""
    tenant, graph = authenticate(request), state_of(request).core.scheduler.graph
    found = [w for w, _ in zip(graph.of_tenant(tenant.name), range(limit), strict=False)]
    return WorkflowList(workflows=[WorkflowRow(**view.summary(w)) for w in found])


_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
_AMOUNT = {"type": ["number", "null"], "minimum": 0, "maximum": 1e9}
_NODE = {
    "join": {"anyOf": [{"enum": ["any", "all"]}, {"type": "number", "minimum": 1, "maximum": 1e6}]},
    "fork": {"enum": ["one", "all"]},
    **dict.fromkeys(("prompt_tokens", "output_tokens", "seconds"), _AMOUNT),
    "model": _NAME,
}
_EDGE = {
    "from": _NAME,
    "to": _NAME,
    "probability": {"type": "number", "minimum": 0, "maximum": 1},
    "gap_seconds": _AMOUNT,
    "count": {"type": "number", "minimum": 1, "maximum": 10_000},
}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


_TEMPLATE = _object(
    {
        "nodes": {"type": "object", "minProperties": 1, "maxProperties": 1000, "additionalProperties": _object(_NODE)},
        "edges": {"type": "array", "maxItems": 10_000, "items": _object(_EDGE, "from", "to")},
        "starts": {"type": "array", "minItems": 1, "items": _NAME},
    },
    "nodes",
)
_DECLARATION = {"requestBody": {"required": True, "content": {"application/json": {"schema": _TEMPLATE}}}}


@native.put("/v1/workflows/templates/{name}", responses=_errors(400, 401, 413), openapi_extra=_DECLARATION)
async def declare(request: Request, name: str) -> TemplateRow:
    """Declare how the runs of `name` go. It counts at once, also for runs under way, as ten steps of each role."""
    tenant, state = authenticate(request), state_of(request)
    document = parse_object(await read_body(request))
    try:
        template = Template.parse(name, document)
        state.core.scheduler.knowledge.declare(tenant.name, template)
    except ValueError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from None
    await state.save()
    return TemplateRow(name=name, declared=True, **template.document())


@native.get("/v1/workflows/templates/{name}", responses=_errors(401, 404))
async def template_detail(request: Request, name: str) -> TemplateRow:
    """A template: as it was declared and what is believed of it, else as far as it is learned."""
    tenant, knowledge = authenticate(request), state_of(request).core.scheduler.knowledge
    found = knowledge.template(tenant.name, name)
    if found is None:
        raise ApiError(404, f"No template {name!r} is known.")
    declared = knowledge.declared.get((tenant.name, name))
    believed = found.document() if declared is not None else None
    return TemplateRow(name=name, declared=declared is not None, believed=believed, **(declared or found).document())


@native.get("/v1/workflows/{workflow:path}", responses=_errors(401, 404))
async def workflow_detail(request: Request, workflow: str) -> WorkflowDetail:
    """One workflow: its sessions, its steps, what each followed and why it went where it went."""
    tenant = authenticate(request)
    scheduler = state_of(request).core.scheduler
    found = scheduler.graph.get(tenant.name, workflow)
    if found is None:
        raise ApiError(404, f"No workflow {workflow!r} is known.")
    return WorkflowDetail(**view.detail(found, scheduler.knowledge, scheduler.workers, scheduler.gate))


@native.post("/v1/workflows/{workflow:path}/finish", responses=_errors(401, 404))
async def finish(request: Request, workflow: str) -> WorkflowRow:
    """The workflow makes no further call: what it holds may go."""
    tenant, core = authenticate(request), state_of(request).core
    found = core.scheduler.graph.get(tenant.name, workflow)
    if found is None:
        raise ApiError(404, f"No workflow {workflow!r} is known.")
    core.tell(WorkflowFinished(tenant.name, workflow))
    return WorkflowRow(**view.summary(found))


@native.get("/v1/workers", responses=_errors(401))
async def workers(request: Request) -> WorkerList:
    """The workers: what each serves and what runs on it."""
    authenticate(request)
    core = state_of(request).core
    able = {name: endpoint.abilities for name, endpoint in core.endpoints.items()}
    rows = [
        WorkerRow(engine=dict(able.get(w.id, {})), **view.worker(w, core.scheduler.gate))
        for w in core.scheduler.workers.values()
    ]
    return WorkerList(workers=rows)


def probes(metrics: Metrics) -> APIRouter:
    """What operators and orchestrators ask: never behind user keys."""
    router = APIRouter()

    @router.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the process lives."""
        return Response()

    @router.get("/ready", response_class=Response, responses={503: {"description": "No worker is up, or draining"}})
    async def ready(request: Request) -> Response:
        """200 while a worker can serve and new work is welcome."""
        return Response(status_code=200 if state_of(request).core.ready else 503)

    @router.get("/version")
    async def versions(request: Request) -> Version:
        """Versions."""
        endpoints = state_of(request).core.endpoints.values()
        return Version(version=version("weft"), workers={e.worker: e.version for e in endpoints})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Prometheus metrics."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
