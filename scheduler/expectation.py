"""Expectations: how much of a run is still to come, on average, from its template and from where it stands.

They are those of the game of tokens that `scheduler.template` describes: linear systems, settled loop by loop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

from scheduler.position import Position
from scheduler.template import ALL, ANY, ONE, Edge, Template

NEVER = float("inf")
MOST_VISITS = 1000.0  # expected of a role in a loop without an exit
LONGEST = 1e7  # seconds of a line without an end
MOST_POSITIONS = 256  # whose visits are kept: a program stands in few
LARGEST = 32  # roles of a loop whose returns are reckoned
SWEEPS, STRIDE, CLOSE = 64, 4, 1e-6
STEADY = 0.1  # of a factor's distance from 1, by which it may change from sweep to sweep


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


class Expectation:
    """A template made ready for its averages. Keep one per version of a template; positions come and go.

    Roles that the template does not know are left out, but lower the confidence.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self._place = place = {role: i for i, role in enumerate(template.order)}
        self._nodes = [template.nodes[role] for role in template.order]
        self._seconds = [node.seconds or 0.0 for node in self._nodes]
        self._edges = {(e.source, e.target): e for e in template.edges}
        self._into: list[list[Edge]] = [[] for _ in self._nodes]
        self._feeds: list[list[tuple[int, float]]] = [[] for _ in self._nodes]  # (place, tokens of one of its steps)
        again = [0.0] * len(self._nodes)  # tokens that a step sends to its own role
        for e in template.edges:
            self._into[place[e.target]].append(e)
            if e.source == e.target:
                again[place[e.target]] = e.probability * e.count
            else:
                self._feeds[place[e.target]].append((place[e.source], e.probability * e.count))
        self._takes = [node.takes or (1.0 if node.join in (ANY, ALL) else float(node.join)) for node in self._nodes]
        left = [1.0 - a / takes for a, takes in zip(again, self._takes, strict=True)]
        self._turns = [1.0 / share if share > 0.0 else MOST_VISITS for share in left]
        self._barriers = [i for i, node in enumerate(self._nodes) if node.join == ALL]
        self._strict = [i for i in self._barriers if not self._nodes[i].takes]
        self._blocks = _blocks(len(self._nodes), ((place[e.source], place[e.target]) for e in template.edges))
        self._returned: dict[int, float] = {}
        self._solved: dict[Hashable, list[float]] = {}
        self._ahead = self._lines()
        self._heaviest: dict[str, list[str]] = {}  # the roles after each, those that weigh most on its line first
        for role in template.order:
            ways = [e for e in template.leaving(role) if e.probability > 0]
            ways.sort(key=lambda e: e.probability * self._along(e), reverse=True)
            self._heaviest[role] = [e.target for e in ways]

    def visits(self, position: Position) -> dict[str, float]:
        """The expected number of further steps of each role, those that run not counted.

        Linear, but for the rounds of an "all": as many as its rarest source brings, and at least the one under way,
        however many tokens that has. Parallel lines into an "any" are a step each: of a race that only the first wins
        the edges have probability 1/n. A loop without an exit stops at 1000.
        """
        return dict(zip(self.template.order, self._visits(position), strict=True))

    def reach(self, position: Position, roles: Iterable[str] | None = None) -> dict[str, float]:
        """The probability that each role starts a step before the run ends; of all roles, or of some.

        Visits over the visits expected once there is one (Kemeny and Snell, absorbing chains): exact for a run of one
        line, an estimate where lines are parallel, and in a loop of more than 32 roles no more than the visits.
        """
        visits, sent = self._visits(position), self._sent(position)
        reached = {}
        for role in self.template.order if roles is None else roles:
            i = self._place[role]
            sure = 0.0 if self._nodes[i].join != ANY else self._surely(self._into[i], sent, position)
            usual = visits[i] / (self.template.width[role] * (1.0 + self._returns(i)))
            reached[role] = min(1.0, max(sure, usual))
        return reached

    def remaining(self, position: Position, left: Mapping[str, float] | None = None) -> Remaining:
        """The expected rest of the run; `left` are the seconds left of the steps that run, else all of theirs.

        The critical line is that of the longest expected time to the end: over a choice the mean of its ways, over a
        fan-out the mean of the longest of them, round a loop as often as is expected. It waits in no join, for the
        line that a join waits for is itself one of those compared.
        """
        visits, sent = self._visits(position), self._sent(position)
        seconds = {
            r: max(0.0, (left or {}).get(r, self._seconds[self._place[r]])) for r in self._known(position.running)
        }
        known = sum(visits) + sum(sent.values())
        strangers = sum(n for steps in _steps(position) for role, n in steps.items() if role not in self._place)
        sure = sum(x * node.confidence for x, node in zip(visits, self._nodes, strict=True) if x)
        sure += sum(n * self._nodes[i].confidence for i, n in sent.items())
        critical, path = self._critical(position, seconds)
        return Remaining(
            steps=sum(visits),
            prompt_tokens=sum(
                x * (node.prompt_tokens or 0.0) for x, node in zip(visits, self._nodes, strict=True) if x
            ),
            output_tokens=sum(
                x * (node.output_tokens or 0.0) for x, node in zip(visits, self._nodes, strict=True) if x
            ),
            work_seconds=sum(x * s for x, s in zip(visits, self._seconds, strict=True))
            + sum(position.running[role] * rest for role, rest in seconds.items()),
            critical_seconds=critical,
            critical_path=path,
            confidence=sure / (known + strangers) if known + strangers else 0.0,
        )

    def _known(self, roles: Iterable[str]) -> Iterable[str]:
        return (role for role in roles if role in self._place)

    def _sent(self, position: Position) -> dict[int, float]:
        """Steps per place that are still to send their tokens."""
        sent: dict[int, float] = {}
        for steps in _steps(position):
            for role in self._known(steps):
                sent[self._place[role]] = sent.get(self._place[role], 0.0) + steps[role]
        return sent

    def _visits(self, position: Position) -> list[float]:
        key = tuple(tuple(part.items()) for part in (position.running, position.finished, position.open))
        if (known := self._solved.get(key)) is None:
            if len(self._solved) >= MOST_POSITIONS:
                self._solved.clear()
            known = self._solved[key] = self._solve(position, self._blocks)
        return known

    def _solve(self, position: Position, blocks: Iterable[range]) -> list[float]:
        sent = self._sent(position)
        base = [0.0] * len(self._nodes)  # tokens of the steps that are there
        for i, number in sent.items():
            for e in self.template.leaving(self.template.order[i]):
                base[self._place[e.target]] += e.probability * e.count * number
        for key, tokens in position.open.items():
            if key in self._edges:
                base[self._place[key[1]]] += tokens
        least = self._under_way(base, sent, position)
        strict = {i: self._ways_in(i, sent, position) for i in self._strict}
        visits = [0.0] * len(self._nodes)

        def value(role: int) -> float:
            if ways := strict.get(role):
                forward, back = ways
                rounds = min((at + visits[i] * share for i, share, at in forward), default=0.0)
                inflow = max(rounds, least.get(role, 0.0)) + sum(at + visits[i] * share for i, share, at in back)
            else:
                inflow = base[role]
                for i, tokens in self._feeds[role]:
                    inflow += tokens * visits[i]
                inflow = max(inflow / self._takes[role], least.get(role, 0.0))
            return inflow * self._turns[role]

        for block in blocks:
            _settle(visits, block, value, MOST_VISITS, len(block) > 1)
        return visits

    def _under_way(self, base: list[float], sent: Mapping[int, float], position: Position) -> dict[int, float]:
        """The probability of the round of an "all" for which there are tokens. More of them are still one round."""
        least = {}
        for i in self._barriers:
            if not base[i]:
                continue
            node = self._nodes[i]
            into = [e for e in self._into[i] if node.takes or self._place[e.source] < i]
            least[i] = self._surely(into, sent, position)
            if node.takes:
                base[i] -= max(0.0, sum(self._here(e, sent, position) for e in into) - node.takes)
        return least

    def _ways_in(
        self, role: int, sent: Mapping[int, float], position: Position
    ) -> tuple[list[tuple[int, float, float]], list[tuple[int, float, float]]]:
        """Of a declared "all": (source, rounds of one of its steps, rounds there are) per edge, forward and back."""
        forward, back = [], []
        for e in self._into[role]:
            source, tokens = self._place[e.source], e.probability * e.count
            there = tokens * sent.get(source, 0.0) + position.open.get((e.source, e.target), 0.0)
            if source < role:
                usual = self.template.width[e.source] * e.count
                there -= max(0.0, self._here(e, sent, position) - usual)
                forward.append((source, tokens / usual, there / usual))
            else:  # the steps of its own role are in its turns
                back.append((source, tokens if source != role else 0.0, there))
        return forward, back

    def _here(self, edge: Edge, sent: Mapping[int, float], position: Position) -> float:
        return edge.count * sent.get(self._place[edge.source], 0.0) + position.open.get((edge.source, edge.target), 0.0)

    def _surely(self, edges: Iterable[Edge], sent: Mapping[int, float], position: Position) -> float:
        """The probability that the likeliest of the edges brings a token of the steps that are there."""
        sure = 0.0
        for e in edges:
            there = e.probability if self._place[e.source] in sent else 0.0
            sure = max(sure, there, min(1.0, position.open.get((e.source, e.target), 0.0)))
        return sure

    def _returns(self, role: int) -> float:
        """The expected number of steps of the role after one of its steps. Reckoned once, in its own loop."""
        if role not in self._returned:
            block = next(block for block in self._blocks if role in block)
            if len(block) == 1 or len(block) > LARGEST:
                self._returned[role] = self._turns[role] - 1.0
            else:
                alone = Position(finished={self.template.order[role]: 1})
                self._returned[role] = self._solve(alone, [block])[role]
        return self._returned[role]

    def _critical(self, position: Position, left: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
        still = {**dict.fromkeys(self._known(position.finished), 0.0), **left}
        lines = [(seconds + self._ahead[self._place[role]], role) for role, seconds in still.items()]
        lines += [(self._along(self._edges[key]), key[1]) for key in position.open if key in self._edges]
        if not lines:
            return 0.0, ()
        longest, last = max(lines)
        path: dict[str, None] = {}
        role: str | None = last
        while role is not None:
            path[role] = None
            role = next((target for target in self._heaviest[role] if target not in path), None)
        return longest, tuple(path)

    def _along(self, edge: Edge) -> float:
        """Expected seconds from the end of the edge's source to the end of the line along the edge."""
        target = self._place[edge.target]
        return (edge.gap_seconds or 0.0) + self._seconds[target] + self._ahead[target]

    def _lines(self) -> list[float]:
        """Expected seconds from the end of a step of each role to the end of its longest line."""
        self._ahead = ahead = [0.0] * len(self._nodes)

        def value(role: int) -> float:
            out = self.template.leaving(name := self.template.order[role])
            if self._nodes[role].fork == ONE:
                again = sum(e.probability for e in out if e.target == name)
                way = sum(e.probability * (self._along(e) - (ahead[role] if e.target == name else 0.0)) for e in out)
                return way / (1.0 - again) if again < 1.0 else LONGEST
            longest, others = 0.0, 1.0
            for e in sorted(out, key=self._along, reverse=True):
                longest += self._along(e) * e.probability * others
                others *= 1.0 - e.probability
            return longest

        for block in reversed(self._blocks):
            loop = len(block) > 1 or self._nodes[block[0]].fork == ALL
            _settle(ahead, block[::-1], value, LONGEST, loop)
        return ahead


def _steps(position: Position) -> tuple[Mapping[str, int], Mapping[str, int]]:
    return position.running, position.finished


def _blocks(places: int, edges: Iterable[tuple[int, int]]) -> list[range]:
    """The order cut into what can be settled one after the other: single places, and the spans of loops."""
    reach = list(range(places))  # the last place of a loop that comes back to this one
    for source, target in edges:
        reach[target] = max(reach[target], source)
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

    The error of a loop comes to shrink by the same factor each sweep: once it does, its geometric rest is added, every
    few sweeps, and at the last one anyhow. Sooner that would lead astray, perhaps for ever.
    """
    if not loop:
        values[block[0]] = min(most, value(block[0]))
        return
    before = last = NEVER
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
        steady, last = abs(ratio - last) <= STEADY * (1.0 - ratio), ratio
        if sweep == SWEEPS or (sweep % STRIDE == 0 and steady and ratio < 1.0):
            for i, step in zip(block, steps, strict=True):
                rest = step * ratio / (1.0 - ratio) if ratio < 1.0 else most * (step > 0)
                values[i] = max(0.0, min(most, values[i] + rest))
