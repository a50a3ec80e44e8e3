from __future__ import annotations

import json
import math
import random

import pytest

from scheduler.histogram import REMEMBERED, LogBins, Spread, Tree, blend, remember

BINS = LogBins(0.01, 86_400, 48)
FLAT = [1 / 48] * 48


def test_a_value_lies_between_the_edges_of_its_bin() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        value = 0.01 * math.exp(draw.uniform(0, math.log(8_640_000)))
        i = BINS.bin(value)
        assert BINS.edges[i] * (1 - 1e-9) <= value <= BINS.edges[i + 1] * (1 + 1e-9)


@pytest.mark.parametrize(("value", "bin_"), [(-1, 0), (0, 0), (0.001, 0), (86_400, 47), (1e12, 47), (math.inf, 47)])
def test_what_lies_outside_falls_into_the_first_or_last_bin(value: float, bin_: int) -> None:
    assert BINS.bin(value) == bin_


def test_a_log_normal_keeps_its_median_and_its_mass() -> None:
    row = BINS.log_normal(8, 1.3)
    assert sum(row) == pytest.approx(1)
    assert Spread(BINS, row).quantile(0.5) == pytest.approx(8, rel=0.05)


def test_the_share_below_a_quantile_is_that_share() -> None:
    spread = Spread(BINS, BINS.log_normal(30, 2))
    for q in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert spread.below(spread.quantile(q)) == pytest.approx(q)
    assert spread.below(1e9) == 1
    assert spread.below(0) == 0


def test_the_mean_is_that_of_samples() -> None:
    spread = Spread(BINS, BINS.log_normal(30, 1, floor=0))
    draw = random.Random(1)
    samples = [spread.quantile(draw.random()) for _ in range(20_000)]
    assert spread.mean() == pytest.approx(sum(samples) / len(samples), rel=0.05)


def test_a_session_remembers_its_latest_values_only() -> None:
    memory = b""
    for i in range(40):
        memory = remember(memory, i)
    assert list(memory) == list(range(40 - REMEMBERED, 40))


@pytest.mark.parametrize("memory", [b"", b"\x00", b"\x2f" * 16, bytes(range(10, 26))])
def test_a_session_s_own_values_leave_the_mass_whole(memory: bytes) -> None:
    row = blend(FLAT, memory, 8)
    assert sum(row) == pytest.approx(1)
    assert min(row) > 0
    assert row == pytest.approx(FLAT) if not memory else max(row) > 1 / 48


def test_the_newer_of_two_values_counts_more() -> None:
    row = blend(FLAT, bytes((10, 30)), 8)
    assert row[30] > row[10] > row[20]


def test_a_key_that_was_never_seen_is_like_the_level_above() -> None:
    tree = Tree(4, 10, 100, 1000)
    tree.add([("a",)], 2)
    prior = [0.25] * 4
    assert tree.mixture([("a",), ("a", "new")], prior) is tree.mixture([("a",)], prior)


def test_the_first_value_already_counts_and_many_prevail() -> None:
    tree = Tree(4, 10, 100, 1e9)
    path, prior = (("a",), ("a", "b")), [0.25] * 4
    seen = [0.25]
    for _ in range(300):
        tree.add(path, 1)
        seen.append(tree.mixture(path, prior)[1])
        assert sum(tree.mixture(path, prior)) == pytest.approx(1)
    assert seen == sorted(seen)
    assert seen[1] > 0.25
    assert seen[-1] > 0.99


def test_a_key_follows_what_the_level_above_has_learned_since() -> None:
    tree = Tree(2, 10, 100, 1e9)
    tree.add([("a",), ("a", 1)], 0)
    before = tree.mixture([("a",), ("a", 1)], [0.5, 0.5])[1]
    for _ in range(100):
        tree.add([("a",), ("a", 2)], 1)
    assert tree.mixture([("a",), ("a", 1)], [0.5, 0.5])[1] > before + 0.3


def test_a_mixture_lags_by_a_sixty_fourth_of_its_counts_at_most() -> None:
    tree = Tree(2, 10, 100, 1e9)
    draw = random.Random(1)
    for n in range(1, 3000):
        tree.add([("a",)], int(draw.random() < 0.5))
        node = tree._nodes["a",]
        exact = (node.counts[1] + 5) / (n + 10)
        assert abs(tree.mixture([("a",)], [0.5, 0.5])[1] - exact) < 1 / 60


def test_old_counts_give_way_when_the_world_changes() -> None:
    tree = Tree(2, 10, 100, 1000)
    for _ in range(100_000):
        tree.add([("a",)], 0)
    for _ in range(2000):
        tree.add([("a",)], 1)
    assert tree.mixture([("a",)], [0.5, 0.5])[1] > 0.7


def test_the_key_that_learned_least_recently_is_forgotten_and_the_widest_after_what_lies_under_it() -> None:
    tree = Tree(2, 10, 4, 1000)
    for name in "xyz":
        tree.add([("all",), ("all", name)], 0)
    assert list(tree._nodes) == [("all", "x"), ("all", "y"), ("all", "z"), ("all",)]
    tree.add([("all",), ("all", "new")], 0)
    assert len(tree) == 4
    assert ("all",) in tree._nodes
    assert ("all", "x") not in tree._nodes


def test_a_tree_survives_as_json() -> None:
    tree = Tree(4, 10, 100, 1000)
    paths = [[("tool",), ("t", "r", "tool"), ("t", "r", "tool", ("bash", "read"))], [("end",), ("t", "r", "end")]]
    for i in range(20):
        tree.add(paths[i % 2], i % 4)
    other = Tree(4, 10, 100, 1000)
    other.load(json.loads(json.dumps(tree.dump())))
    assert list(other._nodes) == list(tree._nodes)
    for path in paths:
        assert list(other.mixture(path, [0.25] * 4)) == pytest.approx(list(tree.mixture(path, [0.25] * 4)))


@pytest.mark.parametrize("counts", [[[4, 1.0]], [[-1, 1.0]], [[0, -1.0]], [[0, math.nan]]])
def test_a_dump_that_does_not_fit_changes_nothing(counts: list[list[float]]) -> None:
    tree = Tree(4, 10, 100, 1000)
    tree.add([("a",)], 1)
    with pytest.raises(ValueError, match="counts"):
        tree.load([[["b"], counts]])
    assert list(tree._nodes) == [("a",)]
