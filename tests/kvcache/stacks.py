"""The stacks of a cache that is only a test."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvcache.policy import Policy


@dataclass(slots=True, eq=False)
class Run:
    owners: Collection[str]
    freed: float = 0.0
    tokens: int = 64


def order_of(policy: Policy, now: float, *owners: str) -> list[str]:
    """These owners in the order in which stacks of theirs, freed one after the other, would go."""
    runs = [Run((owner,), freed=i) for i, owner in enumerate(owners)]
    return [run.owners[0] for run in sorted(runs, key=lambda run: (policy.rank(run, now), run.freed))]  # type: ignore[index]
