"""Forecasts: what is known of a run, as hints for the engines that hold its KV. Seconds throughout.

A branch that waits for its next step is foretold by its learned gap. A role, on whose account the common prefix of its
steps is kept, is foretold by the graph: the soonest next use among all runs that can reach it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from kvcache.policy import Hint
from scheduler.graph import Step, Workflow
from scheduler.knowledge import Knowledge

PATIENCE = 10.0  # seconds for which a foretold use may be overdue, or as long as it was foretold ahead if that is more
NEVER = float("inf")

Key = tuple[str, str, str]
"""A role on a worker: worker, tenant, role."""


def forecast(knowledge: Knowledge, step: Step, now: float, seconds_per_token: float) -> Hint:
    """What is foretold of the branch whose step ended at `now`. `seconds_per_token` to compute its context again."""
    return Hint(now, gap=knowledge.gap(step.branch), seconds_per_token=seconds_per_token)


@dataclass(frozen=True, slots=True)
class _Use:
    """A run will use the role at `at`; from `lapses` on that is not believed any more. The greatest number counts."""

    at: float
    number: int
    run: str
    lapses: float


class RoleUses:
    """When each role runs next on each worker: the soonest of what all runs there foretell.

    A use that is overdue for too long lapses: the graph was wrong, or the run was given up. What has not changed is
    told again, as an engine forgets it with an owner's last block. O(log runs) for each role of the run that moves;
    nothing is kept of runs that are over or have lapsed.
    """

    def __init__(self) -> None:
        self._number = self._count = 0
        self._uses: dict[Key, dict[str, _Use]] = {}
        self._soon: dict[Key, list[tuple[float, int, _Use]]] = {}
        self._keys: dict[str, dict[Key, None]] = {}
        self._lapses: list[tuple[float, int, Key, _Use]] = []

    def moved(
        self, knowledge: Knowledge, workflow: Workflow, worker: str, now: float, seconds_per_token: float
    ) -> dict[Key, Hint]:
        """A step of the run has come to the worker, or ended there. Returns what is now foretold of its roles."""
        run = _name(workflow)
        changed = self._forget(run, worker)
        uses = knowledge.next_uses(workflow)
        for role, seconds in uses.items() if len(uses) > 1 else ():  # of a single role, its sessions' gaps say more
            if seconds < NEVER:
                key = (worker, workflow.tenant, role)
                self._add(key, run, now, now + seconds)
                changed[key] = None
        return self._foretold(changed, now, seconds_per_token)

    def over(self, workflow: Workflow, now: float, seconds_per_token: float) -> dict[Key, Hint]:
        """The run makes no further call. Returns what is now foretold of its roles."""
        return self._foretold(self._forget(_name(workflow)), now, seconds_per_token)

    def lapsed(self, now: float, seconds_per_token: float) -> dict[Key, Hint]:
        """Forget what is overdue for too long. Returns what is now foretold of those roles. For each tick."""
        changed: dict[Key, None] = {}
        while self._lapses and self._lapses[0][0] <= now:
            _, _, key, use = heapq.heappop(self._lapses)
            if self._holds(key, use):
                del self._uses[key][use.run], self._keys[use.run][key]
                self._count -= 1
                if not self._keys[use.run]:
                    del self._keys[use.run]
                changed[key] = None
        return self._foretold(changed, now, seconds_per_token)

    def _add(self, key: Key, run: str, now: float, at: float) -> None:
        self._number += 1
        self._count += 1
        use = _Use(at, self._number, run, at + max(PATIENCE, at - now))
        self._uses.setdefault(key, {})[run] = use
        self._keys.setdefault(run, {})[key] = None
        heapq.heappush(self._soon.setdefault(key, []), (at, use.number, use))
        heapq.heappush(self._lapses, (use.lapses, use.number, key, use))
        if len(self._lapses) > 2 * self._count + 1024:
            self._lapses = [one for one in self._lapses if self._holds(one[2], one[3])]
            heapq.heapify(self._lapses)

    def _forget(self, run: str, worker: str | None = None) -> dict[Key, None]:
        """What the run foretold on a worker, None: on all. A run whose sessions sit apart foretells roles on each."""
        known = self._keys.pop(run, {})
        keys = {key: None for key in known if worker is None or key[0] == worker}
        for key in keys:
            del self._uses[key][run]
        if left := {key: None for key in known if key not in keys}:
            self._keys[run] = left
        self._count -= len(keys)
        return keys

    def _holds(self, key: Key, use: _Use) -> bool:
        return self._uses.get(key, {}).get(use.run) is use

    def _foretold(self, keys: Iterable[Key], now: float, seconds_per_token: float) -> dict[Key, Hint]:
        return {key: Hint(now, next_use=self._soonest(key), seconds_per_token=seconds_per_token) for key in keys}

    def _soonest(self, key: Key) -> float | None:
        """When the role runs next there; None where no run foretells it. Amortised O(log runs)."""
        uses, soon = self._uses[key], self._soon[key]
        if not uses:
            del self._uses[key], self._soon[key]
            return None
        while not self._holds(key, soon[0][2]):
            heapq.heappop(soon)
        if len(soon) > 2 * len(uses) + 16:
            soon[:] = sorted((use.at, use.number, use) for use in uses.values())
        return soon[0][0]


def _name(workflow: Workflow) -> str:
    return f"{workflow.tenant}\0{workflow.id}"
