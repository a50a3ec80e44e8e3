"""Where steps stand in the lines of engines, and who is told when that changes."""

from __future__ import annotations

from scheduler.actions import Dispatch, Reprioritise
from scheduler.events import StepArrived, StepFinished, Tick, Usage, WorkerUp
from scheduler.identity import Identity
from scheduler.scheduler import Scheduler


class Core:
    """A scheduler over one worker whose engine takes advice."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.scheduler.handle(WorkerUp("w", "m", ("m",), "1", 1_000_000, 0, True, False), 0.0)

    def arrive(self, step: str, tenant: str, now: float, flex: bool = False) -> Dispatch:
        who = Identity(session=step, tenant=tenant)
        (sent,) = self.scheduler.handle(StepArrived(step, "m", who, flex=flex), now)
        assert isinstance(sent, Dispatch)
        return sent

    def finish(self, step: str, now: float, tokens: int) -> None:
        self.scheduler.handle(StepFinished(step, Usage(tokens, 0, 10), "stop"), now)

    def tick(self, now: float) -> dict[str, int]:
        """The priorities told, by owner."""
        actions = self.scheduler.handle(Tick(), now)
        return {one.owner: one.priority for one in actions if isinstance(one, Reprioritise)}


def owner(sent: Dispatch) -> str:
    return sent.owner.partition(".")[0]


def test_steps_of_a_single_tenant_are_all_equal_and_nobody_is_told_anything() -> None:
    core = Core()
    assert [core.arrive(f"s{n}", "t", float(n)).priority for n in range(3)] == [0, 0, 0]
    core.finish("s0", 5.0, 100_000)
    assert core.tick(6.0) == {}


def test_a_step_that_waits_falls_back_as_its_tenant_is_served_and_its_engine_is_told_once() -> None:
    core = Core()
    core.arrive("greedy-0", "greedy", 1.0)
    waits, light = core.arrive("greedy-1", "greedy", 1.0), core.arrive("light", "light", 2.0)
    assert waits.priority <= light.priority
    core.finish("greedy-0", 3.0, 80_000)  # 20 s of service
    told = core.tick(4.0)
    assert told[owner(waits)] > told.get(owner(light), light.priority)
    assert core.tick(5.0) == {}
    assert core.arrive("greedy-2", "greedy", 5.0).priority > told[owner(waits)]


def test_a_step_that_has_ended_is_told_of_no_more() -> None:
    core = Core()
    for name, tenant in (("a", "greedy"), ("b", "greedy"), ("c", "light")):
        core.arrive(name, tenant, 1.0)
    core.finish("a", 2.0, 80_000)
    core.finish("b", 2.0, 80_000)
    assert len(core.scheduler.places) == 1
    core.finish("c", 3.0, 100)
    assert core.tick(4.0) == {}
    assert len(core.scheduler.places) == 0


def test_offline_work_stands_behind_all_that_waits_and_what_came_before_it_is_told_its_place() -> None:
    core = Core()
    first = core.arrive("first", "t", 1.0)
    offline, later = core.arrive("offline", "t", 30.0, flex=True), core.arrive("later", "t", 60.0)
    assert first.priority <= later.priority < offline.priority
