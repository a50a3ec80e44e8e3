"""KVFlow (arXiv 2507.07400): eviction and prefetch by steps to execution. Ours, from the paper."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from bench.simulation.system import Turn, role_of
from bench.simulation.systems.stock import StockRelease
from bench.workloads.runs import Call, Piece, Run, meeting
from kvcache.kvflow import KVFlow as LeastSteps
from kvcache.policy import Hint, Policy
from scheduler.foresight import Foresight
from scheduler.position import Progress
from scheduler.template import Template

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

NEVER = float("inf")
SOON = 1.0  # steps: what may run next is prefetched
WINDOW = 128  # calls of a run that its graph looks ahead


class StepGraph:
    """The agent step graph of one run, and where the run stands in it: steps to execution by role and by session.

    Where clients declare a template, steps come from it, mispredicted branches included. Else from the calls that the
    run is going to make: running is 0, a call that waits for all of some calls is one more than the latest of them,
    for k of them than the k-th earliest.
    """

    def __init__(self, run: Run) -> None:
        document = run.hints.get("template")
        self._foresight = Foresight(Template.parse(run.program, document)) if document else None
        self._progress = Progress()
        self._names = {call: str(index) for index, call in enumerate(run.calls)}
        self._left = dict.fromkeys(run.calls)
        self._begun: set[Call] = set()
        self._next: dict[Call, Call] = {}
        latest: dict[str, Call] = {}
        for call in run.calls:
            if call.session in latest:
                self._next[latest[call.session]] = call
            latest[call.session] = call
        self._roles = {name: call.role for name, call in latest.items()}

    def began(self, call: Call) -> None:
        """A call has been sent; what it had to wait for is over, also where this simulation did not play it."""
        self._begun.add(call)
        self._progress.came(self._names[call], call.role, [self._names[one] for one in call.after])
        above = [call]
        while above:
            one = above.pop()
            for before in one.after if one.need is None else ():
                if before in self._left:
                    del self._left[before]
                    above.append(before)

    def ended(self, call: Call) -> None:
        """A call has ended."""
        self._left.pop(call, None)
        self._progress.finished(self._names[call])

    def following(self, call: Call) -> Call | None:
        """The next call of the same session."""
        return self._next.get(call)

    def steps(self) -> tuple[dict[str, float], dict[str, float]]:
        """Steps to execution, within the window, of roles and of sessions."""
        if self._foresight is not None:
            position = self._progress.position(self._foresight.template)
            known = self._foresight.steps_to_execution(position)
            return known, {session: known.get(role, NEVER) for session, role in self._roles.items()}
        distance: dict[Call, float] = {}
        roles: dict[str, float] = {}
        sessions: dict[str, float] = {}
        for call in islice(self._left, WINDOW):
            before = sorted(distance.get(one, NEVER if one in self._left else 0.0) for one in call.after)
            wait = before[(call.need or len(before)) - 1] if before else 0.0
            steps = distance[call] = 0.0 if call in self._begun else 1.0 + wait
            roles[call.role] = min(roles.get(call.role, NEVER), steps)
            sessions[call.session] = min(sessions.get(call.session, NEVER), steps)
        return roles, sessions


class KVFlow(StockRelease):
    """Ours, from the paper: each call carries the steps to execution (STE) of all agents of its run.

    An agent's fixed prompt is what its role's calls have in common, and its own history where its next call repeats
    at least half of it; it has the least STE of all runs on the worker. Other suffixes go first. With a host tier,
    what may run in the next step is prefetched. The end of a run is in its graph. A run of a single session has STE 1
    through all its gaps, so that only release and prefetch are left.
    """

    name = "kvflow"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.graphs: dict[str, StepGraph] = {}
        self.roles: list[dict[str, dict[str, float]]] = [{} for _ in cluster.engines]
        self.fixed: dict[str, dict[str, tuple[str, Piece]]] = {}  # per run and owner, its session and prompt
        self.prompts: list[dict[str, tuple[Piece, Piece]]] = [{} for _ in cluster.engines]  # per role: last, common

    def policy(self) -> Policy:
        return LeastSteps()

    def began(self, run: Run) -> None:
        self.graphs[run.id] = StepGraph(run)

    def arrived(self, turn: Turn) -> None:
        self.graphs[turn.run.id].began(turn.call)
        super().arrived(turn)
        self._seen(turn)
        self._foretell(turn.run, prefetch=self.cluster.tiered)

    def finished(self, turn: Turn) -> None:
        super().finished(turn)
        graph, call = self.graphs[turn.run.id], turn.call
        graph.ended(call)
        kept, after = call.answer or call.prompt, graph.following(call)
        shared = meeting(kept, after.prompt) if after is not None else None
        if shared is not None and 2 * shared.end >= kept.end:
            self.fixed.setdefault(turn.run.id, {})[turn.owner] = call.session, shared
        else:
            self.fixed.get(turn.run.id, {}).pop(turn.owner, None)
        self._foretell(turn.run)

    def ended(self, run: Run) -> None:
        worker = self.seats.of.get(run.id)
        if worker is not None:
            for role in list(self.roles[worker]):
                self._role(worker, role, run, NEVER)
        self.fixed.pop(run.id, None)
        del self.graphs[run.id]
        super().ended(run)

    def _foretell(self, run: Run, prefetch: bool = False) -> None:
        worker = self.seats.of[run.id]
        engine, now = self.cluster.engines[worker], self.cluster.now
        named, sessions = self.graphs[run.id].steps()
        roles = {role_of(run.tenant, role): steps for role, steps in named.items()}
        for role in dict.fromkeys((*roles, *self.roles[worker])):
            self._role(worker, role, run, roles.get(role, NEVER))
            if prefetch and 0 < roles.get(role, NEVER) <= SOON and role in self.prompts[worker]:
                engine.prefetch(self.prompts[worker][role][1])
        for owner, (session, piece) in self.fixed.get(run.id, {}).items():
            steps = sessions.get(session, NEVER)
            engine.tell(owner, Hint(now, steps=steps))
            if prefetch and 0 < steps <= SOON:
                engine.prefetch(piece)

    def _seen(self, turn: Turn) -> None:
        """What the role's calls on the worker have in common is its fixed prompt."""
        assert turn.worker is not None
        prompts, role, prompt = self.prompts[turn.worker], role_of(turn.run.tenant, turn.call.role), turn.call.prompt
        fixed = meeting(prompts[role][0], prompt) if role in prompts else None
        prompts[role] = prompt, fixed or prompt

    def _role(self, worker: int, role: str, run: Run, steps: float) -> None:
        """The run foretells the role so; the engine is told the least, also again: it forgets whom it evicts."""
        runs = self.roles[worker].setdefault(role, {})
        if steps < NEVER:
            runs[run.id] = steps
        else:
            runs.pop(run.id, None)
        least = min(runs.values(), default=NEVER)
        if not runs:
            del self.roles[worker][role]
        hint = Hint(self.cluster.now, steps=least if least < NEVER else None)
        self.cluster.engines[worker].tell(role, hint)
