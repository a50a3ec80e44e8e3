"""vLLM's queue of waiting requests, by the priority of their owners: changeable while they wait, else as they came."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue

if TYPE_CHECKING:
    from vllm.v1.request import Request

Entry = tuple[float, int, "Request"]


class StepQueue(RequestQueue):  # type: ignore[misc]
    """Requests by priority, the lowest first; of equals those put in front, then those that came first.

    `priority` is asked when a request comes and at `reordered`. All equal, it is vLLM's first come, first served.
    """

    def __init__(self, priority: Callable[[Request], float]) -> None:
        self._priority = priority
        self._heap: list[Entry] = []
        self._entries: dict[str, Entry] = {}
        self._first = self._last = 0

    def add_request(self, request: Request) -> None:
        """Put a request behind all of its priority."""
        self._last += 1
        self._push(request, self._last)

    def prepend_request(self, request: Request) -> None:
        """Put a request before all of its priority."""
        self._first -= 1
        self._push(request, self._first)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests before all of their priority, the last of them first."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Request:
        """The first request. IndexError where there is none."""
        while self._heap:
            entry = self._heap[0]
            if self._entries.get(entry[2].request_id) is entry:
                return entry[2]
            heapq.heappop(self._heap)
        raise IndexError("peek from an empty queue")

    def pop_request(self) -> Request:
        """Take the first request. IndexError where there is none."""
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._entries[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        """Take this request. ValueError where it is not here."""
        if self._entries.pop(request.request_id, None) is None:
            raise ValueError(f"{request.request_id} does not wait")
        self._shrink()

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take those of these requests that are here."""
        for request in requests:
            self._entries.pop(request.request_id, None)
        self._shrink()

    def reordered(self, requests: Iterable[Request]) -> None:
        """The priority of these requests has changed; they keep their place among equals."""
        for request in requests:
            if (old := self._entries.get(request.request_id)) is not None:
                self._push(request, old[1])
        self._shrink()

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in sorted(self._entries.values(), key=lambda entry: entry[:2]))

    def _push(self, request: Request, place: int) -> None:
        entry = (self._priority(request), place, request)
        self._entries[request.request_id] = entry
        heapq.heappush(self._heap, entry)

    def _shrink(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
