"""vLLM's queues of waiting requests, in another order while they wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request


def reorder(queues: Iterable[RequestQueue], told: Mapping[Request, float]) -> None:
    """Give these requests their priorities, the lowest first, wherever they are: in one of the queues, or running.

    The queues are vLLM's own, by `Request.priority`; so is the choice of whom to preempt.
    """
    told = {request: priority for request, priority in told.items() if request.priority != priority}
    if not told:
        return
    waiting = [(queue, [request for request in queue if request in told]) for queue in queues]
    for queue, requests in waiting:
        queue.remove_requests(requests)
    for request, priority in told.items():
        request.priority = priority
    for queue, requests in waiting:
        for request in requests:
            queue.add_request(request)
