"""What an oracle would do that knows every gap: Belady's eviction, and a gate that holds without limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench.simulation.system import Turn, role_of
from bench.simulation.systems.index import recompute_per_token
from bench.simulation.systems.stock import StockRelease
from bench.workloads.runs import Piece, Run
from kvcache.belady import Belady as FarthestUse
from kvcache.policy import Hint, Policy
from kvcache.retention import Retention

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster
    from bench.simulation.engine import Engine

NEVER = float("inf")
SHARE = 0.95  # theta: of the capacity, that claims may take
OVERLAP = 0.4  # nu: of the device memory, that counts beside a host tier
PRICE = 1.0  # eta
GROWTH = 256  # tokens that a running call's claim has beyond its prompt
MARGIN = 8  # blocks that a call must find beyond its prompt
BACKFILL = 8  # held runs that are tried
SOONEST = 0.05  # seconds


class Belady(StockRelease):
    """Stock placement; what is needed last goes first, by the true time of each session's next call; release.

    What a role's calls have in common is needed when the next session of that role in any live run calls.
    """

    name = "belady"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.busy: dict[str, int] = {}
        self.idle: dict[str, dict[str, Turn]] = {}
        self.dues: dict[str, float] = {}
        self.roles: list[dict[str, tuple[float, dict[str, float]]]] = [{} for _ in cluster.engines]

    def policy(self) -> Policy:
        return FarthestUse()

    def arrived(self, turn: Turn) -> None:
        self.begin(turn)
        super().arrived(turn)

    def begin(self, turn: Turn) -> None:
        """The turn's owner waits for nothing but us."""
        self.busy[turn.owner] = self.busy.get(turn.owner, 0) + 1
        self.idle.setdefault(turn.run.id, {}).pop(turn.owner, None)
        self.dues.pop(turn.owner, None)

    def finished(self, turn: Turn) -> None:
        super().finished(turn)
        self.busy[turn.owner] -= 1
        if not self.busy[turn.owner]:
            del self.busy[turn.owner]
            self.idle[turn.run.id][turn.owner] = turn
        self.foretell(turn.run.id)
        self._foretell_roles(turn)

    def ended(self, run: Run) -> None:
        super().ended(run)
        for engine, roles in zip(self.cluster.engines, self.roles, strict=True):
            for role, (cost, runs) in list(roles.items()):
                if runs.pop(run.id, None) is not None:
                    self._tell_role(engine, role, cost, runs)
        for owner in self.idle.pop(run.id, {}):
            self.dues.pop(owner, None)

    def foretell(self, run: str) -> None:
        """Tell the engines when each idle session of a run is needed next; those that never are go."""
        for owner, turn in list(self.idle.get(run, {}).items()):
            assert turn.worker is not None
            engine, due = self.cluster.engines[turn.worker], self.cluster.due(owner)
            if due is None:
                engine.release(owner)
                self.gone(turn)
            else:
                self.dues[owner] = due
                engine.tell(owner, self.hint(turn, due))

    def _foretell_roles(self, turn: Turn) -> None:
        """When each role of the turn's run is needed next, where it has several sessions."""
        assert turn.worker is not None
        run, engine, uses = turn.run, self.cluster.engines[turn.worker], self.roles[turn.worker]
        sessions = {call.session: call.role for call in run.calls}
        if len(sessions) == 1:
            return
        soonest = dict.fromkeys(sessions.values(), NEVER)
        for session, role in sessions.items():
            due = self.cluster.due(f"{run.id}/{session}")
            soonest[role] = min(soonest[role], NEVER if due is None else due)
        cost = recompute_per_token(self.cluster.profile, turn)
        for role, due in soonest.items():
            owner = role_of(run.tenant, role)
            _, runs = uses[owner] = cost, uses[owner][1] if owner in uses else {}
            runs[run.id] = due
            self._tell_role(engine, owner, cost, runs)

    def _tell_role(self, engine: Engine, role: str, cost: float, runs: dict[str, float]) -> None:
        due = min(runs.values(), default=NEVER)
        engine.tell(role, Hint(self.cluster.now, next_use=due, seconds_per_token=cost))

    def gone(self, turn: Turn) -> None:
        """The owner of the turn makes no further call."""
        del self.idle[turn.run.id][turn.owner]
        self.dues.pop(turn.owner, None)

    def hint(self, turn: Turn, due: float) -> Hint:
        """What is foretold of the owner of a turn that was its last so far."""
        return Hint(self.cluster.now, next_use=due)


class OracleGate(Belady):
    """The gate of our first simulations with true gaps: index eviction, shortest remaining run first, holds unbounded.

    The claims of the active runs on a worker stay within 95 % of C = K, or tier + 0.4 K with a host tier. A run with
    a lease passes. One without is granted room, or idle leases are revoked, the lowest true index first, while that
    is under 1 / C, or at any index where the worker has nothing to do; or it moves to a worker with room and nobody
    held, once it has waited as long as computing again what it leaves takes; or it is held. A claim is the distinct
    footprint of all the run's sessions. Not a proof of what is possible.
    """

    name = "oracle-gate"
    tick = 1.0

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.leases: list[dict[str, None]] = [{} for _ in cluster.engines]
        self.gate: list[dict[str, list[Turn]]] = [{} for _ in cluster.engines]
        self.running: dict[str, int] = {}
        self.remaining: dict[str, float] = {}
        self.tips: dict[str, dict[str, tuple[Piece, int]]] = {}
        self.tokens: dict[str, int] = {}

    def policy(self) -> Policy:
        return Retention()

    def key(self, turn: Turn) -> float | None:
        return self.remaining[turn.run.id]

    def arrived(self, turn: Turn) -> None:
        self.begin(turn)
        run, worker = turn.run.id, self.home(turn)
        self.remaining[run] = self.cluster.left(turn.run)
        self._stretch(turn, turn.call.prompt, 0)
        if run in self.leases[worker]:
            self._pass(turn, worker)
        else:
            self.gate[worker].setdefault(run, []).append(turn)
        self._pump(worker)

    def finished(self, turn: Turn) -> None:
        run, call = turn.run.id, turn.call
        self.running[run] -= 1
        self.remaining[run] = self.cluster.left(turn.run)
        self._stretch(turn, call.answer or call.prompt, 0 if call.answer else call.output)
        super().finished(turn)
        self._pump(self.seats.of[run])

    def ended(self, run: Run) -> None:
        worker = self.seats.of[run.id]
        self.leases[worker].pop(run.id, None)
        del self.running[run.id], self.remaining[run.id], self.tips[run.id], self.tokens[run.id]
        super().ended(run)
        self._pump(worker)

    def ticked(self) -> None:
        for worker in range(len(self.gate)):
            self._pump(worker)

    def gone(self, turn: Turn) -> None:
        super().gone(turn)
        tips = self.tips[turn.run.id]
        del tips[turn.owner]
        self.tokens[turn.run.id] = footprint(tips.values())

    def hint(self, turn: Turn, due: float) -> Hint:
        leased = turn.run.id in self.leases[self.seats.of[turn.run.id]]
        cost = recompute_per_token(self.cluster.profile, turn)
        return Hint(self.cluster.now, next_use=due, seconds_per_token=cost, leased=leased)

    def capacity(self, worker: int) -> float:
        """Tokens that claims are measured against."""
        engine = self.cluster.engines[worker]
        return engine.tier_tokens + OVERLAP * engine.kv_tokens if self.cluster.tiered else engine.kv_tokens

    def room(self, worker: int) -> float:
        """Tokens that are left for claims."""
        return SHARE * self.capacity(worker) - sum(map(self.claim, self.leases[worker]))

    def claim(self, run: str) -> float:
        """Tokens that the sessions of a run hold, and will while they run."""
        return self.tokens[run] + GROWTH * self.running.get(run, 0)

    def index(self, run: str) -> float:
        """What keeping an idle run's KV saves: engine seconds for each second and token."""
        turns = self.idle.get(run, {})
        if not turns:
            return 0.0
        cost = max(recompute_per_token(self.cluster.profile, turn) for turn in turns.values())
        return cost / max(SOONEST, min(self.dues[owner] for owner in turns) - self.cluster.now)

    def _stretch(self, turn: Turn, tip: Piece, more: int) -> None:
        """The owner's context ends with a piece now, and so many tokens behind it."""
        tips = self.tips.setdefault(turn.run.id, {})
        tips[turn.owner] = tip, more
        self.tokens[turn.run.id] = footprint(tips.values()) if len(tips) > 1 else tip.end + more

    def _pass(self, turn: Turn, worker: int) -> None:
        self.running[turn.run.id] = self.running.get(turn.run.id, 0) + 1
        self.cluster.send(turn, worker)

    def _grant(self, run: str, worker: int, to: int) -> None:
        turns = self.gate[worker].pop(run)
        self.leases[to][run] = None
        if to != worker:
            self.seats.take(run, to)
        for turn in turns:
            self._pass(turn, to)
        self.foretell(run)

    def _pump(self, worker: int) -> None:
        """Let in whom there is room for, until nobody moves."""
        gate = self.gate[worker]
        while gate:
            room, victims = self.room(worker), self._victims(worker)
            order = sorted(gate, key=lambda run: (self.remaining[run], run))[:BACKFILL]
            if not any(self._try(run, worker, room, victims) for run in order):
                return

    def _victims(self, worker: int) -> list[tuple[float, str]]:
        idle = [run for run in self.leases[worker] if not self.running.get(run)]
        return sorted((self.index(run), run) for run in idle)

    def _try(self, run: str, worker: int, room: float, victims: list[tuple[float, str]]) -> bool:
        need = self.claim(run) + MARGIN * self.cluster.profile.block
        if need <= room or not self.leases[worker]:
            self._grant(run, worker, worker)
            return True
        limit = PRICE / self.capacity(worker) if self.cluster.engines[worker].load else NEVER
        revoked = []
        for index, victim in victims:
            if room >= need or index >= limit:
                break
            room += self.claim(victim)
            revoked.append(victim)
        if room >= need or len(revoked) == len(self.leases[worker]):  # larger than all: alone
            for victim in revoked:
                del self.leases[worker][victim]
                self.foretell(victim)
            self._grant(run, worker, worker)
            return True
        return self._move(run, worker, need)

    def _move(self, run: str, worker: int, need: float) -> bool:
        turn = self.gate[worker][run][0]
        resident = self.cluster.engines[worker].resident(turn.call.prompt)[1]
        if self.cluster.now - turn.sent <= self.cluster.profile.recompute(0, resident):
            return False
        others = [w for w in range(len(self.gate)) if w != worker and not self.gate[w]]
        best = max(others, key=lambda w: (self.room(w), -w), default=None)
        if best is None or self.room(best) < need:
            return False
        self._grant(run, worker, best)
        return True


def footprint(tips: Iterable[tuple[Piece, int]]) -> int:
    """The distinct tokens of prompts that end with these pieces, and of so many more behind each."""
    seen: set[Piece] = set()
    total = 0
    for piece, more in tips:
        total += more
        at: Piece | None = piece
        while at is not None and at not in seen:
            seen.add(at)
            total += at.tokens
            at = at.parent
    return total
