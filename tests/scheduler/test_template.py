from __future__ import annotations

import json
from typing import Any

import pytest

from scheduler.learned import MOST_EDGES, MOST_ROLES, Learned
from scheduler.template import Edge, Node, Template

PLAN: dict[str, Any] = {
    "nodes": {
        "plan": {"output_tokens": 200, "seconds": 4},
        "map": {"model": "small"},
        "reduce": {"join": "all"},
        "review": {},
    },
    "edges": [
        {"from": "plan", "to": "map", "count": 5, "gap_seconds": 0.5},
        {"from": "map", "to": "reduce"},
        {"from": "reduce", "to": "review"},
        {"from": "review", "to": "plan", "probability": 0.5},
    ],
    "starts": ["plan"],
}


def test_a_declared_template_comes_back_as_it_was_meant() -> None:
    template = Template.parse("t", PLAN)
    document = template.document()
    assert Template.parse("t", json.loads(json.dumps(document))) == template
    assert document["nodes"]["plan"] == {"join": "any", "fork": "one", "output_tokens": 200, "seconds": 4}
    assert document["edges"][3] == {"from": "review", "to": "plan", "probability": 0.5, "count": 1}


def test_roles_that_nothing_leads_to_are_the_starts_unless_they_are_named() -> None:
    assert Template.parse("t", {"nodes": {"a": {}, "b": {}}, "edges": [{"from": "a", "to": "b"}]}).starts == ("a",)
    with pytest.raises(ValueError, match="starts"):
        Template.parse("t", {"nodes": {"a": {}}, "edges": [{"from": "a", "to": "a"}]})


def test_probabilities_that_exceed_one_are_a_fan_out_and_others_a_choice() -> None:
    def fork(first: float, second: float, **node: Any) -> str:
        edges = [{"from": "a", "to": "b", "probability": first}, {"from": "a", "to": "c", "probability": second}]
        return Template.parse("t", {"nodes": {"a": node, "b": {}, "c": {}}, "edges": edges}).nodes["a"].fork

    assert fork(0.3, 0.7) == fork(0.1, 0.2) == "one"
    assert fork(1.0, 0.5) == "all"
    assert fork(0.5, 0.5, fork="all") == "all"
    with pytest.raises(ValueError, match=r"nodes.a.fork: the probabilities of a choice sum to 1.5"):
        fork(1.0, 0.5, fork="one")


def test_the_width_of_a_role_is_how_many_of_it_run_at_once() -> None:
    template = Template.parse("t", PLAN)
    assert template.width == {"plan": 1, "map": 5, "reduce": 1, "review": 1}
    assert template.order == ("plan", "map", "reduce", "review")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": {}}, "nodes: an object with 1 to 1000 roles"),
        ({"nodes": []}, "nodes: an object"),
        ({"nodes": {f"n{i}": {} for i in range(1001)}}, "nodes: an object"),
        ({"nodes": {"a": 3}, "edges": []}, r"nodes.a: an object"),
        ({"nodes": {"a" * 257: {}}, "edges": []}, "nodes: a name"),
        ({"nodes": {"a": {"color": 1}}, "edges": []}, r"nodes.a: unknown field 'color'"),
        ({"nodes": {"a": {"join": "most"}}, "edges": []}, r"nodes.a.join"),
        ({"nodes": {"a": {"join": 0}}, "edges": []}, r"nodes.a.join"),
        ({"nodes": {"a": {"join": []}}, "edges": []}, r"nodes.a.join"),
        ({"nodes": {"a": {"join": 2}}, "edges": []}, r"nodes.a.join: waits for 2 tokens, but 0 come"),
        ({"nodes": {"a": {"fork": "some"}}, "edges": []}, r"nodes.a.fork"),
        ({"nodes": {"a": {"seconds": float("nan")}}, "edges": []}, r"nodes.a.seconds: a number from 0"),
        ({"nodes": {"a": {"seconds": float("inf")}}, "edges": []}, r"nodes.a.seconds"),
        ({"nodes": {"a": {"prompt_tokens": -1}}, "edges": []}, r"nodes.a.prompt_tokens"),
        ({"nodes": {"a": {"output_tokens": True}}, "edges": []}, r"nodes.a.output_tokens"),
        ({"nodes": {"a": {"seconds": 10**400}}, "edges": []}, r"nodes.a.seconds"),
        ({"nodes": {"a": {"model": ""}}, "edges": []}, r"nodes.a.model"),
        ({"edges": {}}, "edges: a list of at most 10000"),
        ({"edges": [{}] * 10_001}, "edges: a list"),
        ({"edges": ["a"]}, r"edges\[0\]: an object"),
        ({"edges": [{"from": "plan"}]}, r"edges\[0\].to: a name"),
        ({"edges": [{"from": "plan", "to": "x"}]}, r"edges\[0\].to: no node is called 'x'"),
        ({"edges": [{"from": "plan", "to": ["map"]}]}, r"edges\[0\].to: a name"),
        ({"edges": [{"from": "plan", "to": "map", "probability": 1.5}]}, r"edges\[0\].probability"),
        ({"edges": [{"from": "plan", "to": "map", "probability": None}]}, r"edges\[0\].probability"),
        ({"edges": [{"from": "plan", "to": "map", "count": 0}]}, r"edges\[0\].count"),
        ({"edges": [{"from": "plan", "to": "map", "gap_seconds": "1"}]}, r"edges\[0\].gap_seconds"),
        ({"edges": [{"from": "plan", "to": "map"}] * 2}, r"edges\[1\]: .* listed twice"),
        ({"starts": []}, "starts: a list"),
        ({"starts": ["x"]}, "starts: no node"),
        ({"starts": ["plan", "plan"]}, "starts: a role is listed twice"),
        ({"colour": 1}, "template: unknown field 'colour'"),
    ],
)
def test_what_is_wrong_with_a_declaration_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template.parse("t", {**PLAN, **({"starts": None} if "nodes" in change else {}), **change})


def test_a_join_may_wait_for_all_the_steps_that_a_fan_out_makes_but_not_for_more() -> None:
    nodes = {"plan": {}, "map": {}, "reduce": {"join": 5}, "review": {}}
    assert Template.parse("t", {**PLAN, "nodes": nodes}).nodes["reduce"].join == 5
    with pytest.raises(ValueError, match="waits for 6 tokens, but 5 come"):
        Template.parse("t", {**PLAN, "nodes": {**nodes, "reduce": {"join": 6}}})


def learned(*edges: Edge, steps: int = 10, **more: Any) -> Template:
    """A template as if so many steps of each of its roles had been seen."""
    roles = dict.fromkeys(role for edge in edges for role in (edge.source, edge.target))
    return Template("m", {role: Node(confidence=steps / (steps + 1), **more) for role in roles}, edges, ())


def test_a_declaration_counts_for_ten_steps_of_a_role_and_what_it_leaves_open_is_as_measured() -> None:
    measured = learned(
        Edge("plan", "reduce", 0.5, 3.0), Edge("plan", "other", 0.4, 4.0, 3.0), Edge("plan", "rare", 0.1),
        Edge("other", "fix", 0.05), seconds=9.0, prompt_tokens=70.0,
    )  # fmt: skip
    declared = Template.parse("t", {
        "nodes": {"plan": {"seconds": 4}, "reduce": {}},
        "edges": [{"from": "plan", "to": "reduce", "gap_seconds": 1, "count": 3}],
    })  # fmt: skip
    tempered = declared.tempered(measured)
    assert (tempered.nodes["plan"].seconds, tempered.nodes["plan"].prompt_tokens) == (6.5, 70)
    assert tempered.nodes["reduce"].seconds == 9
    found = {(e.source, e.target): e for e in tempered.edges}
    assert found.keys() == {("plan", "reduce"), ("plan", "other"), ("other", "fix")}, "the rare one may be noise"
    reduce, other = found["plan", "reduce"], found["plan", "other"]
    assert (reduce.probability, reduce.gap_seconds) == (0.75, 2)
    assert reduce.probability * reduce.count == pytest.approx((1 * 3 + 0.5 * 1) / 2)
    assert (other.probability, other.gap_seconds, other.count) == (pytest.approx(0.2), 4, 3)
    assert found["other", "fix"].probability == 0.05
    assert tempered.starts == declared.starts
    assert declared.tempered(Template("m", {}, (), ())) == declared


def test_a_way_that_nobody_declared_does_not_hold_up_a_join_nor_makes_a_choice_more_than_one() -> None:
    nodes = {"plan": {}, "search": {}, "write": {"join": 2}}
    edges = [{"from": "plan", "to": "search", "count": 2}, {"from": "search", "to": "write"}]
    declared = Template.parse("t", {"nodes": nodes, "edges": edges})
    tempered = declared.tempered(learned(Edge("plan", "write"), Edge("plan", "search"), Edge("search", "write")))
    assert {(e.source, e.target) for e in tempered.edges} == {("plan", "search"), ("search", "write")}

    both = Template.parse("t", {"nodes": {"a": {}, "b": {}, "c": {}}, "edges": [
        {"from": "a", "to": "b"}, {"from": "a", "to": "c"},
    ]})  # fmt: skip
    assert both.nodes["a"].fork == "all"
    chosen = both.tempered(learned(Edge("a", "b", 0.5), Edge("a", "c", 0.5), steps=11))
    assert chosen.nodes["a"].fork == "one"
    assert sum(e.probability for e in chosen.edges) == pytest.approx(1)


def edge(learned: Learned, source: str, target: str) -> Any:
    return next(e for e in learned.template().edges if (e.source, e.target) == (source, target))


def react(learned: Learned, turns: int) -> None:
    learned.begins("act")
    for _ in range(turns - 1):
        learned.follows(["act"], "act")
    learned.ended("act")


def map_reduce(learned: Learned, width: int) -> None:
    learned.begins("split")
    for i in range(width):
        learned.follows(["split"], "map", [{"map"} if i else set()])
    learned.follows(["map"] * width, "reduce", [set()] * width)
    learned.ended("reduce")


def test_a_chain_of_one_role_is_a_self_loop_with_its_exit_probability() -> None:
    learned = Learned("t")
    for _ in range(50):
        react(learned, 5)
    assert edge(learned, "act", "act").probability == pytest.approx(0.8, abs=0.01)
    assert learned.template().starts == ("act",)


def test_one_run_gives_a_usable_graph() -> None:
    learned = Learned("t")
    map_reduce(learned, 4)
    template = learned.template()
    assert (edge(learned, "split", "map").count, template.nodes["reduce"].join) == (4, "all")
    assert all(0.9 < e.probability < 1 for e in template.edges)
    assert template.nodes["split"].confidence == 0.5


def test_steps_beside_each_other_are_a_fan_out_of_their_mean_width() -> None:
    learned = Learned("t")
    for width in (3, 5, 7):
        map_reduce(learned, width)
    assert edge(learned, "split", "map").count == pytest.approx(5)
    assert edge(learned, "split", "map").probability == pytest.approx(1, abs=0.05)
    assert learned.template().nodes["reduce"].join == "all"


def test_roles_beside_each_other_are_a_fan_out_and_roles_instead_of_each_other_a_choice() -> None:
    beside, instead = Learned("t"), Learned("t")
    for i in range(20):
        beside.follows(["plan"], "search")
        beside.follows(["plan"], "read", [{"search"}])
        instead.follows(["plan"], "search" if i % 2 else "read")
    assert beside.template().nodes["plan"].fork == "all"
    assert [round(e.probability, 1) for e in beside.template().edges] == [1, 1]
    assert instead.template().nodes["plan"].fork == "one"
    assert [round(e.probability, 1) for e in instead.template().edges] == [0.5, 0.5]


def test_a_join_that_leaves_a_step_behind_waits_for_the_usual_number() -> None:
    learned = Learned("t")
    for i in range(30):
        for k in range(3):
            learned.follows(["ask"], f"voter{k}", [{f"voter{j}" for j in range(k)}])
        late = i % 3
        learned.follows([f"voter{k}" for k in range(3) if k != late], "judge", [set(), set()])
        learned.ended(f"voter{late}")
        learned.ended("judge")
    assert learned.template().nodes["judge"].join == pytest.approx(2)
    assert edge(learned, "voter0", "judge").probability == pytest.approx(2 / 3, abs=0.02)


def test_a_role_that_follows_one_step_or_another_is_an_or() -> None:
    learned = Learned("t")
    for _ in range(10):
        learned.follows(["small"], "answer")
        learned.follows(["large"], "answer")
    assert learned.template().nodes["answer"].join == "any"


def test_an_abandoned_run_lowers_what_is_expected_to_follow() -> None:
    learned = Learned("t")
    for i in range(40):
        learned.begins("a")
        if i % 4:
            learned.follows(["a"], "b")
            learned.ended("b")
        else:
            learned.ended("a")
    assert edge(learned, "a", "b").probability == pytest.approx(0.75, abs=0.01)


def test_tokens_seconds_and_gaps_are_means_that_move() -> None:
    learned = Learned("t")
    learned.follows(["a"], "b")
    for n in range(400):
        learned.spent("b", 100 if n < 200 else 300, 10, 2.0, "large")
        learned.gap("a", "b", 1.0)
        learned.gap("a", "nobody", 1.0)
    node = learned.template().nodes["b"]
    assert 280 < (node.prompt_tokens or 0) < 300
    assert (node.output_tokens, node.seconds, node.model) == (10, 2, "large")
    assert edge(learned, "a", "b").gap_seconds == 1
    assert learned.template().nodes["a"].seconds is None


def test_what_a_program_does_now_outweighs_what_it_did_long_ago() -> None:
    learned = Learned("t")
    for n in range(4000):
        learned.follows(["a"], "old" if n < 2000 else "new")
    assert edge(learned, "a", "new").probability > 0.9


def test_what_was_seen_once_long_ago_is_dropped() -> None:
    learned = Learned("t")
    learned.follows(["a"], "once")
    for _ in range(3000):
        learned.follows(["a"], "usual")
    assert [e.target for e in learned.template().edges] == ["usual"]


def test_what_is_learned_is_bounded_and_the_least_used_is_forgotten() -> None:
    learned = Learned("t")
    for n in range(3000):
        learned.follows(["hub"], "usual")
        learned.follows(["hub"], f"noise{n}")
        learned.follows([f"noise{n - 1}", f"noise{n - 2}"], f"noise{n}", [{"usual"}, set()])
    template = learned.template()
    assert len(template.nodes) <= MOST_ROLES
    assert len(template.edges) <= MOST_EDGES
    assert edge(learned, "hub", "usual").probability > 0.4
    wide = Learned("t")
    for n in range(60 * 60):
        wide.follows([f"r{n % 60}"], f"r{n // 60}")
    assert len(wide.template().edges) <= MOST_EDGES


def test_what_is_learned_survives_a_dump_and_goes_on_the_same() -> None:
    learned = Learned("t")
    for width in (3, 5):
        map_reduce(learned, width)
    learned.spent("map", 10, 20, 3.0)
    again = Learned.load(json.loads(json.dumps(learned.dump())))
    assert again.template() == learned.template()
    for one in (learned, again):
        map_reduce(one, 9)
    assert again.template() == learned.template()
    assert again.dump() == learned.dump()


def test_the_version_tells_when_a_template_is_out_of_date() -> None:
    learned = Learned("t")
    before = learned.version
    learned.begins("a")
    assert learned.version > before
