"""Priorities that change while requests wait in vLLM's own queue."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import PriorityRequestQueue

from kvcache.plugin.waiting import reorder


@dataclass(eq=False)
class Request:
    """As much of vLLM's as a queue asks of it."""

    request_id: int
    priority: float = 0

    def __lt__(self, other: Request) -> bool:
        return (self.priority, self.request_id) < (other.priority, other.request_id)


told = st.dictionaries(st.integers(0, 9), st.integers(-2, 2) | st.floats(-2, 2))


@given(st.lists(st.sampled_from(["waiting", "holding", "running"]), min_size=10, max_size=10), st.lists(told))
def test_all_stay_where_they_are_in_the_order_of_their_latest_priorities(places: list[str], said: list[dict]) -> None:
    queues = {"waiting": PriorityRequestQueue(), "holding": PriorityRequestQueue()}
    requests = [Request(number) for number in range(10)]
    for request, place in zip(requests, places, strict=True):
        if place in queues:
            queues[place].add_request(request)
    for priorities in said:
        reorder(queues.values(), {requests[number]: priority for number, priority in priorities.items()})
        for number, priority in priorities.items():
            assert requests[number].priority == priority
        for name, queue in queues.items():
            mine = [request for request, place in zip(requests, places, strict=True) if place == name]
            assert list(queue) == sorted(mine)
            assert not queue or queue.peek_request() is min(mine)
