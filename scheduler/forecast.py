"""When owners of KV run next, as the graphs of their runs foretell it: for each, the soonest of all runs."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

PATIENCE = 10.0  # seconds for which a foretold use may be overdue, or as long as it was foretold ahead if that is more
STALLED = 1.0  # the same of the next step of a run that stands still: then all that it foretold lapses

Key = tuple[str, str]
"""An owner on a worker: worker, owner."""


@dataclass(frozen=True, slots=True)
class _Use:
    """A run will use the owner's KV at `at`; from `lapses` on that is not believed any more."""

    at: float
    number: int
    run: str
    lapses: float


class Forecast:
    """The next use of each owner on each worker, in seconds on the clock of `now`; None: nothing is foretold any more.

    A use that is overdue for too long lapses: the graph was wrong, or the run was given up. Of a run that stands
    still all lapses once its next step is overdue: most runs end without a word, and one that has would else stand
    before all that live. What has not changed is told again, as an engine forgets it with an owner's last block.
    O(log runs) for each owner of the run that moves; nothing is kept of runs that are over or have lapsed.
    """

    def __init__(self) -> None:
        self._number = self._count = 0
        self._uses: dict[Key, dict[str, _Use]] = {}
        self._soon: dict[Key, list[tuple[float, int, _Use]]] = {}
        self._keys: dict[str, dict[Key, None]] = {}
        self._lapses: list[tuple[float, int, Key, _Use]] = []

    def moved(
        self, run: str, worker: str, seconds: Mapping[str, float], now: float, still: bool = False
    ) -> dict[Key, float | None]:
        """The run's owners on a worker run in so many seconds, no other of its there. `still`: no step of it runs."""
        changed = self._forget(run, worker)
        first = min(seconds.values(), default=0.0)
        for owner, wait in seconds.items():
            lapses = first + max(STALLED, first) if still else wait + max(PATIENCE, wait)
            self._add((worker, owner), run, now + wait, now + lapses)
            changed[worker, owner] = None
        return self._foretold(changed)

    def workers(self, run: str) -> dict[str, None]:
        """Where something is foretold of the run."""
        return {worker: None for worker, _ in self._keys.get(run, ())}

    def next_use(self, key: Key) -> float | None:
        """What is foretold of an owner."""
        return self._soonest(key) if key in self._uses else None

    def over(self, run: str) -> dict[Key, float | None]:
        """The run makes no further call."""
        return self._foretold(self._forget(run))

    def dropped(self, key: Key) -> None:
        """The owner's KV there is dead: nothing is foretold of it."""
        for run in self._uses.pop(key, {}):
            del self._keys[run][key]
            self._count -= 1
            if not self._keys[run]:
                del self._keys[run]
        self._soon.pop(key, None)

    def lapsed(self, now: float) -> dict[Key, float | None]:
        """Forget what is overdue for too long."""
        changed: dict[Key, None] = {}
        while self._lapses and self._lapses[0][0] <= now:
            _, _, key, use = heapq.heappop(self._lapses)
            if self._holds(key, use):
                del self._uses[key][use.run], self._keys[use.run][key]
                self._count -= 1
                if not self._keys[use.run]:
                    del self._keys[use.run]
                changed[key] = None
        return self._foretold(changed)

    def _add(self, key: Key, run: str, at: float, lapses: float) -> None:
        self._number += 1
        self._count += 1
        use = _Use(at, self._number, run, lapses)
        self._uses.setdefault(key, {})[run] = use
        self._keys.setdefault(run, {})[key] = None
        heapq.heappush(self._soon.setdefault(key, []), (at, use.number, use))
        heapq.heappush(self._lapses, (use.lapses, use.number, key, use))
        if len(self._lapses) > 2 * self._count + 1024:
            self._lapses = [one for one in self._lapses if self._holds(one[2], one[3])]
            heapq.heapify(self._lapses)

    def _forget(self, run: str, worker: str | None = None) -> dict[Key, None]:
        """What the run foretold on a worker, None: on all. A run whose sessions sit apart foretells owners on each."""
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

    def _foretold(self, keys: Mapping[Key, None]) -> dict[Key, float | None]:
        return {key: self._soonest(key) for key in keys}

    def _soonest(self, key: Key) -> float | None:
        """Amortised O(log runs)."""
        uses, soon = self._uses[key], self._soon[key]
        if not uses:
            del self._uses[key], self._soon[key]
            return None
        while not self._holds(key, soon[0][2]):
            heapq.heappop(soon)
        if len(soon) > 2 * len(uses) + 16:
            soon[:] = sorted((use.at, use.number, use) for use in uses.values())
        return soon[0][0]
