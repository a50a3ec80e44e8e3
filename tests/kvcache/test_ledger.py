"""What the ledger does with a block that very many need."""

from __future__ import annotations

from kvcache.ledger import DEVICE, MOST_OWNERS, Ledger


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
    ledger.began("b3", None, 1.0)
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
