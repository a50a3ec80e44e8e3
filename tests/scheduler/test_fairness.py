"""Fair shares: who has been served much stands back, for a bounded time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.events import Usage
from scheduler.fairness import MOST, RATE, Shares
from tests.scheduler.test_admission import Play


def test_a_tenant_alone_never_stands_back() -> None:
    shares = Shares()
    for _ in range(100):
        shares.arrived("a")
        assert shares.behind("a") == 0
        shares.ended("a", Usage(100_000, 0, 100))


def test_who_was_served_more_stands_back_in_proportion_to_its_weight() -> None:
    shares = Shares()
    shares.weights["heavy"] = 2.0
    for tenant in ("plain", "heavy", "none"):
        shares.arrived(tenant)
    for tenant in ("plain", "heavy"):
        shares.arrived(tenant)
        shares.ended(tenant, Usage(int(RATE) * 10, 0, 0))
    assert (shares.behind("plain"), shares.behind("heavy"), shares.behind("none")) == (10.0, 5.0, 0.0)


def test_what_was_found_in_a_cache_costs_nothing() -> None:
    shares = Shares()
    for tenant in ("a", "b"):
        shares.arrived(tenant)
    shares.arrived("a")
    shares.ended("a", Usage(100_000, 100_000, 0))
    assert shares.behind("a") == 0


def test_who_comes_back_has_saved_up_nothing() -> None:
    shares = Shares()
    shares.arrived("rare")
    shares.ended("rare", Usage(10, 0, 0))
    shares.arrived("busy")
    for _ in range(50):
        shares.arrived("busy")
        shares.ended("busy", Usage(int(RATE), 0, 0))
    shares.arrived("rare")
    assert shares.behind("busy") == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 10**9)), max_size=60))
def test_nobody_stands_back_longer_than_the_bound(events: list[tuple[str, bool, int]]) -> None:
    shares, steps = Shares(), dict.fromkeys("abc", 0)
    for tenant, comes, tokens in events:
        if comes or not steps[tenant]:
            shares.arrived(tenant)
            steps[tenant] += 1
        else:
            shares.ended(tenant, Usage(tokens, 0, 0))
            steps[tenant] -= 1
        for one in "abc":
            assert not steps[one] or 0 <= shares.behind(one) <= MOST
        assert all(not steps[one] for one in "abc") or min(shares.behind(one) for one in "abc" if steps[one]) == 0
    for tenant, count in steps.items():
        for _ in range(count):
            shares.ended(tenant, Usage())
    assert not shares._open


def test_offline_work_is_let_in_behind_all_others_and_gives_way_first() -> None:
    play = Play()
    running = play.call("a", 9000)
    offline, later = play.call("night", 4000, flex=True), play.call("b", 6500)
    play.done(running)
    play.wait(60)
    assert later in play.sent
    assert offline in play.held
    play.done(later)
    play.wait(600)
    assert offline in play.sent


def test_who_was_alone_for_long_is_not_behind_who_comes_first_now() -> None:
    shares = Shares()
    for _ in range(50):
        shares.arrived("alone")
        shares.ended("alone", Usage(int(RATE) * 10, 0, 0))
    shares.arrived("new")
    shares.arrived("alone")
    assert shares.behind("alone") == 0
