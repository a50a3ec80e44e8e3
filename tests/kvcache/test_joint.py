"""Both tiers as one: what goes, what is saved, what there is room for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.joint import Joint, Leaving, upcoming
from kvcache.keeper import Keeper
from kvcache.ledger import DEVICE, HOST, Key
from kvcache.order import Order
from kvcache.policies import POLICIES
from kvcache.policy import Hint
from tests.kvcache.stacks import Run

HERE = 1000.0


class Engine:
    """A device of numbered blocks and a host of named chunks, both as plain dicts. A name is its key."""

    def __init__(self, room: int, chunks: int, margin: int, policy: str = "belady") -> None:
        self.keeper = Keeper(POLICIES[policy](), 1)
        self.blocks: dict[int, Key] = {}
        self.chunks: dict[Key, int] = {}
        self.room, self.size = room, chunks
        self.joint = Joint(self.keeper, self, margin)

    def block(self, name: Key) -> int | None:
        return next((number for number, key in self.blocks.items() if key == name), None)

    def name(self, number: int) -> Key | None:
        return self.blocks.get(number)

    def stored(self, name: Key) -> bool:
        return name in self.chunks

    def depth(self, name: Key) -> int:
        return int(str(name)[1:])

    @property
    def idle(self) -> int:
        return self.room - len(self.blocks)

    @property
    def vacant(self) -> int:
        return self.size - len(self.chunks)

    def ran(self, owner: str, count: int, next_use: float, now: float = HERE, first: int = 0) -> None:
        """A step of the owner has left `count` blocks on the device, from its block `first` on."""
        keys = [f"{owner}{place}" for place in range(count)]
        self.keeper.began(owner, keys, now)
        self.keeper.wrote(owner, None, keys, now)
        free = iter(number for number in range(self.room) if number not in self.blocks)
        new = {next(free): key for key in keys[first:] if self.block(key) is None}
        self.blocks |= new
        for key in new.values():
            self.keeper.ledger.gained(key, DEVICE)
        self.keeper.left(owner, count, now)
        self.keeper.told({owner: Hint(now, next_use=next_use)}, now)
        self.keeper.device.put([(number, key) for number, key in reversed(new.items())], now)

    def store(self, names: list[Key], now: float = HERE) -> None:
        """The host has these, too."""
        for name in names:
            self.chunks[name] = 0
            self.keeper.ledger.gained(name, HOST)
        self.keeper.host.put([(name, name) for name in reversed(names)], now)
        self.joint.copied(names)

    def evict(self, count: int, held: bool = False) -> list[Leaving]:
        """The device gives up its next blocks; `held`: what is known of them is."""
        gone = []
        for _ in range(count):
            stack = self.keeper.device.order.first(HERE)
            assert stack is not None
            ((number, key),) = self.keeper.device.pop(stack, 1)
            gone.append(Leaving(number, key, key, self.depth(key), stack.freed))
            del self.blocks[number]
        for one in [] if held else gone:
            self.keeper.ledger.lost(one.key, DEVICE)
        return gone

    def give_up(self, names: list[Key]) -> None:
        """The host gives up these."""
        for name in names:
            self.keeper.host.remove(name)
            del self.chunks[name]
            self.joint.gone(name)
            self.keeper.ledger.lost(name, HOST)

    def save(self, now: float = HERE) -> None:
        """Carry out what moves there are."""
        moves = self.joint.moves(100, now)
        self.give_up([move.instead for move in moves if move.instead is not None])
        self.store(
            [move.name for move in sorted(moves, key=lambda move: self.depth(move.name))],
            moves[0].freed if moves else now,
        )


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0, 9)), max_size=40), st.data())
def test_upcoming_is_the_order_itself(added: list[tuple[str, float]], data: st.DataObject) -> None:
    policy = POLICIES["belady"]()
    order: Order[Run] = Order(policy)
    runs = [Run((owner,), freed) for owner, freed in added]
    for run in runs:
        order.add(run, HERE)
    for owner in data.draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=4)):
        policy.told({owner: Hint(HERE, next_use=data.draw(st.floats(0, 99)))}, HERE)
        order.changed(owner, HERE)
    for run in data.draw(st.lists(st.sampled_from(runs), max_size=5)) if runs else ():
        order.discard(run)
    assert list(upcoming(order, HERE)) == list(order)


def test_dead_chunks_go_first_then_copies_that_the_device_keeps_then_the_lowest() -> None:
    engine = Engine(room=8, chunks=8, margin=6)
    for owner, next_use in (("a", 9.0), ("b", 1.0), ("c", 50.0), ("d", 60.0)):
        engine.ran(owner, 2, HERE + next_use)
        engine.store([f"{owner}0", f"{owner}1"])
    engine.evict(4)
    assert set(engine.blocks.values()) == {"a0", "a1", "b0", "b1"}
    engine.keeper.released("c", HERE)
    assert engine.joint.spare(8, (), HERE) == ["c1", "c0", "b0", "b1", "d1", "d0", "a1", "a0"]
    assert engine.joint.spare(2, ("c0",), HERE) == ["c1", "b0"]
    assert engine.joint.spare(9, (), HERE) is None


def test_what_the_device_uses_is_given_up_before_what_it_only_keeps() -> None:
    engine = Engine(room=4, chunks=4, margin=0)
    engine.ran("a", 2, HERE + 1)
    engine.ran("b", 2, HERE + 5)
    engine.store(["a0", "a1"])
    engine.store(["b0", "b1"])
    for key in ("b0", "b1"):
        engine.keeper.device.remove(engine.block(key))
    assert engine.joint.spare(4, (), HERE) == ["b0", "b1", "a0", "a1"]


def test_what_the_device_gives_up_soon_is_saved_in_place_of_what_it_keeps() -> None:
    engine = Engine(room=4, chunks=2, margin=2)
    engine.ran("a", 2, HERE + 1)
    engine.store(["a0", "a1"])
    engine.ran("b", 2, HERE + 5)
    moves = engine.joint.moves(100, HERE)
    assert [(move.name, move.instead) for move in moves] == [("b1", "a0"), ("b0", "a1")]


def test_nothing_of_a_higher_rank_goes_for_it() -> None:
    engine = Engine(room=4, chunks=2, margin=4)
    engine.ran("a", 2, HERE + 1)
    engine.store(["a0", "a1"])
    engine.ran("b", 2, HERE + 5)
    engine.keeper.told({"a": Hint(HERE, next_use=HERE + 9)}, HERE)
    engine.evict(2)
    engine.keeper.told({"a": Hint(HERE, next_use=HERE + 2)}, HERE)
    assert set(engine.blocks.values()) == {"b0", "b1"}
    assert engine.joint.moves(100, HERE) == []
    engine.keeper.told({"a": Hint(HERE, next_use=HERE + 20)}, HERE)
    assert [(move.name, move.instead) for move in engine.joint.moves(100, HERE)] == [("b1", "a1"), ("b0", "a0")]


def test_of_what_does_not_fit_as_a_whole_the_start_is_saved() -> None:
    engine = Engine(room=6, chunks=2, margin=6)
    engine.ran("a", 6, HERE + 1)
    assert [move.name for move in engine.joint.moves(100, HERE)] == ["a0", "a1"]


def saved(engine: Engine, leaving: list[Leaving], most: int = 100) -> list[tuple[Key, Key | None]]:
    return [(move.name, move.instead) for move in engine.joint.late(leaving, most, HERE)]


def test_what_went_unsaved_takes_the_place_of_what_is_worth_less_the_last_that_went_first() -> None:
    engine = Engine(room=6, chunks=3, margin=6)
    engine.ran("z", 3, HERE + 90)
    engine.store(["z0", "z1", "z2"])
    engine.evict(3)
    engine.ran("a", 2, HERE + 50)
    engine.ran("b", 2, HERE + 5)
    leaving = engine.evict(4, held=True)
    assert [one.name for one in leaving] == ["a1", "a0", "b1", "b0"]
    assert saved(engine, leaving) == [("b0", "z2"), ("b1", "z1"), ("a0", "z0")]
    assert saved(engine, leaving, 1) == [("b0", "z2")]


def test_what_went_takes_the_place_of_what_is_of_no_use_without_it() -> None:
    engine = Engine(room=6, chunks=3, margin=6)
    engine.ran("a", 6, HERE + 5)
    engine.store(["a3", "a4", "a5"])
    leaving = engine.evict(6, held=True)
    assert saved(engine, leaving) == [("a0", "a5"), ("a1", "a4"), ("a2", "a3")]


def test_what_is_on_the_host_or_on_the_device_again_is_not_saved_late() -> None:
    engine = Engine(room=6, chunks=4, margin=6)
    engine.ran("a", 2, HERE + 5)
    engine.store(["a0"])
    leaving = engine.evict(2, held=True)
    assert saved(engine, leaving) == [("a1", None)]
    engine.blocks[5] = "a1"
    assert saved(engine, leaving) == []


def test_there_is_room_for_what_is_needed_sooner() -> None:
    engine = Engine(room=6, chunks=8, margin=6)
    engine.ran("a", 2, HERE + 1)
    engine.ran("b", 2, HERE + 5)
    engine.ran("x", 0, HERE + 3)
    engine.keeper.wrote("x", None, ["x0", "x1"], HERE)
    engine.store(["x0", "x1"])
    span = engine.keeper.ledger.span("x0")
    assert span is not None
    assert engine.joint.room(span, 9, HERE) == 4
    engine.ran("c", 2, HERE + 2)
    assert engine.joint.room(span, 9, HERE) == 2
    assert engine.joint.room(span, 1, HERE) == 1


def test_a_full_host_takes_only_what_costs_nothing() -> None:
    engine = Engine(room=4, chunks=3, margin=1)
    assert engine.joint.vacant(2, HERE) == 2
    engine.ran("a", 2, HERE + 1)
    engine.store(["a0", "a1"])
    assert engine.joint.vacant(5, HERE) == 1
    engine.keeper.released("a", HERE)
    assert engine.joint.vacant(5, HERE) == 3


def test_agents_in_turn_that_fit_both_tiers_together_lose_next_to_nothing() -> None:
    agents, size = 6, 14
    engine, found, asked, now = Engine(room=48, chunks=48, margin=23), 0, 0, HERE
    for turn in range(10 * agents):
        agent = turn % agents
        owner = "abcdef"[agent]
        keys = [f"{owner}{place}" for place in range(size)]
        held = next((at for at, key in enumerate(keys) if engine.block(key) is None and key not in engine.chunks), size)
        if turn >= agents:
            found, asked = found + held, asked + size
        mine = [number for key in keys if (number := engine.block(key)) is not None]
        for number in mine:
            engine.keeper.device.remove(number)
        need = size - len(mine) - engine.idle
        engine.keeper.told({owner: Hint(now, next_use=now)}, now)
        engine.evict(max(0, need))
        engine.ran(owner, size, now + agents, now)
        engine.keeper.device.put([(number, engine.blocks[number]) for number in reversed(mine)], now)
        engine.joint.copied([key for key in keys if key in engine.chunks])
        now += 1.0
        engine.save(now)
    assert found / asked > 0.85


class Counting(Engine):
    """How often was asked what lies where."""

    asked = 0

    def block(self, name: Key) -> int | None:
        self.asked += 1
        return None

    def stored(self, name: Key) -> bool:
        self.asked += 1
        return super().stored(name)

    def depth(self, name: Key) -> int:
        self.asked += 1
        return super().depth(name)


@pytest.mark.parametrize("stacks", [1, 50, 3000])
@pytest.mark.parametrize("sooner", [True, False])
def test_what_a_step_looks_at_does_not_grow_with_the_host(stacks: int, sooner: bool) -> None:
    margin, chunks = 32, 6000
    engine = Counting(room=64, chunks=chunks, margin=margin)
    keeper = engine.keeper
    for owner in range(stacks):
        keys = [f"{chr(1000 + owner)}{place}" for place in range(chunks // stacks)]
        keeper.wrote(str(owner), None, keys, HERE)
        keeper.told({str(owner): Hint(HERE, next_use=HERE + 9)}, HERE)
        engine.store(keys)
    engine.joint._copies.clear()
    engine.blocks = {number: f"x{number}" for number in range(64)}
    keeper.wrote("x", None, list(engine.blocks.values()), HERE)
    keeper.told({"x": Hint(HERE, next_use=HERE + (1 if sooner else 99))}, HERE)
    for key in engine.blocks.values():
        keeper.ledger.gained(key, DEVICE)
    keeper.device.put(list(engine.blocks.items())[::-1], HERE)
    keeper.settle(HERE, at_once=True)
    engine.asked = 0
    moves = engine.joint.moves(100, HERE)
    assert bool(moves) == sooner
    assert engine.asked <= 8 * margin


def settled() -> Counting:
    """An engine in which there was nothing to move."""
    engine = Counting(room=4, chunks=2, margin=4)
    engine.ran("a", 2, HERE + 1)
    engine.store(["a0", "a1"])
    engine.evict(2)
    engine.ran("b", 4, HERE + 5)
    assert engine.joint.moves(100, HERE) == []
    return engine


def test_nothing_is_looked_at_again_while_nothing_changes() -> None:
    engine = settled()
    before = engine.asked
    assert engine.joint.moves(100, HERE) == []
    assert engine.asked == before
    engine.keeper.told({"a": Hint(HERE, next_use=HERE + 9)}, HERE)
    assert [move.instead for move in engine.joint.moves(100, HERE)] == ["a1", "a0"]


def test_after_a_while_it_is_looked_at_again_though_nothing_is_known_to_have_changed() -> None:
    engine = settled()
    before = engine.asked
    assert engine.joint.moves(100, HERE + 0.2) == []
    assert engine.asked > before


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_save_never_loses_what_ranks_higher_than_what_is_saved(data: st.DataObject) -> None:
    engine = Engine(room=12, chunks=data.draw(st.integers(1, 8)), margin=data.draw(st.integers(0, 12)))
    for owner in data.draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12)):
        count = data.draw(st.integers(1, 4))
        while engine.idle < count:
            engine.evict(1)
        engine.ran(owner, count, HERE + data.draw(st.integers(1, 50)))
        before, rank = dict(engine.chunks), engine.keeper.policy.rank
        moves = engine.joint.moves(100, HERE)
        names = [move.name for move in moves]
        gone = [move.instead for move in moves if move.instead is not None]
        assert len(set(names)) == len(names)
        assert len(set(gone)) == len(gone) <= len(before)
        assert len(before) + len(names) - len(gone) <= engine.size
        for move in moves:
            assert engine.blocks[move.number] == move.name
            assert move.name not in engine.chunks
            if move.instead is not None and engine.block(move.instead) is None:
                lost = engine.keeper.ledger.span(move.instead)
                kept = engine.keeper.ledger.span(move.name)
                assert rank(Run(lost.owners, HERE), HERE) <= rank(Run(kept.owners, HERE), HERE)
        engine.save()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_saved_late_leaves_the_host_with_the_best_of_both(data: st.DataObject) -> None:
    chunks = data.draw(st.integers(1, 8))
    engine, rank = Engine(room=12, chunks=chunks, margin=12), {}
    for owner in data.draw(st.lists(st.sampled_from("abcde"), min_size=1, unique=True)):
        count, next_use = data.draw(st.integers(1, 4)), HERE + data.draw(st.integers(1, 50))
        engine.evict(max(0, count - engine.idle))
        engine.ran(owner, count, next_use)
        names = [f"{owner}{place}" for place in range(count)]
        rank |= dict.fromkeys(names, -next_use)
        if engine.vacant >= count and data.draw(st.booleans()):
            engine.store(names)
    leaving = engine.evict(data.draw(st.integers(0, len(engine.blocks))), held=True)
    moves = engine.joint.late(leaving, 100, HERE)
    gone = [move.instead for move in moves if move.instead is not None]
    left = [*(name for name in engine.chunks if name not in gone), *(move.name for move in moves)]
    assert len(left) == len(set(left)) <= chunks
    only = {one.name for one in leaving} | {name for name in engine.chunks if engine.block(name) is None}
    best = sorted((rank[name] for name in only), reverse=True)[:chunks]
    assert sorted((rank[name] for name in left if name in only), reverse=True) == best
