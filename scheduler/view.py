"""The state of the core as plain values, for the native API. Times are epoch seconds, lengths are tokens."""

from __future__ import annotations

from typing import Any

from scheduler.graph import Session, Step, Workflow
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


def detail(workflow: Workflow) -> dict[str, Any]:
    """`GET /v1/workflows/{id}`: the run graph."""
    return {
        "workflow": workflow.id,
        "tenant": workflow.tenant,
        "template": workflow.template,
        "state": workflow.state,
        "sessions": [_session(session) for session in workflow.sessions.values()],
        "steps": [_step(step) for step in workflow.steps],
    }


def worker(seen: Worker) -> dict[str, Any]:
    """One row of `GET /v1/workers`."""
    return {
        "worker": seen.id,
        "pool": seen.pool,
        "models": sorted(seen.models),
        "state": seen.state,
        "kv_tokens": seen.kv_tokens,
        "running_steps": len(seen.running),
        "live_sessions": len(seen.sessions),
    }


def _session(session: Session) -> dict[str, Any]:
    seats = [name for name, _ in session.seats.values()]
    return {
        "id": session.id,
        "role": session.role,
        "parent": session.parent,
        "worker": seats[-1] if seats else None,
        "state": session.state,
    }


def _step(step: Step) -> dict[str, Any]:
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
        "state": step.state,
        "arrived": step.arrived,
        "first_token": step.first_token,
        "finished": step.finished,
        "prompt_tokens": step.usage.prompt,
        "cached_tokens": step.usage.cached,
        "output_tokens": step.usage.output,
        "decision": str(step.decision) if step.decision else None,
    }
