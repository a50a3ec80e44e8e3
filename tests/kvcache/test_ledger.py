"""What the ledger does with a block that very many need."""

from __future__ import annotations

import pytest

from kvcache import ledger as ledger_module
from kvcache.ledger import ANONYMOUS, DEVICE, HOST, MOST_KEPT, MOST_OWNERS, Ledger


def shared(branches: int) -> Ledger:
    """A role whose branches share their first block."""
    ledger = Ledger()
    for number in range(branches):
        ledger.began(f"b{number}", None, 0.0)
        ledger.wrote(f"b{number}", "role", ("system", f"own {number}"), 0.0)
        for key in ("system", f"own {number}"):
            if not ledger.copies(key, DEVICE):
                ledger.gained(key, DEVICE)
        ledger.left(f"b{number}")
    return ledger


def test_a_block_of_many_branches_counts_for_its_role_and_those_that_came_last() -> None:
    span = shared(50).span("system")
    assert span is not None
    assert len(span.owners) == 51
    assert set(span.ranked_by) == {"role", *(f"b{number}" for number in range(50 - MOST_OWNERS, 50))}


def test_an_old_branch_counts_again_when_its_next_step_waits() -> None:
    ledger = shared(50)
    ledger.began("b3", ("system",), 1.0)
    span = ledger.span("system")
    assert span is not None
    assert "b3" in span.ranked_by
    assert "role" in span.ranked_by


def test_a_step_of_whose_prompt_nothing_is_known_supersedes_nothing() -> None:
    ledger = shared(2)
    ledger.began("b0", None, 1.0)
    assert ledger.held("b0") == (2, 0)
    ledger.began("b0", ("system",), 2.0)
    assert ledger.held("b0") == (1, 0)


def write(ledger: Ledger, owner: str, *keys: str, role: str | None = None, step: int | None = None) -> None:
    ledger.wrote(owner, role, keys, 0.0, step)
    for key in keys:
        if not ledger.copies(key, DEVICE):
            ledger.gained(key, DEVICE)


def owners(ledger: Ledger, key: str) -> set[str]:
    span = ledger.span(key)
    assert span is not None
    return set(span.owners)


def test_a_waiting_step_needs_what_is_held_of_its_prompt_whoever_wrote_it() -> None:
    ledger = Ledger()
    write(ledger, "a", "system", "a")
    ledger.began("b", ("system", "b"), 0.0)
    assert owners(ledger, "system") == {"a", "b"}
    ledger.released("a", 0.0)
    assert owners(ledger, "system") == {"b"}


def test_the_step_that_began_last_has_the_word_though_an_older_one_frees_later() -> None:
    ledger = Ledger()
    old = ledger.began("a", ("x",), 0.0)
    new = ledger.began("a", ("x",), 0.0)
    write(ledger, "a", "x", "new", step=new)
    write(ledger, "a", "x", "old", step=old)
    assert ledger.line("a") == ["x", "new"]
    assert owners(ledger, "old") == set(), "superseded, so it goes first"


def test_a_block_that_was_lost_and_written_again_does_not_hide_what_is_superseded() -> None:
    ledger = Ledger()
    write(ledger, "a", "x", "y")
    ledger.lost("x", DEVICE)
    assert ledger.line("a") == []
    write(ledger, "a", "x", "y")
    ledger.began("a", ("x", "q"), 0.0)
    assert (owners(ledger, "x"), owners(ledger, "y")) == ({"a"}, set())


def test_an_older_step_that_writes_before_the_newer_one_has_the_word_until_then() -> None:
    ledger = Ledger()
    old, new = ledger.began("a", None, 0.0), ledger.began("a", None, 0.0)
    write(ledger, "a", "x", "old", step=old)
    assert ledger.line("a") == ["x", "old"]
    write(ledger, "a", "x", "new", step=new)
    assert ledger.line("a") == ["x", "new"]


def test_a_preempted_step_writes_twice() -> None:
    ledger = Ledger()
    step = ledger.began("a", None, 0.0)
    write(ledger, "a", "x", step=step)
    write(ledger, "a", "x", "y", step=step)
    assert ledger.line("a") == ["x", "y"]


def test_a_role_is_compared_with_its_branch_that_began_last_not_with_the_one_that_freed_last() -> None:
    ledger = Ledger()
    old, new = ledger.began("old", None, 0.0), ledger.began("new", None, 0.0)
    write(ledger, "new", "s", "t", "u", role="role", step=new)
    write(ledger, "old", "s", "x", role="role", step=old)
    assert ledger.line("role") == ["s"]
    write(ledger, "next", "s", "t", "v", role="role", step=ledger.began("next", None, 0.0))
    assert ledger.line("role") == ["s", "t"]


def test_what_an_older_step_of_a_branch_leaves_says_nothing_of_its_role() -> None:
    ledger = Ledger()
    old = ledger.began("a", None, 0.0)
    new = ledger.began("a", None, 0.0)
    write(ledger, "a", "s", "t", role="role", step=new)
    write(ledger, "b", "s", "t", role="role", step=ledger.began("b", None, 0.0))
    write(ledger, "a", "other", role="role", step=old)
    assert ledger.line("role") == ["s", "t"]


def test_what_a_tier_gained_unknown_is_dead_when_the_owner_who_wrote_it_later_is_released() -> None:
    ledger = Ledger()
    ledger.gained("x", HOST)
    assert owners(ledger, "x") == {ANONYMOUS}
    write(ledger, "a", "x")
    assert owners(ledger, "x") == {"a"}
    ledger.released("a", 0.0)
    assert owners(ledger, "x") == set()


def test_what_an_unnamed_step_wrote_stays_unknown_when_a_named_owner_is_released() -> None:
    ledger = Ledger()
    ledger.gained("x", HOST)
    write(ledger, ANONYMOUS, "x")
    write(ledger, "a", "x")
    ledger.released("a", 0.0)
    assert owners(ledger, "x") == {ANONYMOUS}


def test_what_was_gained_for_a_step_that_wrote_something_else_is_superseded() -> None:
    ledger = Ledger()
    step = ledger.began("a", None, 0.0)
    ledger.gained("x", HOST, "a")
    assert owners(ledger, "x") == {"a"}
    write(ledger, "a", "y", step=step)
    assert owners(ledger, "x") == set()


def test_a_block_of_very_many_is_never_dead_while_one_of_them_that_was_let_go_may_need_it() -> None:
    ledger = shared(MOST_KEPT + 10)
    assert len(owners(ledger, "system")) == MOST_KEPT + 1
    for owner in (*(f"b{number}" for number in range(10, MOST_KEPT + 10)), "role"):
        ledger.released(owner, 0.0)
    assert owners(ledger, "system") == {ANONYMOUS}


def test_the_line_of_a_branch_starts_at_the_start_though_very_many_share_it() -> None:
    ledger = shared(MOST_KEPT + 10)
    assert "b2" not in owners(ledger, "system")
    assert ledger.line("b2") == ["system", "own 2"]
    ledger.lost("system", DEVICE)
    assert ledger.line("b2") == [], "no prompt finds it"


def test_a_branch_that_is_never_released_is_forgotten_with_its_own_blocks_where_very_many_share_the_rest() -> None:
    """Ten thousand branches of a hot prompt: what is kept of them is not a multiple of what was ever written."""
    ledger = Ledger()
    prompt = tuple(f"s{n}" for n in range(50))
    for number in range(10_000):
        owner = f"b{number}"
        ledger.began(owner, prompt, 0.0)
        write(ledger, owner, *prompt, owner, role="role")
        ledger.left(owner)
        ledger.lost(owner, DEVICE)
    assert len(list(ledger)) <= MOST_KEPT + 2
    assert "b9999" in ledger
    assert "b5" not in ledger
    assert "b5" in ledger.forgotten


def test_more_roles_than_are_remembered_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MOST_ROLES", 3)
    ledger = Ledger()
    for number in range(9):
        write(ledger, f"b{number}", f"x{number}", role=f"role {number}")
    assert list(ledger._roles) == ["role 6", "role 7", "role 8"]
    monkeypatch.setattr(ledger_module, "MOST_RECALLED", 4)
    write(ledger, "long", "a", "b", "c", role="role 9")
    assert list(ledger._roles) == ["role 8", "role 9"]


def test_what_a_role_s_steps_share_is_the_role_s_though_the_step_before_was_evicted_in_between() -> None:
    """As under LRU in a cycle, where it always is."""
    ledger = Ledger()
    for number in range(2):
        owner = f"b{number}"
        ledger.began(owner, None, 0.0)
        write(ledger, owner, "system", "tools", owner, role="role")
        ledger.left(owner)
        assert ledger.held("role") == ((2, 0) if number else (0, 0))
        if not number:
            for key in ("system", "tools", owner):
                ledger.lost(key, DEVICE)
