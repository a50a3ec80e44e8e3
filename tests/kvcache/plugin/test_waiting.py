"""The queue of waiting requests beside vLLM's first come, first served."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from kvcache.plugin.waiting import StepQueue


@dataclass(eq=False)
class Request:
    """As much of vLLM's as a queue asks of it."""

    request_id: str

    def __lt__(self, other: Request) -> bool:
        return self.request_id < other.request_id


@given(st.lists(st.tuples(st.sampled_from(["add", "prepend", "prepend all", "pop", "remove"]), st.integers(0, 9))))
def test_with_no_priorities_it_is_first_come_first_served(does: list[tuple[str, int]]) -> None:
    ours, stock, count = StepQueue(lambda request: 0.0), FCFSRequestQueue(), 0
    for what, place in does:
        made = [Request(str(count + n)) for n in range(3)]
        count += 3
        for queue in (ours, stock):
            if what == "add":
                queue.add_request(made[0])
            elif what == "prepend":
                queue.prepend_request(made[0])
            elif what == "prepend all":
                queue.prepend_requests(made)
            elif what == "pop" and queue:
                queue.pop_request()
            elif what == "remove" and len(queue) > place:
                queue.remove_requests([list(queue)[place]])
        assert list(ours) == list(stock)
        assert len(ours) == len(stock)
        assert bool(ours) == bool(stock)
        if stock:
            assert ours.peek_request() is stock.peek_request()


def test_a_priority_changes_while_they_wait_and_equals_keep_their_places() -> None:
    priority = dict.fromkeys("abc", 0.0)
    queue, requests = StepQueue(lambda request: priority[request.request_id]), {name: Request(name) for name in "abc"}
    for request in requests.values():
        queue.add_request(request)
    priority |= {"c": -1.0, "a": 5.0}
    queue.reordered(requests.values())
    assert [request.request_id for request in queue] == ["c", "b", "a"]
    priority["a"] = 0.0
    queue.reordered([requests["a"]])
    assert [queue.pop_request().request_id for _ in range(3)] == ["c", "a", "b"]
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove_request(requests["a"])
