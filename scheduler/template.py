"""Templates: how the runs of an agent program go, as a graph of roles (`PUT /v1/workflows/templates/{name}`).

A run is a game of tokens. A step that ends sends tokens along the edges out of its role: with `fork` "one" along at
most one of them (the probabilities sum to at most 1, the rest is the end of that line), with "all" along each with its
own probability; an edge carries `count` tokens at a time, on average. A role starts a step per token where its join is
"any", per k tokens where it is the number k, and where it is "all" when every edge has brought its own; an edge that
leads back round a loop is a way in of its own, which an "all" does not wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ANY, ALL, ONE = "any", "all", "one"
MOST_NODES, MOST_EDGES, LONGEST_NAME = 1000, 10_000, 256
WIDEST = 1e6
EPSILON = 1e-9
WORTH = 10.0  # steps of a role that its declaration counts for
RARE = 0.1  # a way out that is less likely is noise, in a learned template (bench/shapes.py)

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """A role: tokens and service seconds of one step on average, None where nobody knows.

    `join` is "any", "all" or the number of tokens that one step takes. Once learned: `takes`, that number on average
    where `join` is "all", and `confidence` in 0..1, n/(n+1) after n observations of what follows.
    """

    join: str | float = ANY
    fork: str = ONE
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    seconds: float | None = None
    model: str | None = None
    confidence: float = 1.0
    takes: float | None = None


@dataclass(frozen=True, slots=True)
class Edge:
    """After a step of `source`, with `probability`, `count` steps of `target`, `gap_seconds` after its end."""

    source: str
    target: str
    probability: float = 1.0
    gap_seconds: float | None = None
    count: float = 1.0


@dataclass(frozen=True)
class Template:
    """Roles and edges of a program's runs.

    Derived: `order`, in which only the edges that close a loop go back, and `width`, the steps of a role at one time.
    """

    name: str
    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]
    starts: tuple[str, ...]
    order: tuple[str, ...] = field(init=False, repr=False, compare=False)
    width: Mapping[str, float] = field(init=False, repr=False, compare=False)
    _leaving: Mapping[str, Sequence[Edge]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        order = _order(self.nodes, self.edges, self.starts)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "width", _width(self.nodes, self.edges, order))
        leaving: dict[str, list[Edge]] = {}
        for edge in self.edges:
            leaving.setdefault(edge.source, []).append(edge)
        object.__setattr__(self, "_leaving", leaving)

    def leaving(self, role: str) -> Sequence[Edge]:
        """The edges out of a role."""
        return self._leaving.get(role, ())

    @classmethod
    def parse(cls, name: str, document: Mapping[str, Any]) -> Template:
        """The template that a client declares. Raises ValueError that names the field which is wrong."""
        _known("template", document, {"nodes", "edges", "starts"})
        listed = document.get("nodes")
        if not isinstance(listed, Mapping) or not 0 < len(listed) <= MOST_NODES:
            raise ValueError(f"nodes: an object with 1 to {MOST_NODES} roles is needed")
        edges = _edges(document.get("edges", []), listed)
        weights: dict[str, float] = {}
        for edge in edges:
            weights[edge.source] = weights.get(edge.source, 0.0) + edge.probability
        nodes = {
            _name(role, "nodes"): _node(f"nodes.{role}", one, weights.get(role, 0.0)) for role, one in listed.items()
        }
        template = cls(_name(name, "name"), nodes, edges, _starts(document.get("starts"), nodes, edges))
        for role, tokens in _inflow(template).items():
            join = nodes[role].join
            if isinstance(join, float) and join > max(tokens, 1.0) + EPSILON:
                raise ValueError(f"nodes.{role}.join: waits for {join:g} tokens, but {tokens:g} come")
        return template

    def document(self) -> dict[str, Any]:
        """The declaration of this template, canonical: `parse` gives the same, but for what only learned nodes have."""
        names = ("prompt_tokens", "output_tokens", "seconds", "model")
        nodes: dict[str, Any] = {}
        for role, node in self.nodes.items():
            given = {name: value for name in names if (value := getattr(node, name)) is not None}
            nodes[role] = {"join": node.join, "fork": node.fork, **given}
        edges = []
        for e in self.edges:
            gap = {} if e.gap_seconds is None else {"gap_seconds": e.gap_seconds}
            edges.append({"from": e.source, "to": e.target, "probability": e.probability, "count": e.count, **gap})
        return {"nodes": nodes, "edges": edges, "starts": list(self.starts)}

    def tempered(self, measured: Template) -> Template:
        """This template after what a learned one has seen: it counts for `WORTH` steps of each role.

        What it leaves open, whole roles among it, is as measured. Joins and starts stay as declared, and a way that it
        leaves out counts once it is no noise, where no declared number of steps is waited for.
        """
        names = {**self.nodes, **measured.nodes}
        nodes = {role: _tempered(self.nodes.get(role), measured.nodes.get(role)) for role in names}
        said = {(edge.source, edge.target): edge for edge in self.edges}
        seen = {(edge.source, edge.target): edge for edge in measured.edges}
        edges = []
        for key in {**said, **seen}:
            share = _share(measured.nodes.get(key[0])) if key[0] in self.nodes else 1.0
            edge = _between(said.get(key), seen.get(key), share)
            heard = key[0] not in self.nodes or edge.probability >= RARE
            free = key[1] not in self.nodes or nodes[key[1]].join == ANY or nodes[key[1]].takes
            if key in said or (heard and free):
                edges.append(edge)
        return Template(self.name, nodes, tuple(_bounded(edges, nodes)), self.starts)


def _share(measured: Node | None) -> float:
    """How much of what was seen of a role is believed: n / (n + WORTH) after n steps, of which its confidence tells."""
    known = measured.confidence if measured is not None else 0.0
    return known / (known + WORTH * (1.0 - known))


def _tempered(said: Node | None, seen: Node | None) -> Node:
    if said is None or seen is None:
        return said or seen or Node()
    share = _share(seen)
    names = ("prompt_tokens", "output_tokens", "seconds")
    means = {name: _mean(getattr(said, name), getattr(seen, name), share) for name in names}
    takes = seen.takes if said.join == ALL else None
    fork = said.fork if share < 0.5 else seen.fork
    return replace(said, fork=fork, takes=takes, model=said.model or seen.model, **means)


def _between(said: Edge | None, seen: Edge | None, share: float) -> Edge:
    """The edge with that share of what was seen; the mean of what it brings is that of both."""
    if said is None or seen is None:
        one = said or seen
        assert one is not None
        return replace(one, probability=one.probability * (share if said is None else 1.0 - share))
    probability = _mean(said.probability, seen.probability, share)
    brings = _mean(said.probability * said.count, seen.probability * seen.count, share)
    count = max(1.0, brings / probability) if probability else said.count
    return replace(
        said, probability=probability, count=count, gap_seconds=_mean(said.gap_seconds, seen.gap_seconds, share)
    )


def _bounded(edges: Sequence[Edge], nodes: Mapping[str, Node]) -> Iterable[Edge]:
    """Those out of a choice have probabilities of at most 1 together."""
    weights: dict[str, float] = {}
    for edge in edges:
        weights[edge.source] = weights.get(edge.source, 0.0) + edge.probability
    for edge in edges:
        over = weights[edge.source] if nodes[edge.source].fork == ONE else 1.0
        yield edge if over <= 1.0 else replace(edge, probability=edge.probability / over)


def _mean(said: float | None, seen: float | None, share: float) -> Any:
    if said is None or seen is None:
        return seen if said is None else said
    return said + share * (seen - said)


def _order(nodes: Iterable[str], edges: Sequence[Edge], starts: Sequence[str]) -> tuple[str, ...]:
    """Reverse postorder of a depth-first walk from the starts: an edge that does not go forward in it closes a loop."""
    successors: dict[str, list[str]] = {role: [] for role in nodes}
    for edge in edges:
        successors[edge.source].append(edge.target)
    seen: set[str] = set()
    postorder: list[str] = []
    for root in (*starts, *successors):
        if root in seen:
            continue
        seen.add(root)
        walk = [(root, iter(successors[root]))]
        while walk:
            ahead = walk[-1][1]
            target = next((t for t in ahead if t not in seen), None)
            if target is None:
                postorder.append(walk.pop()[0])
            else:
                seen.add(target)
                walk.append((target, iter(successors[target])))
    return tuple(reversed(postorder))


def _width(nodes: Mapping[str, Node], edges: Sequence[Edge], order: Sequence[str]) -> dict[str, float]:
    """Steps of each role that one token at a start leads to at the same time, loops not counted."""
    place = {role: i for i, role in enumerate(order)}
    into: dict[str, list[Edge]] = {role: [] for role in order}
    for edge in edges:
        if place[edge.source] < place[edge.target]:
            into[edge.target].append(edge)
    width: dict[str, float] = {}
    for role in order:
        join = nodes[role].join
        tokens = [width[e.source] * e.count for e in into[role]] or [1.0]
        wide = 1.0 if join == ALL else sum(tokens) / join if isinstance(join, float) else max(tokens)
        width[role] = min(WIDEST, max(1.0, wide))
    return width


def _inflow(template: Template) -> dict[str, float]:
    """Tokens that come to each role in one pass through the graph."""
    tokens = dict.fromkeys(template.nodes, 0.0)
    for edge in template.edges:
        tokens[edge.target] += template.width[edge.source] * edge.count
    return tokens


def _known(where: str, value: object, names: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: an object is needed")
    if unknown := [str(key)[:LONGEST_NAME] for key in value if key not in names]:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(names))}")
    return value


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
        raise ValueError(f"{where}: a name of 1 to {LONGEST_NAME} characters is needed")
    return value


def _number(value: object, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{where}: a number from {low:g} to {high:g} is needed")
    return float(value)


def _optional(given: Mapping[str, Any], name: str, where: str) -> float | None:
    return None if given.get(name) is None else _number(given[name], f"{where}.{name}", 0.0, 1e9)


def _edges(listed: object, roles: Mapping[str, Any]) -> tuple[Edge, ...]:
    if not isinstance(listed, list | tuple) or len(listed) > MOST_EDGES:
        raise ValueError(f"edges: a list of at most {MOST_EDGES} is needed")
    edges: dict[Key, Edge] = {}
    for i, value in enumerate(listed):
        where = f"edges[{i}]"
        given = _known(where, value, {"from", "to", "probability", "gap_seconds", "count"})
        for end in ("from", "to"):
            if _name(given.get(end), f"{where}.{end}") not in roles:
                raise ValueError(f"{where}.{end}: no node is called {given[end]!r}")
        key = (given["from"], given["to"])
        if key in edges:
            raise ValueError(f"{where}: the edge from {key[0]!r} to {key[1]!r} is listed twice")
        probability = _number(given.get("probability", 1.0), f"{where}.probability", 0.0, 1.0)
        count = _number(given.get("count", 1.0), f"{where}.count", 1.0, 10_000.0)
        edges[key] = Edge(*key, probability, _optional(given, "gap_seconds", where), count)
    return tuple(edges.values())


def _node(where: str, value: object, weight: float) -> Node:
    """`weight` is the sum of the probabilities out of the node; it decides between a choice and a fan-out."""
    given = _known(where, value, {"join", "fork", "prompt_tokens", "output_tokens", "seconds", "model"})
    join = given.get("join", ANY)
    if join not in (ANY, ALL):
        join = _number(join, f'{where}.join ("any", "all" or a number of tokens)', 1.0, WIDEST)
        join = ANY if join == 1.0 else join
    single = weight <= 1.0 + EPSILON
    fork = given.get("fork", ONE if single else ALL)
    if fork not in (ONE, ALL):
        raise ValueError(f'{where}.fork: "one" or "all" is needed')
    if fork == ONE and not single:
        raise ValueError(f"{where}.fork: the probabilities of a choice sum to {weight:g}, which is more than 1")
    model = given.get("model")
    return Node(
        join,
        fork,
        _optional(given, "prompt_tokens", where),
        _optional(given, "output_tokens", where),
        _optional(given, "seconds", where),
        None if model is None else _name(model, f"{where}.model"),
    )


def _starts(listed: object, roles: Mapping[str, Node], edges: Sequence[Edge]) -> tuple[str, ...]:
    if listed is None:
        entered = {edge.target for edge in edges}
        listed = [role for role in roles if role not in entered]
    if not isinstance(listed, list | tuple) or not 0 < len(listed) <= len(roles):
        raise ValueError("starts: a list of the roles that a run begins with is needed")
    for role in listed:
        if _name(role, "starts") not in roles:
            raise ValueError(f"starts: no node is called {role!r}")
    if len(set(listed)) < len(listed):
        raise ValueError("starts: a role is listed twice")
    return tuple(listed)
