"""The state of the core as plain values, for the native API. Times are epoch seconds, lengths are tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scheduler.admission import Gate
from scheduler.gaps import Gap
from scheduler.graph import Session, Step, Workflow
from scheduler.knowledge import Ahead, Knowledge, latest
from scheduler.pledges import Pledge
from scheduler.workers import Worker


def summary(workflow: Workflow) -> dict[str, Any]:
    """One row of `GET /v1/workflows`."""
    return {
        "workflow": workflow.id,
        "tenant": workflow.tenant,
        "template": workflow.template,
        "state": workflow.state,
        "sessions": len(workflow.sessions),
        "steps": len(workflow.steps),
        "arrived": workflow.arrived,
        "touched": workflow.touched,
    }


def detail(workflow: Workflow, knowledge: Knowledge, workers: Mapping[str, Worker], gate: Gate) -> dict[str, Any]:
    """`GET /v1/workflows/{id}`: the run graph, and what is expected of it."""
    return {
        "workflow": workflow.id,
        "tenant": workflow.tenant,
        "template": workflow.template,
        "state": workflow.state,
        "sessions": [_session(session, knowledge, workers) for session in workflow.sessions.values()],
        "steps": [_step(step, gate) for step in workflow.steps],
        "ahead": None if workflow.finished else _ahead(knowledge.ahead(workflow)),
        "asked": _asked(workflow.pledge, workflow.spent) if workflow.pledge else None,
    }


def _asked(pledge: Pledge, spent: int) -> dict[str, Any]:
    """What the client asked of the run, and how likely that was when its latest step came."""
    return {
        "deadline": _finite(pledge.until),
        "token_budget": _finite(pledge.budget),
        "spent_tokens": spent,
        "strict": pledge.strict,
        **pledge.terms,
    }


def _ahead(ahead: Ahead) -> dict[str, Any]:
    rest = ahead.remaining
    roles = {
        role: {
            "steps_to_execution": _finite(steps),
            "next_use_seconds": _finite(ahead.next_use_seconds[role]),
            "probability": ahead.probability[role],
        }
        for role, steps in ahead.steps_to_execution.items()
    }
    return {
        "template": ahead.template,
        "declared": ahead.declared,
        "confidence": rest.confidence,
        "steps": rest.steps,
        "prompt_tokens": rest.prompt_tokens,
        "output_tokens": rest.output_tokens,
        "work_seconds": rest.work_seconds,
        "critical_seconds": rest.critical_seconds,
        "critical_path": list(rest.critical_path),
        "roles": roles,
        "next": {role or "": chance for role, chance in ahead.next.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def worker(seen: Worker, gate: Gate) -> dict[str, Any]:
    """One row of `GET /v1/workers`."""
    book = gate.book(seen)
    return {
        "worker": seen.id,
        "pool": seen.pool,
        "models": sorted(seen.models),
        "state": seen.state,
        "kv_tokens": seen.kv_tokens,
        "host_tokens": seen.host_tokens,
        "resident_owners": len(seen.residency),
        "running_steps": len(seen.running),
        "live_sessions": len(seen.sessions),
        "capacity_tokens": book.capacity,
        "claimed_tokens": book.claimed,
        "held_steps": book.holds,
    }


def _session(session: Session, knowledge: Knowledge, workers: Mapping[str, Worker]) -> dict[str, Any]:
    seats = [name for name, _ in session.seats.values()]
    waits = session.state == "waiting" and (branch := latest(session)) is not None
    return {
        "id": session.id,
        "role": session.role,
        "parent": session.parent,
        "worker": seats[-1] if seats else None,
        "state": session.state,
        "resident": _resident(session, workers),
        "returns": _returns(knowledge.gap(branch)) if waits and branch else None,
    }


def _resident(session: Session, workers: Mapping[str, Worker]) -> dict[str, int]:
    """Of its latest branch, on all workers."""
    branch = latest(session)
    held = [workers[name].residency.tokens(branch.id) for name, _ in session.seats.values()] if branch else []
    return {"device": sum(device for device, _ in held), "host": sum(host for _, host in held)}


def _returns(gap: Gap) -> dict[str, float]:
    """From the end of its last step, in seconds, if it does; and the chance that it never does."""
    return {"p50": gap.quantile(0.5), "p90": gap.quantile(0.9), "p99": gap.quantile(0.99), "never": gap.never}


def _held(step: Step, gate: Gate) -> dict[str, Any] | None:
    """Where a step waits, and until when at most."""
    found = gate.held.get(step.id)
    if found is None:
        return None
    held, book, _ = found
    return {"worker": book.worker.id, "since": held.since, "deadline": held.deadline, "tokens": held.tokens}


def _step(step: Step, gate: Gate) -> dict[str, Any]:
    held = _held(step, gate)
    return {
        "id": step.id,
        "session": step.session.id,
        "branch": step.branch.id,
        "role": step.role,
        "after": list(step.after),
        "rule": step.rule,
        "tools": list(step.tools),
        "gap_seconds": step.gap,
        "model": step.model,
        "worker": step.decision.worker if step.decision else None,
        "state": "held" if held else step.state,
        "held": held,
        "arrived": step.arrived,
        "first_token": step.first_token,
        "finished": step.finished,
        "prompt_tokens": step.usage.prompt,
        "cached_tokens": step.usage.cached,
        "output_tokens": step.usage.output,
        "decision": str(step.decision) if step.decision else None,
    }
