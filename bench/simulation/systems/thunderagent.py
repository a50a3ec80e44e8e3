"""ThunderAgent (arXiv 2602.13692): whole programs are paused and resumed. Ours, from the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from bench.simulation.system import Turn
from bench.simulation.systems.index import Gaps
from bench.simulation.systems.stock import StockRelease
from bench.workloads.runs import Run
from kvcache.policy import Hint, Policy
from kvcache.retention import Retention

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

HALF_LIFE = 5.0  # seconds in which the claim of an acting program halves
FORCED = 1800.0  # seconds after which a held call is let in whatever it needs


@dataclass(slots=True, eq=False)
class Program:
    """A run. REASONING while `running` or `held` has calls, else ACTING since `since`; ACTIVE on `worker`, or PAUSED.

    `context` is the tokens of its last call; `hints` what its sessions were last foretold, and on which worker.
    """

    context: int = 0
    worker: int | None = None
    running: int = 0
    since: float = 0.0
    held: list[Turn] = field(default_factory=list)
    hints: dict[str, tuple[int, Hint]] = field(default_factory=dict)


class ThunderAgent(StockRelease):
    """Ours, from the paper: programs are REASONING or ACTING, and ACTIVE or PAUSED.

    Every 5 s, on each worker whose active programs claim more tokens than its device memory has, acting ones are
    paused, the smallest claim first; then held programs are resumed, the shortest first, on the worker with the most
    room, while it suffices. A claim is the tokens of the program's last call, and halves each 5 s of acting. A call of
    a paused program is held until its program is resumed, at most 1,800 s. The end of a program is marked. As in our
    first simulations, the engines evict by the retention index, and what is paused goes first: the real one is a proxy
    and leaves the engine its LRU.
    """

    name = "thunderagent"
    tick = 5.0

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.gaps = Gaps(cluster.profile)
        self.programs: dict[str, Program] = {}

    def policy(self) -> Policy:
        return Retention()

    def arrived(self, turn: Turn) -> None:
        self.gaps.arrived(turn, self.cluster.now)
        program = self.programs.setdefault(turn.run.id, Program())
        program.context = turn.call.prompt.end
        if program.worker is None:
            program.held.append(turn)
        else:
            program.running += 1
            self.cluster.send(turn, program.worker)

    def finished(self, turn: Turn) -> None:
        super().finished(turn)
        assert turn.worker is not None
        program, now = self.programs[turn.run.id], self.cluster.now
        program.running -= 1
        program.since = now
        if not program.running:
            program.context = turn.call.prompt.end + turn.call.output
        hint = replace(self.gaps.finished(turn, now), leased=program.worker is not None)
        program.hints[turn.owner] = turn.worker, hint
        self.cluster.engines[turn.worker].tell(turn.owner, hint)

    def ended(self, run: Run) -> None:
        super().ended(run)
        self.gaps.ended(run)
        del self.programs[run.id]

    def ticked(self) -> None:
        used = [0.0] * len(self.cluster.engines)
        active: list[list[tuple[float, str]]] = [[] for _ in used]
        for run, program in self.programs.items():
            if program.worker is not None:
                claim = self.claim(program)
                used[program.worker] += claim
                if not program.running:
                    active[program.worker].append((claim, run))
        for worker, engine in enumerate(self.cluster.engines):
            for claim, run in sorted(active[worker]):
                if used[worker] <= engine.kv_tokens:
                    break
                used[worker] -= claim
                self._place(self.programs[run], None)
        self._resume(used)

    def claim(self, program: Program) -> float:
        """Tokens that an active program counts for."""
        idle = 0.0 if program.running else self.cluster.now - program.since
        return program.context * math.exp2(-idle / HALF_LIFE)

    def _resume(self, used: list[float]) -> None:
        now, block = self.cluster.now, self.cluster.profile.block
        waits = []
        for run, program in self.programs.items():
            if program.held:
                forced = now - program.held[0].sent > FORCED
                waits.append((not forced, program.held[0].sent if forced else program.context, run))
        for unforced, _, run in sorted(waits):
            program = self.programs[run]
            room = [engine.kv_tokens - used[engine.index] for engine in self.cluster.engines]
            best = max(range(len(room)), key=lambda w: (room[w], -w))
            if unforced and room[best] < -(-program.context // block) * block:
                return
            used[best] += program.context
            self._place(program, best)
            turns, program.held = program.held, []
            for turn in turns:
                program.running += 1
                self.cluster.send(turn, best)

    def _place(self, program: Program, worker: int | None) -> None:
        """Resume the program on a worker, or pause it."""
        program.worker = worker
        for owner, (where, hint) in program.hints.items():
            hint = replace(hint, leased=worker is not None)
            program.hints[owner] = where, hint
            self.cluster.engines[where].tell(owner, hint)
