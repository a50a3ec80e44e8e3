"""Every shape by hand, then random graphs against evaluators that are slow and plain."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from math import inf, isinf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.expectation import MOST_VISITS, Expectation
from scheduler.foresight import Foresight
from scheduler.position import Position, Progress
from scheduler.template import ALL, ANY, Edge, Node, Template


class Seen:
    """One template with all that can be asked of it."""

    def __init__(self, template: Template, floor: float = 0.0) -> None:
        self.template = template
        foresight, expectation = Foresight(template, floor), Expectation(template)
        self.steps_to_execution, self.next_use = foresight.steps_to_execution, foresight.next_use
        self.visits, self.reach, self.remaining = expectation.visits, expectation.reach, expectation.remaining


def foresight(*edges: Any, floor: float = 0.0, starts: tuple[str, ...] | None = None, **nodes: Any) -> Seen:
    """Edges are (from, to[, probability[, count[, gap]]]); every node takes 1 second, 10 prompt and 1 output token."""
    keys = ("from", "to", "probability", "count", "gap_seconds")
    roles = dict.fromkeys(role for edge in edges for role in edge[:2])
    usual = {"seconds": 1, "prompt_tokens": 10, "output_tokens": 1}
    document: dict[str, Any] = {
        "nodes": {role: {**usual, **nodes.get(role, {})} for role in roles},
        "edges": [dict(zip(keys, edge, strict=False)) for edge in edges],
    }
    if starts:
        document["starts"] = list(starts)
    return Seen(Template.parse("t", document), floor)


def running(*roles: str, **position: Any) -> Position:
    return Position(running=dict(Counter(roles)), **position)


def finished(*roles: str, **position: Any) -> Position:
    return Position(finished=dict(Counter(roles)), **position)


# Shapes


def test_what_has_passed_of_a_step_or_a_gap_is_not_waited_for_again() -> None:
    stages = foresight(("plan", "work", 1, 1, 3.0), ("work", "check", 1, 1, 3.0), plan={"seconds": 5})
    assert stages.next_use(running("plan"))["work"] == 8
    assert stages.next_use(running("plan", runs={"plan": 4.0}))["work"] == 4
    assert stages.next_use(running("plan", runs={"plan": 40.0}))["work"] == 3
    assert stages.next_use(finished("plan", rests={"plan": 2.0})) == {"plan": inf, "work": 1, "check": 5}
    assert stages.steps_to_execution(finished("plan", rests={"plan": 2.0}))["check"] == 2


def test_what_should_have_come_long_ago_is_not_waited_for_at_all() -> None:
    stages = foresight(("plan", "work", 1, 1, 30.0), ("plan", "play", 1, 1, 1.0))
    assert stages.next_use(finished("plan", rests={"plan": 10.9}))["play"] == 0
    assert stages.next_use(finished("plan", rests={"plan": 11.1}))["play"] == inf
    assert stages.next_use(finished("plan", rests={"plan": 59.0}))["work"] == 0
    assert stages.next_use(finished("plan", rests={"plan": 61.0}))["work"] == inf


def test_a_position_says_since_when_its_first_steps_run_and_rest() -> None:
    template = Template.parse("t", {"nodes": {"a": {}, "b": {}}, "edges": [{"from": "a", "to": "b"}]})
    progress = Progress()
    progress.came("1", "a", (), 1.0)
    progress.came("2", "a", (), 2.0)
    progress.finished("2", 4.0)
    progress.came("3", "a", (), 5.0)
    progress.finished("3", 6.0)
    at = progress.position(template, 10.0)
    assert (at.runs, at.rests) == ({"a": 9.0}, {"a": 6.0})
    assert progress.position(template).rests == {}


def test_a_chain_of_one_role_runs_again_with_the_probability_of_another_turn() -> None:
    react = foresight(("act", "act", 0.95, 1, 3.0), starts=("act",))
    assert react.steps_to_execution(running("act")) == {"act": 0}
    assert react.steps_to_execution(finished("act")) == {"act": 1}
    assert react.next_use(finished("act")) == {"act": 3}
    assert react.visits(running("act"))["act"] == pytest.approx(19)
    assert react.reach(running("act"))["act"] == pytest.approx(0.95)
    left = react.remaining(running("act"), {"act": 0.5})
    assert (left.work_seconds, left.critical_seconds) == (pytest.approx(0.5 + 19), pytest.approx(0.5 + 19 * 4.0))
    assert (left.steps, left.prompt_tokens, left.critical_path) == (pytest.approx(19), pytest.approx(190), ("act",))


def test_a_join_waits_for_the_last_of_a_fan_out() -> None:
    edges = [("plan", tool) for tool in ("t1", "t2", "t3")] + [(tool, "sum") for tool in ("t1", "t2", "t3")]
    calls = foresight(*edges, sum={"join": "all"}, t2={"seconds": 9})
    assert calls.template.nodes["plan"].fork == "all"
    assert calls.steps_to_execution(running("plan")) == {"plan": 0, "t1": 1, "t2": 1, "t3": 1, "sum": 2}
    assert calls.steps_to_execution(finished("t1", running={"t2": 1, "t3": 1}))["sum"] == 1
    begun = Position({"t1": 1}, {}, {("plan", "t2"): 1, ("plan", "t3"): 1})
    assert calls.steps_to_execution(begun) == {"plan": inf, "t1": 0, "t2": 1, "t3": 1, "sum": 2}
    assert calls.visits(begun) == {"plan": 0, "t1": 0, "t2": 1, "t3": 1, "sum": 1}
    assert calls.next_use(running("plan"))["sum"] == 1 + 9
    assert calls.next_use(finished("t1", running={"t2": 1, "t3": 1}), {"t2": 4})["sum"] == 4
    assert calls.visits(running("plan")) == {"plan": 0, "t1": 1, "t2": 1, "t3": 1, "sum": 1}
    left = calls.remaining(running("plan"))
    assert (left.steps, left.work_seconds, left.critical_seconds) == (4, 1 + 1 + 9 + 1 + 1, 1 + 9 + 1)
    assert left.critical_path == ("plan", "t2", "sum")


def test_a_reduce_waits_for_all_its_maps_however_many_there_are() -> None:
    reduce = foresight(("split", "map", 1, 5), ("map", "reduce"), ("reduce", "end"), reduce={"join": "all"})
    assert reduce.visits(running("split")) == {"split": 0, "map": 5, "reduce": 1, "end": 1}
    for here in (
        running(*["map"] * 5),
        running("map", "map", finished={"map": 3}),
        running(*["map"] * 3),
        running(*["map"] * 7),
    ):
        assert reduce.steps_to_execution(here)["reduce"] == 1
        assert reduce.visits(here)["reduce"] == reduce.visits(here)["end"] == 1
    waiting = running("map", finished={"map": 2}, open={("split", "map"): 2})
    assert reduce.steps_to_execution(waiting) == {"split": inf, "map": 0, "reduce": 2, "end": 3}
    assert reduce.visits(waiting)["map"] == 2
    assert reduce.visits(waiting)["reduce"] == pytest.approx(1)
    assert reduce.reach(waiting)["map"] == 1
    left = reduce.remaining(running("split"))
    assert (left.steps, left.work_seconds, left.critical_seconds) == (7, 8, 4)


def test_a_tree_of_tasks_is_as_deep_as_its_levels_and_as_wide_as_its_leaves() -> None:
    tree = foresight(("root", "branch", 1, 2), ("branch", "leaf", 1, 2), ("leaf", "merge"), merge={"join": "all"})
    assert tree.steps_to_execution(running("root")) == {"root": 0, "branch": 1, "leaf": 2, "merge": 3}
    assert tree.visits(running("root")) == {"root": 0, "branch": 2, "leaf": 4, "merge": 1}
    assert tree.remaining(running("root")).critical_seconds == 4


def test_a_recursion_makes_as_many_steps_as_its_branching_gives() -> None:
    solve = foresight(("solve", "solve", 0.4, 2), starts=("solve",))
    assert solve.visits(running("solve"))["solve"] == pytest.approx(0.8 / 0.2)
    assert solve.remaining(running("solve")).critical_seconds == pytest.approx(1 / 0.6)


def test_a_loop_with_an_exit_goes_round_as_often_as_its_probability_says() -> None:
    loop = foresight(("write", "judge"), ("judge", "write", 0.75), ("judge", "publish", 0.25), starts=("write",))
    assert loop.steps_to_execution(running("judge")) == {"write": 1, "judge": 0, "publish": 1}
    visits = loop.visits(running("write"))
    assert visits == {"write": pytest.approx(3), "judge": pytest.approx(4), "publish": pytest.approx(1)}
    reach = loop.reach(running("judge"))
    assert reach == {"write": pytest.approx(0.75), "judge": pytest.approx(0.75), "publish": pytest.approx(1)}
    left = loop.remaining(running("write"))
    assert left.critical_seconds == left.work_seconds == pytest.approx(1 + 8)
    assert left.critical_path == ("write", "judge", "publish")


def test_an_or_join_runs_after_the_first_branch_and_an_and_join_after_the_last() -> None:
    edges = [("fork", "fast"), ("fork", "slow1"), ("slow1", "slow2"), ("fast", "join"), ("slow2", "join")]
    here = running("fork")
    assert foresight(*edges).steps_to_execution(here)["join"] == 2
    assert foresight(*edges, join={"join": "all"}).steps_to_execution(here)["join"] == 3
    assert foresight(*edges).visits(here)["join"] == 2
    assert foresight(*edges, join={"join": "all"}).visits(here)["join"] == 1


def test_two_of_three_wait_for_the_second_smallest() -> None:
    edges = [("ask", "v1"), ("ask", "w"), ("w", "v2"), ("ask", "x"), ("x", "y"), ("y", "v3")]
    edges += [("v1", "judge"), ("v2", "judge"), ("v3", "judge")]
    vote = foresight(*edges, judge={"join": 2})
    assert vote.steps_to_execution(running("ask"))["judge"] == 3
    assert vote.steps_to_execution(finished("v1", running={"v2": 1, "y": 1}))["judge"] == 1
    assert vote.steps_to_execution(finished("v1", running={"y": 1}))["judge"] == 2
    assert vote.steps_to_execution(finished("v1"))["judge"] == inf
    assert vote.next_use(finished("v1", running={"v2": 1, "y": 1}), {"v2": 7})["judge"] == 2


def test_a_planner_between_workers_is_one_step_away_and_the_workers_two() -> None:
    edges = [("plan", "e1", 0.5), ("plan", "e2", 0.4), ("e1", "plan"), ("e2", "plan")]
    interleaved = foresight(*edges, starts=("plan",))
    assert interleaved.steps_to_execution(running("e1")) == {"plan": 1, "e1": 0, "e2": 2}
    assert interleaved.visits(running("plan"))["plan"] == pytest.approx(9)
    assert interleaved.reach(running("plan"))["plan"] == pytest.approx(0.9)
    assert interleaved.reach(running("plan"))["e2"] == pytest.approx(0.4 / (1 - 0.5))


def test_the_peer_loop_counts_down_to_each_of_its_agents() -> None:
    peer = foresight(
        ("planner", "executor", 1, 3),
        ("executor", "expresser"),
        ("expresser", "reviewer"),
        ("reviewer", "planner", 0.5),
        starts=("planner",),
        expresser={"join": "all"},
    )
    steps = peer.steps_to_execution(running("expresser"))
    assert steps == {"planner": 2, "executor": 3, "expresser": 0, "reviewer": 1}
    visits = peer.visits(running("planner"))
    assert [visits[role] for role in peer.template.order] == pytest.approx([1, 6, 2, 2])
    assert peer.remaining(running("planner")).critical_seconds == pytest.approx(8)
    assert peer.reach(running("reviewer"))["expresser"] == pytest.approx(0.5)


def test_a_cascade_reaches_the_large_model_when_the_small_one_is_not_enough() -> None:
    cascade = foresight(("small", "large", 0.3), large={"seconds": 20, "output_tokens": 100, "model": "large"})
    assert cascade.steps_to_execution(running("small"))["large"] == 1
    assert cascade.reach(running("small"))["large"] == pytest.approx(0.3)
    left = cascade.remaining(running("small"))
    assert (left.output_tokens, left.critical_seconds) == (pytest.approx(30), pytest.approx(1 + 6))
    assert left.critical_path == ("small", "large")


def test_a_graph_that_is_edited_while_it_runs_is_read_as_it_now_stands() -> None:
    here = running("b")
    assert foresight(("a", "b"), ("b", "c")).steps_to_execution(here)["c"] == 1
    longer = foresight(("a", "b"), ("b", "x"), ("x", "c"))
    assert longer.steps_to_execution(here)["c"] == 2
    gone = foresight(("a", "c"))
    assert gone.steps_to_execution(here) == {"a": inf, "c": inf}
    assert gone.next_use(finished("b", open={("b", "c"): 1})) == {"a": inf, "c": inf}
    assert gone.remaining(here).confidence == 0 == gone.remaining(here).steps


def test_a_join_does_not_wait_for_a_source_that_was_cut_out_of_the_run() -> None:
    join = foresight(("plan", "a"), ("plan", "b"), ("a", "join"), ("b", "join"), join={"join": "all"})
    assert join.steps_to_execution(finished("a"))["join"] == 1
    assert join.visits(finished("a"))["join"] == 1
    assert join.steps_to_execution(Position())["join"] == inf


def test_a_way_back_into_a_join_enters_alone() -> None:
    edges = [("plan", "a"), ("plan", "b"), ("a", "join"), ("b", "join"), ("join", "fix", 0.5), ("fix", "join")]
    join = foresight(*edges, join={"join": "all"}, starts=("plan",))
    assert join.steps_to_execution(running("plan"))["join"] == 2
    assert join.steps_to_execution(running("fix"))["join"] == 1
    assert join.visits(running("plan"))["join"] == pytest.approx(2)


def test_the_unlikely_does_not_count_as_the_earliest_below_the_floor() -> None:
    edges = [("a", "b", 0.9), ("b", "c", 0.9), ("a", "c", 0.05)]
    assert foresight(*edges).steps_to_execution(running("a"))["c"] == 1
    assert foresight(*edges, floor=0.1).steps_to_execution(running("a"))["c"] == 2
    never = foresight(("a", "b", 1), ("a", "c", 0.0))
    assert never.steps_to_execution(running("a"))["c"] == inf


def test_an_empty_position_has_nothing_to_come() -> None:
    chain = foresight(("a", "b"))
    assert chain.steps_to_execution(Position()) == {"a": inf, "b": inf}
    left = chain.remaining(Position())
    assert (left.steps, left.critical_seconds, left.critical_path, left.confidence) == (0, 0, (), 0)


def test_a_loop_without_an_exit_is_long_but_not_endless() -> None:
    for loop in (
        foresight(("a", "a"), starts=("a",)),
        foresight(("a", "b"), ("b", "a"), starts=("a",)),
        foresight(("a", "b", 1, 3), ("b", "a"), starts=("a",)),
    ):
        left = loop.remaining(running("a"))
        assert MOST_VISITS <= left.steps <= 2 * MOST_VISITS
        assert 1000 < left.critical_seconds < inf


def test_the_longest_of_independent_branches_is_a_mean_of_longest() -> None:
    fork = foresight(("a", "long", 0.5), ("a", "short", 1.0), a={"fork": "all"}, long={"seconds": 10})
    assert fork.remaining(finished("a")).critical_seconds == pytest.approx(0.5 * 10 + 0.5 * 1)


def test_confidence_is_that_of_the_roles_to_come() -> None:
    nodes = {"a": Node(confidence=0.5), "b": Node(confidence=0.9)}
    sure = Seen(Template("t", nodes, (Edge("a", "b", 1.0),), ("a",)))
    assert sure.remaining(running("a")).confidence == pytest.approx(0.7)
    assert sure.remaining(running("a", "stranger")).confidence == pytest.approx(1.4 / 3)


# Progress


def follow(*events: tuple[Any, ...]) -> Progress:
    """(step, role, *after) comes; (step,) finishes."""
    progress = Progress()
    for event in events:
        if len(event) == 1:
            progress.finished(event[0])
        else:
            progress.came(event[0], event[1], event[2:])
    return progress


FORK = foresight(("p", "a", 1, 1), ("p", "b", 1, 2), ("a", "j"), ("b", "j"), j={"join": "all"}).template


def test_a_fan_out_is_open_until_the_first_of_its_steps_finishes() -> None:
    events: list[tuple[Any, ...]] = [(1, "p"), (1,), (2, "a", 1), (3, "b", 1)]
    assert follow(*events[:2]).position(FORK) == finished("p")
    assert follow(*events[:3]).position(FORK) == running("a", open={("p", "b"): 2})
    assert follow(*events).position(FORK) == running("a", "b", open={("p", "b"): 1})
    assert follow(*events, (2,)).position(FORK) == running("b", finished={"a": 1})
    assert follow(*events, (2,), (3,), (4, "j", 2, 3)).position(FORK) == running("j")


def test_a_choice_is_made_when_one_of_its_ways_is_taken() -> None:
    choice = foresight(("p", "a", 0.5), ("p", "b", 0.5)).template
    assert follow((1, "p"), (1,), (2, "a", 1)).position(choice) == running("a")


def test_a_step_that_failed_is_expected_again() -> None:
    chain = foresight(("a", "b"), ("b", "c"))
    progress = follow((1, "a"), (1,), (2, "b", 1))
    progress.failed(2)
    assert progress.position(chain.template) == finished("a")
    assert chain.steps_to_execution(progress.position(chain.template))["b"] == 1
    progress.came(3, "b", [1])
    assert progress.position(chain.template) == running("b")
    progress.failed("unknown")


def test_the_lines_of_a_run_end_with_the_steps_that_nothing_follows() -> None:
    progress = follow((1, "p"), (1,), (2, "a", 1), (3, "b", 1), (3,), (4, "j", 3))
    assert sorted(progress.leaves()) == ["a", "j"]


def test_those_that_came_before_it_are_told_with_a_new_step() -> None:
    progress = follow((1, "p"), (1,))
    assert progress.came(2, "a", [1]) == (["p"], [set()])
    assert progress.came(3, "b", [1, "unknown"]) == (["p"], [{"a"}])


def test_a_long_run_keeps_only_what_matters() -> None:
    progress = Progress()
    for n in range(5000):
        progress.came(str(n), "act", [str(n - 1)] if n % 3 else [])
        progress.finished(str(n))
    assert len(progress._steps) <= 1024


# Random graphs


@st.composite
def graphs(draw: st.DrawFn, joins: bool = True) -> tuple[Template, Position]:
    roles = "abcdef"[: draw(st.integers(1, 6))]
    pairs = draw(st.lists(st.tuples(st.sampled_from(roles), st.sampled_from(roles)), unique=True, max_size=14))
    ways = Counter(source for source, _ in pairs)
    gaps, counts = st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([1.0, 2.0, 2.5])
    edges = tuple(Edge(s, t, 0.9 / ways[s], draw(gaps), draw(counts) if joins else 1.0) for s, t in pairs)
    ways_in = st.sampled_from([ANY, ALL, 2.0, 3.0] if joins else [ANY])
    nodes = {role: Node(draw(ways_in), seconds=draw(st.sampled_from([0.5, 1.0, 4.0]))) for role in roles}
    numbers = st.dictionaries(st.sampled_from(roles), st.integers(1, 3), max_size=3)
    opened = draw(st.dictionaries(st.sampled_from(pairs), st.sampled_from([1.0, 2.0]), max_size=2)) if pairs else {}
    return Template("t", nodes, edges, (roles[0],)), Position(draw(numbers), draw(numbers), opened)


def naive(template: Template, here: Position, steps: bool) -> dict[str, float]:
    """Value iteration from infinity: each role starts when what its join needs has arrived, given all other starts."""
    seconds = {r: 0.0 if steps else n.seconds or 0.0 for r, n in template.nodes.items()}
    place = {role: i for i, role in enumerate(template.order)}
    present = {role for role in template.nodes if here.running.get(role) or here.finished.get(role)}
    can = {e.target for e in template.edges if e.source in present or (e.source, e.target) in here.open}
    for _ in template.nodes:
        can |= {e.target for e in template.edges if e.source in can}
    ahead = [e for e in template.edges if place[e.source] < place[e.target] and e.probability >= 0.5]
    fed = {e.target for e in ahead if e.source in present or (e.source, e.target) in here.open}
    due = {role for role in fed if template.nodes[role].join in (ANY, ALL)}
    start = dict.fromkeys(template.nodes, inf)

    def arrivals(e: Edge) -> tuple[list[tuple[float, float]], tuple[float, float]]:
        way = 1.0 if steps else e.gap_seconds or 0.0
        hand = []
        if n := here.running.get(e.source):
            hand.append((seconds[e.source] + way, n * e.count))
        if n := here.finished.get(e.source):
            hand.append((way, n * e.count))
        if tokens := here.open.get((e.source, e.target)):
            hand.append((way, tokens))
        return hand, (start[e.source] + seconds[e.source] + way, e.count * template.width[e.source])

    def first(role: str) -> float:
        join = template.nodes[role].join
        into = [(e, *arrivals(e)) for e in template.edges if e.target == role]
        if join != ALL:
            everything = sorted(token for _, hand, later in into for token in (*hand, later))
            total = itertools.accumulate(tokens for _, tokens in everything)
            needed = 1.0 if join == ANY else float(join)
            return next((t for (t, _), sum_ in zip(everything, total, strict=True) if sum_ >= needed), inf)
        alone = [t for e, hand, later in into if place[e.source] >= place[role] for t, _ in (*hand, later)]
        met = []
        for e, hand, later in into:
            if place[e.source] < place[role] and (hand or e.source in can):
                later_too = not hand or (e.source in due and e.source in can)
                met.append(max([t for t, _ in hand] + ([later[0]] if later_too else [])))
        return min([max(met, default=inf), *alone])

    for _ in range(len(template.nodes) + 1):
        start = {role: first(role) for role in template.nodes}
    return {role: 0.0 if here.running.get(role) else start[role] for role in template.nodes}


@settings(max_examples=400, deadline=None)
@given(graphs())
def test_the_earliest_steps_and_seconds_are_those_of_a_plain_evaluator(graph: tuple[Template, Position]) -> None:
    template, here = graph
    ready = Seen(template)
    assert ready.steps_to_execution(here) == naive(template, here, steps=True)
    assert ready.next_use(here) == pytest.approx(naive(template, here, steps=False))


@settings(max_examples=200, deadline=None)
@given(graphs(), st.sampled_from("abcdef"), st.sampled_from("abcdef"))
def test_one_more_way_into_an_or_never_makes_anything_later_where_there_are_only_ors(
    graph: tuple[Template, Position], source: str, target: str
) -> None:
    template, here = graph
    nodes = {role: Node(seconds=node.seconds) for role, node in template.nodes.items()}
    before = Seen(Template("t", nodes, template.edges, template.starts)).steps_to_execution(here)
    if (
        source in nodes
        and target in nodes
        and not any((e.source, e.target) == (source, target) for e in template.edges)
    ):
        more = Template("t", nodes, (*template.edges, Edge(source, target, 0.1)), template.starts)
        after = Seen(more).steps_to_execution(here)
        assert all(after[role] <= before[role] for role in nodes)
    assert all((before[role] == 0) == (role in here.running) for role in nodes)
    assert all(steps == int(steps) for steps in before.values() if not isinf(steps))


@settings(max_examples=200, deadline=None)
@given(graphs(joins=False))
def test_visits_and_reach_without_joins_are_those_of_the_absorbing_chain(graph: tuple[Template, Position]) -> None:
    template, here = graph
    roles = list(template.nodes)
    chain = np.zeros((len(roles), len(roles)))
    for e in template.edges:
        chain[roles.index(e.source), roles.index(e.target)] = e.probability
    every = np.linalg.inv(np.eye(len(roles)) - chain)
    begin = np.array([here.running.get(r, 0) + here.finished.get(r, 0) for r in roles], float) @ chain
    for (_, target), tokens in here.open.items():
        begin[roles.index(target)] += tokens
    visits = Seen(template).visits(here)
    assert [visits[r] for r in roles] == pytest.approx(list(begin @ every), rel=1e-4, abs=1e-6)
    alone = Position(finished={roles[0]: 1})
    hit = (chain @ every)[0] / np.diag(every)
    assert [Seen(template).reach(alone)[r] for r in roles] == pytest.approx(list(hit), rel=1e-4, abs=1e-6)


def test_a_learned_join_takes_what_it_usually_takes_and_is_one_round_whatever_is_under_way() -> None:
    nodes = {"p": Node(fork="one"), "w": Node(), "j": Node(join="all", takes=5.0)}
    seen = Seen(Template("t", nodes, (Edge("p", "w", 1.0, None, 5.0), Edge("w", "j")), ("p",)))
    assert seen.visits(running("p"))["j"] == 1
    for width in (1, 3, 5, 7):
        assert seen.visits(running(*["w"] * width))["j"] == 1


def test_in_a_large_loop_the_reach_is_at_most_what_the_visits_say() -> None:
    roles = [f"r{i}" for i in range(40)]
    edges = [*itertools.pairwise(roles), (roles[-1], roles[0], 0.5)]
    reach = foresight(*edges, starts=(roles[0],)).reach(running(roles[-1]))
    assert reach["r5"] == pytest.approx(1.0)
    small = foresight(*itertools.pairwise(roles[:20]), (roles[19], roles[0], 0.5), starts=(roles[0],))
    assert small.reach(running(roles[19]))["r5"] == pytest.approx(0.5)


def test_visits_of_a_joined_loop_are_what_playing_the_game_gives() -> None:
    edges = [("p", "a", 1, 2), ("p", "b", 1, 1), ("a", "j"), ("b", "j"), ("j", "p", 0.4), ("j", "end", 0.6)]
    template = foresight(*edges, j={"join": "all"}, starts=("p",)).template
    rng, games, counts = random.Random(1), 4000, Counter[str]()
    for _ in range(games):
        going = True
        while going:
            counts.update(["a", "a", "b", "j"])
            going = rng.random() < 0.4
            counts["p" if going else "end"] += 1
    expected = Seen(template).visits(running("p"))
    assert [expected[role] for role in "pabj"] == pytest.approx([counts[role] / games for role in "pabj"], rel=0.05)


def test_a_large_loop_settles_to_the_dense_solution() -> None:
    rng = random.Random(2)
    roles = [f"r{i}" for i in range(120)]
    edges = [Edge(a, b, 0.9) for a, b in itertools.pairwise(roles)]
    edges += [Edge(roles[i], roles[rng.randrange(i)], 0.08) for i in range(1, 120)]
    template = Template("t", {role: Node(seconds=1.0) for role in roles}, tuple(edges), (roles[0],))
    chain = np.zeros((120, 120))
    for e in edges:
        chain[int(e.source[1:]), int(e.target[1:])] = e.probability
    expected = np.linalg.solve(np.eye(120) - chain.T, chain[0])
    visits = Seen(template).visits(finished("r0"))
    assert [visits[role] for role in roles] == pytest.approx(list(expected), rel=1e-3)
    seconds = np.linalg.solve(np.eye(120) - chain, chain.sum(axis=1))
    assert Seen(template).remaining(finished("r0")).critical_seconds == pytest.approx(seconds[0], rel=1e-3)


def test_a_loop_that_fills_slowly_is_settled_all_the_same() -> None:
    """Its first sweeps look geometric and are not: to add their rest led astray for ever."""
    ways = "aa ae bc cb cd ce da dc ea ed"
    odds = (0.45, 0.45, 0.9, 0.3, 0.3, 0.3, 0.45, 0.45, 0.45, 0.45)
    edges = tuple(Edge(way[0], way[1], odd) for way, odd in zip(ways.split(), odds, strict=True))
    template = Template("t", {role: Node() for role in "abcde"}, edges, ("a",))
    assert Seen(template).reach(finished("a"))["b"] == pytest.approx(0.15528, abs=1e-4)
