"""The order against a naive sort of all stacks, over any sequence of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.order import SPARE, Order
from kvcache.policies import POLICIES
from kvcache.policy import Curve, Hint
from tests.kvcache.stacks import Run

OWNERS = st.sampled_from("abcde")
SOME = st.none() | st.floats(0, 100)


class Falling:
    """1 / (idle + delay)."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def index(self, idle: float) -> float:
        return 1 / (idle + self.delay)


CURVES: st.SearchStrategy[Curve | None] = st.none() | st.floats(0.1, 50).map(Falling)


class OrderMachine(RuleBasedStateMachine):
    """Every event that the simulator and the engine have, in any order."""

    @initialize(name=st.sampled_from(sorted(POLICIES)))
    def begin(self, name: str) -> None:
        self.policy = POLICIES[name]()
        self.order: Order[Run] = Order(self.policy)
        self.now = 1000.0
        self.runs: list[Run] = []  # as added

    def naive(self) -> list[Run]:
        return sorted(self.runs, key=lambda run: (self.policy.rank(run, self.now), run.freed))

    @rule(owners=st.lists(OWNERS, max_size=3, unique=True), ago=st.sampled_from([0, 0, 1, 7]))
    def add(self, owners: list[str], ago: float) -> None:
        self.runs.append(Run(owners, self.now - ago))
        self.order.add(self.runs[-1], self.now)

    @rule(index=st.integers(0, 50))
    def discard(self, index: int) -> None:
        if self.runs:
            self.order.discard(self.runs.pop(index % len(self.runs)))

    @rule(n=st.integers(1, 5))
    def take(self, n: int) -> None:
        for _ in range(n):
            if (run := self.order.first(self.now)) is not None:
                self.order.discard(run)
                self.runs.remove(run)

    @rule(owner=OWNERS)
    def start(self, owner: str) -> None:
        self.policy.started(owner, self.now)
        self.order.changed(owner, self.now)

    @rule(owner=OWNERS, tokens=st.integers(0, 5000))
    def finish(self, owner: str, tokens: int) -> None:
        self.policy.finished(owner, tokens, self.now)
        self.order.changed(owner, self.now)

    @rule(owner=OWNERS, gap=CURVES, steps=SOME, soon=SOME, hold=SOME, reuse=st.floats(0, 1), leased=st.booleans())
    def tell(
        self, owner: str, gap: Curve | None, steps: float | None, soon: float | None, hold: float | None,
        reuse: float, leased: bool,
    ) -> None:  # fmt: skip
        at = None if soon is None else self.now + soon
        hint = Hint(self.now, gap, steps, at, hold, reuse, leased=leased)
        self.policy.told({owner: hint}, self.now)
        self.order.changed(owner, self.now)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        self.policy.released(owner, self.now)
        self.order.changed(owner, self.now)

    @rule(owner=OWNERS)
    def leave(self, owner: str) -> None:
        """The owner's blocks are all superseded, so that it has none."""
        self.policy.forgotten(owner)
        for run in self.runs:
            if owner in run.owners:
                run.owners = [other for other in run.owners if other != owner]
                self.order.add(run, self.now)

    @rule(used=st.floats(0, 1))
    def press(self, used: float) -> None:
        self.policy.pressed(used)

    @rule(seconds=st.floats(0.001, 60))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.policy.refresh < float("inf"))
    @rule()
    def refresh(self) -> None:
        self.now += self.policy.refresh
        self.order.first(self.now)
        assert list(self.order) == self.naive()

    @invariant()
    def none_is_lost_or_doubled(self) -> None:
        assert len(self.order) == len(self.runs)
        assert set(map(id, self.order)) == set(map(id, self.runs))
        assert len(self.order._heap) <= 2 * len(self.runs) + SPARE

    @invariant()
    def the_first_is_the_first(self) -> None:
        ranked = list(self.order)
        if self.policy.refresh == float("inf"):
            assert ranked == self.naive()
            assert self.order.first(self.now) is (ranked[0] if ranked else None)

    def teardown(self) -> None:
        for run in getattr(self, "runs", []):
            self.order.discard(run)
        assert not hasattr(self, "order") or not (len(self.order) or self.order._of)


TestOrder = OrderMachine.TestCase
TestOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
