"""vllm-router 0.1.17 with program scheduling. Models of documented behaviour, not its code."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.simulation.system import System, Turn
from bench.simulation.systems.progress import LONGEST_TTL, MOST_ROUNDS, Progress, Sample, batch_gain, impact
from bench.simulation.systems.stock import Ring
from bench.workloads.runs import Run

if TYPE_CHECKING:
    from bench.simulation.cluster import Cluster

MOST_ACTIVE = 64  # max_active_programs_per_target
WAITING = 1  # admission_waiting_request_threshold
SHORTEST_FORCE, LONGEST_FORCE, WORK_AHEAD = 30.0, 300.0, 3.0  # force_resume_timeout_seconds and how it is derived
RETENTION = 1800.0  # paused_retention_ttl_seconds
HEADROOM = 1.2  # cross_rank_headroom_ratio
CONTINUOUS = 0.9  # share of the context before that must hit for a round to count
NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Program:
    """A session. ACTIVE on `target` or PAUSED; REASONING while it has calls here or there, else ACTING.

    `shared` tokens of its context are others' too: what the first call after a pause hit where its own was lost.
    """

    owner: str
    target: int
    active: bool = False
    waiting: deque[Turn] = field(default_factory=deque)
    flying: int = 0
    context: int = 0
    before: int = 0
    shared: int = 0
    fresh: bool = True
    output: int | None = None
    finished: float = -NEVER
    queued: float = NEVER
    deadline: float = NEVER
    expires: float = NEVER
    paused: float = NEVER
    began: float = 0.0
    rounds: int = 0
    rounds_since_ttl: int = 0
    yields: bool = False
    pause_when_idle: bool = False


class RouterProgram(System):
    """Program scheduling as its documentation sets it up: global queue, MRU resume, consistent hashing, no hints.

    A model of documented behaviour. Each session is a program; a run's bind to one worker. Active programs pass.
    Others wait in the pool until the tokens of the active ones (their own context and 100 of output), of the newcomer
    and of all their growth fit the worker's device memory, at most 64 programs, and the worker last reported nobody
    waiting; more decoding at once can outweigh the growth. Resumed are first the overdue, then who had to yield last,
    then the most recently served; on the worker of before, else, first come, first served, on one with clearly more
    room. A program that makes a tool call stays active for its time to live. Over capacity, programs are paused at
    the end of their call, those served longest first; and after 14 rounds where others wait. A wait ends after at most
    300 s, sooner by the work ahead. Nobody tells when a session ends.
    """

    name = "vllm-router-program"
    tick = interval = 1.0
    window = 100
    buffer = 100

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        workers = len(cluster.engines)
        self.programs: dict[str, Program] = {}
        self.on: list[dict[str, Program]] = [{} for _ in range(workers)]
        self.pool: dict[str, Program] = {}
        self.progress = [Progress(self.window) for _ in range(workers)]
        self.observed = [0] * workers
        self.ring = Ring(workers)
        self.stale = False  # whether anything but time has changed since the last decision
        self.look = 0.0  # when time alone changes something for those that wait
        self.free = [0.0] * workers
        self.reserved = [0.0] * workers

    def arrived(self, turn: Turn) -> None:
        now, call = self.cluster.now, turn.call
        program = self.programs.get(turn.owner)
        if program is None or (not program.active and not program.waiting and now - program.paused >= RETENTION):
            program = self.programs[turn.owner] = Program(turn.owner, self.bind(turn))
        if not program.flying and program.finished > -NEVER:
            self.progress[program.target].returned(now - program.finished)
        program.context = max(program.context, call.prompt.end) if program.flying else call.prompt.end
        program.output = self.foretold(turn)
        program.expires = NEVER
        self.stale = True
        if program.active:
            self._dispatch(program, turn)
            return
        program.waiting.append(turn)
        if program.owner not in self.pool:
            self.pool[program.owner] = program
            program.queued = now
            program.deadline = now + self._patience(program)
        self._schedule()

    def finished(self, turn: Turn) -> None:
        now, call = self.cluster.now, turn.call
        program = self.programs[turn.owner]
        program.flying -= 1
        record, progress = turn.record, self.progress[program.target]
        hit = record.cached + record.hosted
        continuous = hit >= CONTINUOUS * program.before
        if program.fresh and (not program.before or not continuous):
            program.shared = hit
        program.fresh = False
        program.rounds += continuous
        program.rounds_since_ttl += continuous
        growth = call.prompt.end - program.before
        growth = growth if growth < program.before else 0  # not a session's first, nor another context
        decoding = now - record.first_token if record.first_token is not None else 0.0
        progress.ended(Sample(now, call.output, growth, program.rounds_since_ttl, decoding))
        program.before, program.finished = call.prompt.end, now
        if not program.flying and not program.waiting:
            if self.is_last(turn):
                self._forget(program)
            elif program.pause_when_idle:
                self._pause(program)
            else:
                program.expires = now + self.retain(turn, progress)
                self._yield(program)
        self.stale = True
        self.decide()

    def ticked(self) -> None:
        observed = [len(engine.waiting) for engine in self.cluster.engines]
        self.stale = self.stale or observed != self.observed
        self.observed = observed
        self.decide()

    def bind(self, turn: Turn) -> int:
        """The first worker of a new program."""
        return self.ring.worker(turn.run.id)

    def foretold(self, turn: Turn) -> int | None:
        """The output tokens that the client announces."""
        return None

    def is_last(self, turn: Turn) -> bool:
        """Whether the client says that its session makes no further call."""
        return False

    def retain(self, turn: Turn, progress: Progress) -> float:
        """Seconds that a program stays active after this call."""
        own = turn.call.prompt.end - self.programs[turn.owner].shared
        return progress.ttl(impact(self.cluster.profile, max(0, own)))

    def decide(self) -> None:
        """What follows from the time and from each end: expiry, repair of capacity, admission."""
        now = self.cluster.now
        for target, programs in enumerate(self.on):
            for program in [p for p in programs.values() if p.expires <= now and not p.flying]:
                program.rounds_since_ttl = 0
                self._pause(program)
            if self.stale:
                self._repair(target)
        if self.stale or now >= self.look:
            self.stale = False
            self._schedule()

    def claim(self, program: Program) -> float:
        """Tokens of its own that a program counts for."""
        growth = self.buffer if program.output is None else program.output
        return max(0, program.context - program.shared) + growth

    def used(self, target: int) -> float:
        """Tokens that the active programs of a worker count for."""
        return sum(map(self.claim, self.on[target].values()))

    def capacity(self, target: int) -> int:
        """token_capacity_per_target: the device memory of a worker."""
        return self.cluster.engines[target].kv_tokens

    def _dispatch(self, program: Program, turn: Turn) -> None:
        program.flying += 1
        self.cluster.send(turn, program.target)

    def _pause(self, program: Program) -> None:
        del self.on[program.target][program.owner]
        program.active, program.pause_when_idle, program.expires = False, False, NEVER
        program.paused, program.rounds = self.cluster.now, 0
        self.stale = True

    def _forget(self, program: Program) -> None:
        self.on[program.target].pop(program.owner, None)
        del self.programs[program.owner]

    def _yield(self, program: Program) -> None:
        waited_for = any(one.target == program.target for one in self.pool.values())
        if program.rounds >= MOST_ROUNDS and waited_for:
            self._pause(program)
            program.yields = True

    def _repair(self, target: int) -> None:
        """Mark programs that run to pause at the end of their call, until the rest fits."""
        now, each = self.cluster.now, self.progress[target].output
        runs = [p for p in self.on[target].values() if p.flying]
        projected = self.used(target) + each * len(runs)
        if projected <= self.capacity(target):
            return
        mean = sum(p.context for p in runs) / len(runs) if runs else 1.0
        runs.sort(key=lambda p: (-(now - p.began) * max(0.5, (mean / max(p.context, 1)) ** 0.5), p.owner))
        for program in runs:
            if projected <= self.capacity(target):
                return
            program.pause_when_idle = True
            projected -= self.claim(program) + each

    def _remaining(self, target: int) -> list[float]:
        rounds = self.progress[target].rounds
        return [max(0.0, rounds - p.rounds) for p in self.on[target].values()]

    def _patience(self, program: Program) -> float:
        """Seconds to the forced resume: three times the rounds ahead of it over the calls a second."""
        rounds = [p.rounds for p in self.progress]
        rate = sum(p.throughput for p in self.progress)
        if not all(rounds) or not all(p.throughput for p in self.progress):
            return LONGEST_FORCE
        ahead = sum(sum(self._remaining(w)) for w in range(len(self.on)))
        ahead += sum(rounds[one.target] for one in self.pool.values() if one is not program)
        return min(max(WORK_AHEAD * ahead / rate, SHORTEST_FORCE), LONGEST_FORCE)

    def _schedule(self) -> None:
        """Resume who can be, until nobody can."""
        if not self.pool:
            return
        now = self.cluster.now
        for target in range(len(self.on)):
            self._measure(target)
        order = sorted(self.pool.values(), key=lambda p: (p.deadline > now, p.yields, -p.finished, p.queued, p.owner))
        for program in order:
            if self._fits(program, program.target):
                self._resume(program, program.target)
        for program in sorted(self.pool.values(), key=lambda p: (p.deadline > now, p.yields, p.queued, p.owner)):
            other = self._elsewhere(program)
            if other is not None:
                self._resume(program, other)
        times = (t for p in self.pool.values() for t in (p.deadline, p.queued + self.interval) if t > now)
        self.look = min(times, default=NEVER)

    def _measure(self, target: int) -> None:
        self.free[target] = self.capacity(target) - self.used(target)
        self.reserved[target] = self.progress[target].reserve(self._remaining(target))

    def _fits(self, program: Program, target: int) -> bool:
        if program.deadline <= self.cluster.now:
            return True
        if self.observed[target] >= WAITING or len(self.on[target]) >= MOST_ACTIVE:
            return False
        spare = self.free[target] - self.claim(program)
        return spare >= self.reserved[target] or (spare >= 0 and self._gains(program, target))

    def _gains(self, program: Program, target: int) -> bool:
        """Whether one more in the batch brings more than its prefill and the rounds that others lose."""
        profile, progress, active = self.cluster.profile, self.progress[target], self.on[target].values()
        gain = batch_gain(profile, progress, [p.context for p in active if p.flying], program.context)
        rounds, free = sum(self._remaining(target)), self.free[target]
        held = min(rounds, free / progress.growth)
        left = min(rounds, max(0.0, free - self.claim(program) - progress.growth * progress.rounds) / progress.growth)
        if held > 0 and left <= 0:
            return False
        losses = [impact(profile, p.before) for p in active]
        loss = (held - left) / left * sum(losses) / len(losses) if left > 0 and losses else 0.0
        return gain >= impact(profile, program.context) + loss

    def _elsewhere(self, program: Program) -> int | None:
        """Another worker for a program that was paused: one with room for 1.2 contexts more than its own has."""
        source = program.target
        if program.paused == NEVER or self.cluster.now - program.queued < self.interval:
            return None
        least = max(0.0, self.free[source]) + HEADROOM * program.context
        if max(self.free) < least:
            return None
        mature = self.progress[source].mature
        able = [w for w, p in enumerate(self.progress) if w != source and mature and p.mature and self.free[w] >= least]
        if not able or not self._pressed(program):
            return None
        taken = {p.target for p in self.pool.values() if p is not program}
        able = [w for w in able if w not in taken and self._fits(program, w)]
        return min(able, key=lambda w: (self.observed[w], -self.free[w], len(self.on[w]), w), default=None)

    def _pressed(self, program: Program) -> bool:
        """Whether others wait on the program's worker, in its engine or before it in the pool."""
        source, since = program.target, self.cluster.now - self.interval
        rivals = (p for p in self.pool.values() if p.target == source and p.queued <= since)
        return self.observed[source] >= WAITING or any(p.finished > program.finished for p in rivals)

    def _resume(self, program: Program, target: int) -> None:
        del self.pool[program.owner]
        program.active, program.target = True, target
        program.queued = program.deadline = program.paused = NEVER
        program.began, program.rounds, program.yields = self.cluster.now, 0, False
        program.fresh = True
        self.on[target][program.owner] = program
        turns, program.waiting = program.waiting, deque()
        for turn in turns:
            self._dispatch(program, turn)
        self._measure(target)


class RouterProgramHinted(RouterProgram):
    """Program scheduling tuned and hinted: the strongest that it has been run.

    As above, with decisions every 0.25 s, windows of 20 calls, binding to the worker with the most room, and three
    hints that clients rarely have: the exact output length, the end of each session, and a time to live of three times
    the mean time that tools took so far, at most the 10 s that the router itself would give.
    """

    name = "vllm-router-program-hinted"
    tick = interval = 0.25
    window = 20

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.last: dict[str, dict[str, int]] = {}
        self.gaps = self.seconds = 0.0

    def began(self, run: Run) -> None:
        self.last[run.id] = {call.session: index for index, call in enumerate(run.calls)}

    def arrived(self, turn: Turn) -> None:
        if turn.call.after:
            self.gaps += 1
            self.seconds += turn.call.gap
        super().arrived(turn)

    def bind(self, turn: Turn) -> int:
        paused = [0.0] * len(self.on)
        for program in self.pool.values():
            paused[program.target] += self.claim(program)
        return max(range(len(self.on)), key=lambda w: (self.capacity(w) - self.used(w) - paused[w], -w))

    def foretold(self, turn: Turn) -> int | None:
        return turn.call.output

    def is_last(self, turn: Turn) -> bool:
        return self.last[turn.run.id][turn.call.session] == turn.index

    def retain(self, turn: Turn, progress: Progress) -> float:
        return min(3 * self.seconds / self.gaps, LONGEST_TTL) if self.gaps else 0.0

    def ended(self, run: Run) -> None:
        del self.last[run.id]
