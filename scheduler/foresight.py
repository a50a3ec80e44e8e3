"""Foresight: what a run will do next, from its template and from where it stands.

Steps-to-execution as in KVFlow (section 1.2: running = 0, AND = max + 1, OR = min + 1, loops legal), for k-of-n the
k-th smallest + 1, by Knuth's generalisation of Dijkstra's algorithm (1977): O(E log E). Next use is the same recursion
in seconds. Visits, reach and remaining work are expectations of the game of tokens that `scheduler.template` describes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from scheduler.position import Position
from scheduler.template import ALL, ANY, EPSILON, ONE, Template

NEVER = float("inf")
MOST_VISITS = 1000.0  # expected of a role in a loop without an exit
LONGEST = 1e7  # seconds of a line without an end
SWEEPS, STRIDE, CLOSE = 64, 8, 1e-9
DUE = 0.5  # probability of an edge, from which a join waits for the step that it leads to


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is expected of a run from now on.

    `steps` and tokens are of steps that have not started; `work_seconds` adds what is left of the running ones.
    `critical_seconds` is the longest line of steps and gaps to the end, `critical_path` the roles that weigh most on
    it, first the one that runs or has finished. `confidence` in 0..1 is that of the roles, by their expected steps.
    """

    steps: float
    prompt_tokens: float
    output_tokens: float
    work_seconds: float
    critical_seconds: float
    critical_path: tuple[str, ...]
    confidence: float


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """An edge between places in the template's order; `tokens` come on average of one step of the source."""

    source: int
    target: int
    probability: float
    count: float
    tokens: float
    gap: float
    back: bool


class Foresight:
    """A template made ready for evaluation. Keep one per version of a template; positions come and go.

    `floor`: edges of a smaller probability do not count for the earliest time (`steps_to_execution`, `next_use`).
    Roles that the template does not know are left out.
    """

    def __init__(self, template: Template, floor: float = 0.0) -> None:
        self.template = template
        self.floor = floor
        self._place = place = {role: i for i, role in enumerate(template.order)}
        self._nodes = [template.nodes[role] for role in template.order]
        self._seconds = [node.seconds or 0.0 for node in self._nodes]
        self._width = [template.width[role] for role in template.order]
        self._takes = [node.takes or (1.0 if node.join in (ANY, ALL) else float(node.join)) for node in self._nodes]
        self._out: list[list[_Edge]] = [[] for _ in self._nodes]
        self._into: list[list[_Edge]] = [[] for _ in self._nodes]
        self._edges: dict[tuple[str, str], _Edge] = {}
        for e in template.edges:
            source, target = place[e.source], place[e.target]
            tokens, gap = e.probability * e.count, e.gap_seconds or 0.0
            edge = _Edge(source, target, e.probability, e.count, tokens, gap, source >= target)
            self._edges[e.source, e.target] = edge
            self._out[source].append(edge)
            self._into[target].append(edge)
        self._likely = [[e for e in out if e.probability >= floor and e.probability > 0] for out in self._out]
        self._barriers: dict[int, list[_Edge]] = {i: [] for i, node in enumerate(self._nodes) if node.join == ALL}
        for edge in (e for out in self._likely for e in out if e.target in self._barriers and not e.back):
            self._barriers[edge.target].append(edge)
        self._blocks = _blocks(len(self._nodes), self._edges.values())
        self._again: dict[int, float] = {}
        self._ahead: list[float] | None = None

    def steps_to_execution(self, position: Position) -> dict[str, float]:
        """The earliest number of steps until each role runs: 0 where it does, infinity where it cannot (KVFlow 1.2).

        An "all" waits for the running and the expected steps before it, and for no source that cannot run any more.
        """
        return self._earliest(position, {}, [0.0] * len(self._nodes), 1.0)

    def next_use(self, position: Position, left: Mapping[str, float] | None = None) -> dict[str, float]:
        """Seconds until each role can run, at the earliest. `left`: seconds left of the steps that run, else all."""
        return self._earliest(position, self._left(position, left), self._seconds, None)

    def visits(self, position: Position) -> dict[str, float]:
        """The expected number of further steps of each role, those that run not counted.

        A linear system where no "all" is, whose rounds are those of its rarest source, and at least the one that is
        under way. Parallel lines into an "any" are a step each: of a race that only the first wins the edges have
        probability 1/n. Loops without an exit stop at 1000.
        """
        return dict(zip(self.template.order, self._visits(position), strict=True))

    def reach(self, position: Position, roles: Iterable[str] | None = None) -> dict[str, float]:
        """The probability that each role starts a step before the run ends; of all roles, or of some.

        Visits over the visits expected once there is one (Kemeny and Snell, absorbing chains): exact for a run of one
        line, an estimate where lines are parallel.
        """
        sent, opened = self._sent(position)
        visits = self._visits(position)
        reached = {}
        for role in self.template.order if roles is None else roles:
            i = self._place[role]
            sure = 0.0 if self._nodes[i].join != ANY else _surely(self._into[i], sent, opened)
            usual = visits[i] / (self._width[i] * (1.0 + self._returns(i)))
            reached[role] = min(1.0, max(sure, usual))
        return reached

    def remaining(self, position: Position, left: Mapping[str, float] | None = None) -> Remaining:
        """The expected rest of the run.

        The critical line is that of the longest expected time to the end: over a choice the mean of its ways, over a
        fan-out the mean of the longest of them, round a loop as often as is expected. It waits in no join, for the
        line that a join waits for is itself one of those compared.
        """
        visits, seconds = self._visits(position), self._left(position, left)
        weights = list(visits)
        unknown = 0
        for role, steps in (*position.running.items(), *position.finished.items()):
            if role in self._place:
                weights[self._place[role]] += steps
            else:
                unknown += steps
        total = sum(weights) + unknown
        critical, path = self._critical(position, seconds)
        return Remaining(
            steps=sum(visits),
            prompt_tokens=sum(x * (node.prompt_tokens or 0.0) for x, node in zip(visits, self._nodes, strict=True)),
            output_tokens=sum(x * (node.output_tokens or 0.0) for x, node in zip(visits, self._nodes, strict=True)),
            work_seconds=sum(x * s for x, s in zip(visits, self._seconds, strict=True))
            + sum(steps * seconds.get(role, 0.0) for role, steps in position.running.items()),
            critical_seconds=critical,
            critical_path=path,
            confidence=sum(w * n.confidence for w, n in zip(weights, self._nodes, strict=True)) / total
            if total
            else 0.0,
        )

    # Earliest times

    def _left(self, position: Position, left: Mapping[str, float] | None) -> dict[str, float]:
        given = left or {}
        return {
            role: max(0.0, given.get(role, self._seconds[self._place[role]]))
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
                for edge in self._likely[self._place[role]] if role in self._place and number > 0 else ():
                    time = waits.get(role, 0.0) + (edge.gap if unit is None else unit)
                    hand.append((time, len(hand), edge, number * edge.count))
        for key, tokens in position.open.items():
            if (found := self._edges.get(key)) and found.probability >= self.floor and tokens > 0:
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
        need = [float(int(takes + EPSILON)) for takes in self._takes]
        start = [NEVER] * len(self._nodes)
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
            for ahead in self._likely[role]:
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
            for edge in self._likely[walk.pop()]:
                if edge.target not in reached:
                    reached.add(edge.target)
                    walk.append(edge.target)
        missing: dict[int, int] = {}
        for role, edges in self._barriers.items():
            missing[role] = 0
            for edge in edges:
                source = edge.source
                future = source in reached and (
                    edge not in waits or (source in due and self._nodes[source].join == ANY)
                )
                waits[edge] = waits.get(edge, 0) + future
                missing[role] += waits[edge] > 0
        return waits, missing

    # Expectations

    def _sent(self, position: Position) -> tuple[list[float], dict[_Edge, float]]:
        """Steps per place that are still to send their tokens, and the tokens expected on single edges."""
        sent = [0.0] * len(self._nodes)
        for steps in (position.running, position.finished):
            for role, number in steps.items():
                if role in self._place:
                    sent[self._place[role]] += number
        return sent, {self._edges[key]: tokens for key, tokens in position.open.items() if key in self._edges}

    def _visits(self, position: Position) -> list[float]:
        sent, opened = self._sent(position)
        visits = [0.0] * len(self._nodes)

        def tokens(edge: _Edge) -> float:
            steps = sent[edge.source] if edge.source == edge.target else visits[edge.source] + sent[edge.source]
            return edge.tokens * steps + opened.get(edge, 0.0)

        def value(role: int) -> float:
            into, takes = self._into[role], self._takes[role]
            if role not in self._barriers:
                inflow = sum(map(tokens, into)) / takes
            elif self._nodes[role].takes:
                here = sum(e.count * sent[e.source] + opened.get(e, 0.0) for e in into)
                inflow = (sum(map(tokens, into)) - max(0.0, here - takes)) / takes
                inflow = max(inflow, _surely(into, sent, opened))
            else:
                inflow = self._rounds(role, tokens, sent, opened) + sum(tokens(e) for e in into if e.back)
            again = sum(edge.tokens for edge in into if edge.source == role) / takes
            if again < 1.0:
                return inflow / (1.0 - again)
            return MOST_VISITS if inflow else 0.0

        for block in self._blocks:
            _settle(visits, block, value, MOST_VISITS, len(block) > 1)
        return visits

    def _rounds(
        self, role: int, tokens: Callable[[_Edge], float], sent: list[float], opened: Mapping[_Edge, float]
    ) -> float:
        """How often an "all" has its tokens: as often as its rarest source, the round under way for sure."""
        forward = [edge for edge in self._into[role] if not edge.back]
        shares = []
        for edge in forward:
            usual = self._width[edge.source] * edge.count
            here = edge.count * sent[edge.source] + opened.get(edge, 0.0)
            shares.append((tokens(edge) - max(0.0, here - usual)) / usual)
        return max(min(shares, default=0.0), _surely(forward, sent, opened))

    def _returns(self, role: int) -> float:
        """The expected number of steps of the role after one of its steps. Reckoned once."""
        if role not in self._again:
            self._again[role] = self._visits(Position(finished={self.template.order[role]: 1}))[role]
        return self._again[role]

    def _critical(self, position: Position, left: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
        if self._ahead is None:
            self._ahead = self._lines()
        still = {**dict.fromkeys((role for role in position.finished if role in self._place), 0.0), **left}
        lines = [(seconds + self._ahead[self._place[role]], self._place[role]) for role, seconds in still.items()]
        for key in position.open:
            if edge := self._edges.get(key):
                lines.append((self._along(edge), edge.target))
        if not lines:
            return 0.0, ()
        longest, role = max(lines)
        path = {role: None}
        while ways := [e for e in self._out[role] if e.target not in path and e.probability > 0]:
            best = max(ways, key=lambda e: e.probability * self._along(e))
            role = best.target
            path[role] = None
        return longest, tuple(self.template.order[i] for i in path)

    def _along(self, edge: _Edge) -> float:
        """Expected seconds from the end of the edge's source to the end of the line along the edge."""
        assert self._ahead is not None
        return edge.gap + self._seconds[edge.target] + self._ahead[edge.target]

    def _lines(self) -> list[float]:
        """Expected seconds from the end of a step of each role to the end of its longest line."""
        ahead = [0.0] * len(self._nodes)

        def along(edge: _Edge) -> float:
            return edge.gap + self._seconds[edge.target] + ahead[edge.target]

        def value(role: int) -> float:
            if self._nodes[role].fork == ONE:
                again = sum(e.probability for e in self._out[role] if e.target == role)
                way = sum(
                    e.probability * (along(e) - (ahead[role] if e.target == role else 0.0)) for e in self._out[role]
                )
                return way / (1.0 - again) if again < 1.0 else LONGEST
            longest, others = 0.0, 1.0
            for e in sorted(self._out[role], key=along, reverse=True):
                longest += along(e) * e.probability * others
                others *= 1.0 - e.probability
            return longest

        for block in reversed(self._blocks):
            loop = len(block) > 1 or self._nodes[block[0]].fork == ALL
            _settle(ahead, block[::-1], value, LONGEST, loop)
        return ahead


def _surely(edges: Iterable[_Edge], sent: list[float], opened: Mapping[_Edge, float]) -> float:
    """The probability that the likeliest of the edges brings a token of the steps that are there."""
    there = (max(e.probability if sent[e.source] else 0.0, min(1.0, opened.get(e, 0.0))) for e in edges)
    return max(there, default=0.0)


def _blocks(places: int, edges: Iterable[_Edge]) -> list[range]:
    """The order cut into what can be settled one after the other: single places, and the spans of loops."""
    reach = list(range(places))  # the last place of a loop that comes back to this one
    for edge in edges:
        if edge.back:
            reach[edge.target] = max(reach[edge.target], edge.source)
    blocks = []
    first = 0
    while first < places:
        last = place = first
        while place <= last:
            last = max(last, reach[place])
            place += 1
        blocks.append(range(first, last + 1))
        first = last + 1
    return blocks


def _settle(values: list[float], block: range, value: Callable[[int], float], most: float, loop: bool) -> None:
    """The least fixed point of `values[i] = value(i)` over a block, from 0, by Gauss-Seidel sweeps.

    The error of a loop shrinks by the same factor each sweep, so that its geometric rest is added every few sweeps.
    """
    if not loop:
        values[block[0]] = min(most, value(block[0]))
        return
    before = NEVER
    for sweep in range(1, SWEEPS + 1):
        steps = []
        for i in block:
            new = min(most, value(i))
            steps.append(new - values[i])
            values[i] = new
        change = max(map(abs, steps))
        if change <= CLOSE * max(1.0, max(values[i] for i in block)):
            return
        ratio, before = change / before, change
        if sweep == SWEEPS or (sweep % STRIDE == 0 and ratio < 1.0):
            for i, step in zip(block, steps, strict=True):
                rest = step * ratio / (1.0 - ratio) if ratio < 1.0 else most * (step > 0)
                values[i] = max(0.0, min(most, values[i] + rest))
