"""Foresight: how soon each role of a run can run, from its template and from where it stands.

Steps-to-execution as in KVFlow (section 1.2: running = 0, AND = max + 1, OR = min + 1, loops legal), for k-of-n the
k-th smallest + 1, by Knuth's generalisation of Dijkstra's algorithm (1977): O(E log E). Next use is the same recursion
in seconds. The chance of a role is that of the way by which it runs earliest: the product of its edges, at a join that
of the least likely arrival.
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


_Arrival = tuple[float, int, _Edge, float, float]
"""Tokens that arrive at a role: time, number, edge, tokens, the chance that they do."""


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
        return self._named(position, self._earliest(position, {}, self._steps, 1.0)[0])

    def next_use(self, position: Position, left: Mapping[str, float] | None = None) -> dict[str, float]:
        """Seconds until each role can run, at the earliest. `left`: seconds left of the steps that run, else all less
        what has passed. What should have come long ago is not waited for.
        """
        return self._named(position, self._earliest(position, self._left(position, left), self._seconds, None)[0])

    def next_need(self, position: Position) -> dict[str, float]:
        """`next_use` over the chance that it comes to that: what is needed in t seconds with chance p is worth keeping
        as what is surely needed in t / p, both by their retention index.
        """
        start, chance = self._earliest(position, self._left(position, None), self._seconds, None)
        return self._named(position, [time / p for time, p in zip(start, chance, strict=True)])

    def _named(self, position: Position, start: list[float]) -> dict[str, float]:
        return {role: 0.0 if position.running.get(role) else start[i] for i, role in enumerate(self.template.order)}

    def _left(self, position: Position, left: Mapping[str, float] | None) -> dict[str, float]:
        given = left or {}
        return {
            role: max(0.0, given.get(role, self._seconds[self._place[role]] - position.runs.get(role, 0.0)))
            for role in position.running
            if role in self._place
        }

    def _at_hand(self, position: Position, left: Mapping[str, float], unit: float | None) -> list[_Arrival]:
        """When the tokens of the steps that run or have finished arrive."""
        hand: list[_Arrival] = []
        for steps, waits in ((position.running, left), (position.finished, {})):
            for role, number in steps.items():
                passed = 0.0 if unit is not None or steps is position.running else position.rests.get(role, 0.0)
                for edge in self._out[self._place[role]] if role in self._place else ():
                    if passed > edge.gap + max(edge.gap, PATIENCE):
                        continue
                    time = waits.get(role, 0.0) + (max(0.0, edge.gap - passed) if unit is None else unit)
                    hand.append((time, len(hand), edge, number * edge.count, edge.probability))
        for key, tokens in position.open.items():
            if found := self._edges.get(key):
                hand.append((found.gap if unit is None else unit, len(hand), found, tokens, found.probability))
        return hand

    def _earliest(
        self, position: Position, left: Mapping[str, float], seconds: list[float], unit: float | None
    ) -> tuple[list[float], list[float]]:
        """Settle roles in the order of their earliest start; an edge costs `unit`, or its gap where that is None.

        Returns when each role starts, and with what chance.
        """
        heap = self._at_hand(position, left, unit)
        waits, missing = self._awaited(position, heap) if self._barriers else ({}, {})
        heapq.heapify(heap)
        number = len(heap)
        need = list(self._needs)
        start, chance = [NEVER] * len(self._joins), [1.0] * len(self._joins)
        while heap:
            time, _, edge, tokens, likely = heapq.heappop(heap)
            role = edge.target
            if start[role] < NEVER:
                continue
            chance[role] = min(chance[role], likely)
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
                tokens = ahead.count * self._width[role]
                heapq.heappush(heap, (arrival, number, ahead, tokens, chance[role] * ahead.probability))
        return start, chance

    def _awaited(self, position: Position, hand: list[_Arrival]) -> tuple[dict[_Edge, int], dict[int, int]]:
        """Per edge into an "all", how many arrivals it waits for, and per "all" how many of its edges wait.

        It waits for the steps that run or have finished, and for a future one where there are none, or where the steps
        before have more to bring. A source that cannot run at all is not waited for.
        """
        waits: dict[_Edge, int] = {}
        for _, _, edge, _, _ in hand:
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
