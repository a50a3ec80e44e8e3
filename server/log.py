"""Logging: one structured line a step, no prompt text ever."""

from __future__ import annotations

import sys
from contextlib import suppress

import orjson
import structlog

from server.core import Attempt

log = structlog.get_logger("weft")


class _Sink(structlog.PrintLogger):
    """Standard error. A disk that is full or a terminal that has gone costs the line, never the step."""

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def configure(form: str) -> None:
    """Send log lines to standard error, as text for people or as JSON."""
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer(lambda line, **_: orjson.dumps(line, default=str).decode())
    elif sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=0)
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=lambda *_: _Sink(sys.stderr),
        cache_logger_on_first_use=True,
    )


def watch(attempt: Attempt) -> None:
    """Write the line of a step that ended. Times are in milliseconds."""
    call, dispatch, usage = attempt.call, attempt.dispatch, attempt.usage
    first, ended = attempt.first_token, attempt.finished or attempt.arrived
    log.info(
        "step",
        step=call.id,
        request=call.request_id,
        tenant=call.tenant.name,
        workflow=dispatch.workflow if dispatch else None,
        session=dispatch.session if dispatch else None,
        rule=attempt.rule,
        model=call.model,
        worker=dispatch.decision.worker if dispatch else None,
        decision=str(dispatch.decision) if dispatch else None,
        state=attempt.state,
        status=attempt.status,
        tries=len(attempt.tried),
        ttft_ms=None if first is None else round(1000 * (first - attempt.arrived), 1),
        total_ms=round(1000 * (ended - attempt.arrived), 1),
        prompt_tokens=usage.prompt,
        cached_tokens=usage.cached,
        output_tokens=usage.output,
    )
