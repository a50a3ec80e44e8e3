"""On whose account a request of vLLM runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcache.ledger import ANONYMOUS

if TYPE_CHECKING:
    from vllm.v1.request import Request


def owners_of(request: Request) -> tuple[str, str | None]:
    """The branch and the role on whose account a request runs: `BRANCH.ROLE` in its session id.

    A vLLM whose requests have none is sent it among the extra arguments of the sampling.
    """
    name = getattr(request, "session_id", None)
    if name is None and (params := getattr(request, "sampling_params", None)) is not None:
        name = (getattr(params, "extra_args", None) or {}).get("session_id")
    branch, _, role = (name if isinstance(name, str) else "").partition(".")
    return branch or ANONYMOUS, role or None
