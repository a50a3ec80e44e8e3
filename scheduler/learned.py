"""Learned templates: counts of what followed what in the runs of one agent program, rendered as a template.

One line of the run ends where no step follows a step. A way out of a role has the probability fired / (resolved + 0.1):
resolved are the steps of the role that were followed or ended a line, fired those that a step of the target followed.
The pseudo count goes to the end of the line, so that the first run already gives a graph; how well a role is known is
its confidence. No threshold cuts edges off here (SAGA keeps those of 0.7 and more, after 30 runs): the reader sets one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from scheduler.template import ALL, ANY, ONE, Edge, Key, Node, Template

MOST_ROLES, MOST_EDGES = 256, 2048
PSEUDO = 0.1
MEMORY = 512.0  # observations of a role, above which old ones count half
WINDOW = 64.0  # observations over which a mean moves
FORGOTTEN = 0.1  # observations of an edge, under which it is dropped
PARALLEL = 1.1  # roles that follow a step, on average, from which its ways out are a fan-out and not a choice
JOINED = 1.5  # steps that a step follows, on average, from which it is a join
LOST = 0.2  # share of the steps before a join that nothing follows, from which the join does not wait for all


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    seen: float = 0.0

    def add(self, value: float) -> None:
        self.seen = min(self.seen + 1.0, WINDOW)
        self.value += (value - self.value) / self.seen

    def known(self) -> float | None:
        return self.value if self.seen else None


@dataclass(slots=True)
class _Role:
    """`came` after other steps, consuming `tokens`; `resolved` of them are followed or have `ended` a line."""

    begun: float = 0.0
    came: float = 0.0
    tokens: float = 0.0
    resolved: float = 0.0
    ended: float = 0.0
    prompt: _Mean = field(default_factory=_Mean)
    output: _Mean = field(default_factory=_Mean)
    seconds: _Mean = field(default_factory=_Mean)
    model: str | None = None

    @property
    def use(self) -> float:
        return self.begun + self.came

    @property
    def takes(self) -> float:
        return max(1.0, self.tokens / self.came) if self.came else 1.0

    def join(self, lost: float) -> str | float:
        if self.takes < 1.05:
            return ANY
        return ALL if self.takes >= JOINED and lost <= LOST else self.takes


@dataclass(slots=True)
class _Edge:
    """`fired` for so many steps of its source, each time with tokens / fired steps of its target."""

    fired: float = 0.0
    tokens: float = 0.0
    gap: _Mean = field(default_factory=_Mean)

    @property
    def use(self) -> float:
        return self.fired


_Used = TypeVar("_Used", _Role, _Edge)
_Name = TypeVar("_Name", str, Key)


class Learned:
    """What the runs of one program have shown. Online, O(1) an observation, at most 256 roles and 2048 edges.

    `version` grows with each change of the graph, so that a rendered template can be kept until then.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = 0
        self._roles: dict[str, _Role] = {}
        self._edges: dict[Key, _Edge] = {}
        self._out: dict[str, dict[str, _Edge]] = {}

    def begins(self, role: str) -> None:
        """A run has begun with a step of this role."""
        self.version += 1
        self._role(role).begun += 1.0
        self._crop()

    def follows(self, after: Sequence[str], role: str, siblings: Sequence[Collection[str]] = ()) -> None:
        """A step has come that follows steps of the roles `after` (several: a join).

        `siblings[i]` are the roles of the steps that already follow the step `after[i]`, which tell a fan-out from a
        choice.
        """
        self.version += 1
        target = self._role(role)
        target.came += 1.0
        target.tokens += len(after)
        if target.came > MEMORY:
            target.came, target.tokens, target.begun = target.came / 2, target.tokens / 2, target.begun / 2
        for i, name in enumerate(after):
            beside = siblings[i] if i < len(siblings) else ()
            if not beside:
                self._resolve(name)
            edge = self._edge(name, role)
            edge.tokens += 1.0
            if role not in beside or not edge.fired:
                edge.fired += 1.0
        self._crop()

    def ended(self, role: str) -> None:
        """A line of the run ended with a step of this role: the run is over and nothing follows that step."""
        self.version += 1
        self._resolve(role)
        self._role(role).ended += 1.0
        self._crop()

    def spent(
        self, role: str, prompt_tokens: float, output_tokens: float, seconds: float, model: str | None = None
    ) -> None:
        """A step of this role took so many tokens, and so many seconds from its dispatch to its end."""
        one = self._role(role)
        one.prompt.add(prompt_tokens)
        one.output.add(output_tokens)
        one.seconds.add(seconds)
        one.model = model or one.model
        self._crop()

    def gap(self, source: str, target: str, seconds: float) -> None:
        """A step of `target` came so many seconds after the end of the step of `source` that it follows."""
        if (source, target) in self._edges:
            self._edges[source, target].gap.add(seconds)

    def template(self) -> Template:
        """The graph as far as it is known. O(roles + edges)."""
        parents: dict[str, list[str]] = {}
        for source, target in self._edges:
            parents.setdefault(target, []).append(source)
        nodes = {role: self._node(role, parents.get(role, ())) for role in self._roles}
        seen = {role: self._seen(role, node.fork) for role, node in nodes.items()}
        edges = []
        for (source, target), edge in self._edges.items():
            probability = edge.fired / seen[source]
            edges.append(Edge(source, target, min(1.0, probability), edge.gap.known(), edge.tokens / edge.fired))
        begun = sorted((r for r in self._roles if self._roles[r].begun), key=lambda r: -self._roles[r].begun)
        return Template(self.name, nodes, tuple(edges), tuple(begun))

    def _node(self, role: str, parents: Collection[str]) -> Node:
        one = self._roles[role]
        sources = [self._roles[p] for p in parents]
        lost = sum(s.ended for s in sources) / max(sum(s.resolved for s in sources), 1e-9)
        followed = one.resolved - one.ended
        parallel = self._fired(role) > PARALLEL * followed
        join = one.join(lost)
        return Node(
            join,
            ALL if parallel else ONE,
            one.prompt.known(),
            one.output.known(),
            one.seconds.known(),
            one.model,
            one.resolved / (one.resolved + 1.0),
            one.takes if join == ALL else None,
        )

    def _fired(self, role: str) -> float:
        return sum(edge.fired for edge in self._out[role].values())

    def _seen(self, role: str, fork: str) -> float:
        """Of how many steps of the role the ways out are shares. Those of a choice never sum to more than 1."""
        seen = self._roles[role].resolved + PSEUDO
        return max(seen, self._fired(role)) if fork == ONE else seen

    def _resolve(self, role: str) -> None:
        one = self._role(role)
        one.resolved += 1.0
        if one.resolved > MEMORY:
            one.resolved, one.ended = one.resolved / 2, one.ended / 2
            for edge in self._out[role].values():
                edge.fired, edge.tokens = edge.fired / 2, edge.tokens / 2
            self._cut([(role, target) for target, edge in self._out[role].items() if edge.fired < FORGOTTEN])

    def _role(self, role: str) -> _Role:
        if role not in self._roles:
            self._roles[role], self._out[role] = _Role(), {}
        return self._roles[role]

    def _edge(self, source: str, target: str) -> _Edge:
        self._role(source), self._role(target)
        if (source, target) not in self._edges:
            self._edges[source, target] = self._out[source][target] = _Edge()
        return self._edges[source, target]

    def _crop(self) -> None:
        if len(self._roles) > MOST_ROLES:
            roles = _least(self._roles, MOST_ROLES)
            self._cut([key for key in self._edges if not roles.isdisjoint(key)])
            for role in roles:
                del self._roles[role], self._out[role]
        if len(self._edges) > MOST_EDGES:
            self._cut(_least(self._edges, MOST_EDGES))

    def _cut(self, edges: Iterable[Key]) -> None:
        for source, target in edges:
            del self._edges[source, target], self._out[source][target]

    def dump(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        roles = {
            name: [r.begun, r.came, r.tokens, r.resolved, r.ended, r.model, *_flat(r.prompt, r.output, r.seconds)]
            for name, r in self._roles.items()
        }
        edges = [[*key, e.fired, e.tokens, *_flat(e.gap)] for key, e in self._edges.items()]
        return {"name": self.name, "roles": roles, "edges": edges}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Learned:
        """What `dump` gave."""
        learned = cls(dumped["name"])
        for name, (begun, came, tokens, resolved, ended, model, *means) in dumped["roles"].items():
            prompt, output, seconds = (_Mean(*means[i : i + 2]) for i in (0, 2, 4))
            learned._roles[name] = _Role(begun, came, tokens, resolved, ended, prompt, output, seconds, model)
            learned._out[name] = {}
        for source, target, fired, tokens, *gap in dumped["edges"]:
            edge = _Edge(fired, tokens, _Mean(*gap))
            learned._edges[source, target] = learned._out[source][target] = edge
        return learned


def _flat(*means: _Mean) -> list[float]:
    return [number for mean in means for number in (mean.value, mean.seen)]


def _least(used: Mapping[_Name, _Used], most: int) -> set[_Name]:
    """Of too many, the least used eighth: a newcomer then has time to be used."""
    return set(sorted(used, key=lambda key: used[key].use)[: len(used) - most + most // 8])
