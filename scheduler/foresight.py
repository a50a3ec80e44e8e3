"""Foresight: how soon each role of a run can run, from its template and from where it stands.

Steps-to-execution as in KVFlow (section 1.2: running = 0, AND = max + 1, OR = min + 1, loops legal), for k-of-n the
k-th smallest + 1, by Knuth's generalisation of Dijkstra's algorithm (1977): O(E log E). Next use is the same recursion
in seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.position import Position
from scheduler.template import ALL, ANY, EPSILON, Key, Template

NEVER = float("inf")
PATIENCE = 10.0  # seconds by which a step may be late, or as long as its gap if that is more
DUE = 0.5  # probability of an edge, from which a join waits for the step that it leads to


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """An edge between places in the template's order."""

    source: int
    target: int
    probability: float
    count: float
    gap: float
    back: bool


class Foresight:
    """A template made ready for its earliest times. Keep one per version of a template; positions come and go.

    Edges of a probability under `floor` do not count. Roles that the template does not know are left out.
    """

    def __init__(self, template: Template, floor: float = 0.0) -> None:
        self.template = template
        self._place = place = {role: i for i, role in enumerate(template.order)}
        self._joins = [template.nodes[role].join for role in template.order]
        self._seconds = [template.nodes[role].seconds or 0.0 for role in template.order]
        self._steps = [0.0] * len(self._joins)
        self._width = [template.width[role] for role in template.order]
        self._needs = [1.0 if join in (ANY, ALL) else float(int(float(join) + EPSILON)) for join in self._joins]
        self._edges: dict[Key, _Edge] = {}
        self._out: list[list[_Edge]] = [[] for _ in self._joins]
        self._barriers: dict[int, list[_Edge]] = {i: [] for i, join in enumerate(self._joins) if join == ALL}
        for e in template.edges:
            if e.probability < floor or not e.probability:
                continue
            source, target = place[e.source], place[e.target]
            edge = _Edge(source, target, e.probability, e.count, e.gap_seconds or 0.0, source >= target)
            self._edges[e.source, e.target] = edge
            self._out[source].append(edge)
            if target in self._barriers and not edge.back:
                self._barriers[target].append(edge)

    def repeats(self, role: str) -> bool:
        """Whether a step of the role can come right after another one."""
        return (role, role) in self._edges

    def steps_to_execution(self, position: Position) -> dict[str, float]:
        """The earliest number of steps until each role runs: 0 where it does, infinity where it cannot (KVFlow 1.2).

        An "all" waits for the running and the expected steps before it, and for no source that cannot run any more.
        """
        return self._earliest(position, {}, self._steps, 1.0)

    def next_use(self, position: Position, left: Mapping[str, float] | None = None) -> dict[str, float]:
        """Seconds until each role can run, at the earliest. `left`: seconds left of the steps that run, else all less
        what has passed. What should have come long ago is not waited for.
        """
        return self._earliest(position, self._left(position, left), self._seconds, None)

    def _left(self, position: Position, left: Mapping[str, float] | None) -> dict[str, float]:
        given = left or {}
        return {
            role: max(0.0, given.get(role, self._seconds[self._place[role]] - position.runs.get(role, 0.0)))
            for role in position.running
            if role in self._place
        }

    def _at_hand(
        self, position: Position, left: Mapping[str, float], unit: float | None
    ) -> list[tuple[float, int, _Edge, float]]:
        """When the tokens of the steps that run or have finished arrive: (time, number, edge, tokens)."""
        hand: list[tuple[float, int, _Edge, float]] = []
        for steps, waits in ((position.running, left), (position.finished, {})):
            for role, number in steps.items():
                passed = 0.0 if unit is not None or steps is position.running else position.rests.get(role, 0.0)
                for edge in self._out[self._place[role]] if role in self._place else ():
                    if passed > edge.gap + max(edge.gap, PATIENCE):
                        continue
                    time = waits.get(role, 0.0) + (max(0.0, edge.gap - passed) if unit is None else unit)
                    hand.append((time, len(hand), edge, number * edge.count))
        for key, tokens in position.open.items():
            if found := self._edges.get(key):
                hand.append((found.gap if unit is None else unit, len(hand), found, tokens))
        return hand

    def _earliest(
        self, position: Position, left: Mapping[str, float], seconds: list[float], unit: float | None
    ) -> dict[str, float]:
        """Settle roles in the order of their earliest start; an edge costs `unit`, or its gap where that is None."""
        heap = self._at_hand(position, left, unit)
        waits, missing = self._awaited(position, heap) if self._barriers else ({}, {})
        heapq.heapify(heap)
        number = len(heap)
        need = list(self._needs)
        start = [NEVER] * len(self._joins)
        while heap:
            time, _, edge, tokens = heapq.heappop(heap)
            role = edge.target
            if start[role] < NEVER:
                continue
            if role not in missing:
                need[role] -= tokens
            elif edge.back:
                need[role] = 0.0
            else:
                waits[edge] -= 1
                missing[role] -= not waits[edge]
                need[role] = missing[role]
            if need[role] > EPSILON:
                continue
            start[role] = time
            for ahead in self._out[role]:
                number += 1
                arrival = time + seconds[role] + (ahead.gap if unit is None else unit)
                heapq.heappush(heap, (arrival, number, ahead, ahead.count * self._width[role]))
        running = position.running
        return {role: 0.0 if running.get(role) else start[i] for i, role in enumerate(self.template.order)}

    def _awaited(
        self, position: Position, hand: list[tuple[float, int, _Edge, float]]
    ) -> tuple[dict[_Edge, int], dict[int, int]]:
        """Per edge into an "all", how many arrivals it waits for, and per "all" how many of its edges wait.

        It waits for the steps that run or have finished, and for a future one where there are none, or where the steps
        before have more to bring. A source that cannot run at all is not waited for.
        """
        waits: dict[_Edge, int] = {}
        for _, _, edge, _ in hand:
            waits[edge] = waits.get(edge, 0) + 1
        due = {edge.target for edge in waits if edge.probability >= DUE and not edge.back}
        walk = [edge.target for edge in waits]
        reached = set(walk)
        while walk:
            for edge in self._out[walk.pop()]:
                if edge.target not in reached:
                    reached.add(edge.target)
                    walk.append(edge.target)
        missing: dict[int, int] = {}
        for role, edges in self._barriers.items():
            missing[role] = 0
            for edge in edges:
                source = edge.source
                future = source in reached and (
                    edge not in waits or (source in due and self._joins[source] in (ANY, ALL))
                )
                waits[edge] = waits.get(edge, 0) + future
                missing[role] += waits[edge] > 0
        return waits, missing
