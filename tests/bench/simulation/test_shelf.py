"""A modelled KV tier: what it holds is always a prefix, nothing in use goes, and no block is lost or doubled."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.simulation.shelf import Held, Shelf
from bench.workloads.runs import Piece
from kvcache.policy import Policy
from kvcache.retention import Retention

BLOCK = 4


def line(name: str, tokens: int, parent: Piece | None = None) -> Piece:
    return Piece(name, tokens, parent)


def used(shelf: Shelf, piece: Piece, owner: str, now: float) -> None:
    """A step of the owner that began and ended at once."""
    held = shelf.pin(piece, now)
    shelf.fill(held, now)
    shelf.own(owner, "role", piece, now)
    shelf.unpin(held, now)


def test_a_block_belongs_to_the_piece_in_which_it_ends() -> None:
    shelf = Shelf(10, BLOCK, Policy())
    first = line("a", 6)
    second = line("b", 6, first)
    assert (shelf.size(first), shelf.size(second)) == (1, 2)
    used(shelf, second, "one", 0.0)
    assert shelf.depth(second) == 12
    assert shelf.depth(line("c", 6, first)) == 4, "what diverges inside a block shares only the blocks before it"


def test_the_least_recently_used_line_goes_first_and_from_its_tail() -> None:
    shelf = Shelf(4, BLOCK, Policy())
    old, new = line("old", 8), line("new", 8)
    used(shelf, old, "one", 1.0)
    used(shelf, new, "two", 2.0)
    used(shelf, line("more", 4), "three", 3.0)
    assert (shelf.depth(old), shelf.depth(new)) == (4, 8)


def test_using_a_line_makes_all_of_it_recent() -> None:
    shelf = Shelf(4, BLOCK, Policy())
    trunk = line("trunk", 4)
    tail, other = line("tail", 4, trunk), line("other", 8)
    used(shelf, tail, "one", 1.0)
    used(shelf, other, "two", 2.0)
    used(shelf, tail, "one", 3.0)
    used(shelf, line("more", 8), "three", 4.0)
    assert (shelf.depth(tail), shelf.depth(other)) == (8, 0)


def test_what_is_in_use_is_never_evicted_and_makes_a_prompt_unaffordable() -> None:
    shelf = Shelf(4, BLOCK, Policy())
    busy = line("busy", 12)
    held = shelf.pin(busy, 0.0)
    shelf.fill(held, 0.0)
    assert not shelf.affords(line("more", 8), 0)
    assert shelf.affords(line("more", 4), 0)
    assert shelf.affords(line("below", 4, busy), 0)
    shelf.unpin(held, 1.0)
    assert shelf.affords(line("more", 16), 0)
    assert not shelf.affords(line("more", 16), 1)
    assert not shelf.affords(line("below", 4, busy), 1), "its own hits are not room"


def test_a_branch_that_its_owner_left_is_dead_and_goes_before_what_is_older() -> None:
    shelf = Shelf(5, BLOCK, Retention())
    trunk = line("trunk", 4)
    left, kept = line("left", 8, trunk), line("kept", 4, trunk)
    used(shelf, line("old", 4), "other", 0.0)
    used(shelf, left, "one", 1.0)
    used(shelf, kept, "one", 2.0)
    used(shelf, line("more", 8), "three", 3.0)
    assert shelf.depth(left) == 4
    assert shelf.depth(kept) == 8


def test_a_released_owner_gives_its_blocks_first() -> None:
    shelf = Shelf(4, BLOCK, Retention())
    mine, yours = line("mine", 8), line("yours", 8)
    used(shelf, yours, "you", 1.0)
    used(shelf, mine, "me", 2.0)
    shelf.release("me", 3.0)
    used(shelf, line("more", 8), "three", 4.0)
    assert (shelf.depth(mine), shelf.depth(yours)) == (0, 8)


def test_a_role_owns_what_its_sessions_share() -> None:
    shelf = Shelf(8, BLOCK, Retention())
    system = line("system", 8)
    for number in range(2):
        used(shelf, line(f"own {number}", 4, system), f"session {number}", float(number))
        shelf.release(f"session {number}", float(number))
    assert shelf.held[system].owners == {"role"}


def test_a_full_tier_stores_the_start_of_a_line() -> None:
    shelf = Shelf(4, BLOCK, Policy())
    busy = shelf.pin(line("busy", 8), 0.0)
    shelf.fill(busy, 0.0)
    long = line("long", 40)
    assert shelf.store(long, 1.0) == 2
    assert shelf.depth(long) == 8
    shelf.check()


class Shelves(RuleBasedStateMachine):
    """Steps that begin, end, are cut off, released and copied, over a tree of lines."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(24, BLOCK, Retention())
        self.now = 0.0
        self.pieces = [line("root", 6)]
        self.running: list[tuple[Held, int]] = []

    @rule(parent=st.integers(0, 100), tokens=st.integers(1, 17))
    def grow(self, parent: int, tokens: int) -> None:
        above = self.pieces[parent % len(self.pieces)]
        if above.end + tokens <= 60:
            self.pieces.append(line(f"p{len(self.pieces)}", tokens, above))

    @rule(which=st.integers(0, 100), owner=st.sampled_from("abcd"), private=st.integers(0, 2))
    def begin(self, which: int, owner: str, private: int) -> None:
        self.now += 1
        piece = self.pieces[which % len(self.pieces)]
        if self.shelf.affords(piece, private):
            depth = self.shelf.depth(piece)
            held = self.shelf.pin(piece, self.now)
            assert self.shelf.depth(piece) == depth
            self.shelf.fill(held, self.now)
            self.shelf.take(private, self.now)
            self.shelf.own(owner, owner, piece, self.now)
            assert self.shelf.depth(piece) == piece.end // BLOCK * BLOCK
            self.running.append((held, private))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), cut=st.booleans(), done=st.integers(0, 60))
    def end(self, which: int, cut: bool, done: int) -> None:
        self.now += 1
        held, private = self.running.pop(which % len(self.running))
        used = 0
        tail = None
        if cut:
            self.shelf.drop(held, done)
        elif private:
            tail, used = self.shelf.keep(line("answer", 9, held.piece), private, self.now)
        self.shelf.give(private - used)
        self.shelf.unpin(held, self.now)
        if tail is not None:
            self.shelf.unpin(tail, self.now)

    @rule(which=st.integers(0, 100))
    def store(self, which: int) -> None:
        self.now += 1
        self.shelf.store(self.pieces[which % len(self.pieces)], self.now)

    @rule(owner=st.sampled_from("abcd"))
    def release(self, owner: str) -> None:
        self.shelf.release(owner, self.now)

    @invariant()
    def counters_agree(self) -> None:
        self.shelf.check()

    @invariant()
    def what_runs_is_whole(self) -> None:
        for held, _ in self.running:
            assert held.users
            assert self.shelf.held[held.piece] is held

    def teardown(self) -> None:
        while self.running:
            self.end(0, False, 0)
        assert (self.shelf.private, self.shelf.pinned) == (0, 0)
        assert self.shelf.room == self.shelf.blocks


TestShelves = Shelves.TestCase
TestShelves.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_more_than_there_is_room_for_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="no room"):
        Shelf(2, BLOCK, Policy()).take(3, 0.0)
