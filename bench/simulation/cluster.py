"""The loop of the simulation: clients that play runs, a system in front, and the engines, on one virtual clock."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench import schedule
from bench.records import CallRecord, Played, RunRecord
from bench.simulation.engine import Engine
from bench.simulation.profile import Profile, Span
from bench.simulation.system import System, Turn, session_of
from bench.workloads.runs import Call, Piece, Run, Workload

AGAIN = 1.0  # seconds after which a client calls again what was cut off
MOST_IDLE_TICKS = 100_000


@dataclass(slots=True, eq=False)
class Play:
    """A run in play: what it still waits for."""

    run: Run
    record: RunRecord
    spans: list[Span]
    ended: set[Call] = field(default_factory=set)
    sent: set[Call] = field(default_factory=set)
    ahead: float = 0.0

    @property
    def over(self) -> bool:
        """Whether every call has ended."""
        return len(self.ended) == len(self.run.calls)


class Cluster:
    """Workers of one profile, the system in front of them, and the virtual clock that drives both.

    `tier` is the host tier's size over the device's KV. Deterministic: the same arguments give the same records.
    """

    def __init__(
        self, system: type[System], profile: Profile, workers: int, tier: float, mean_context: float, seed: int
    ) -> None:
        self.profile, self.seed, self.mean_context = profile, seed, mean_context
        self.tiered = tier > 0
        self.now = 0.0
        self.calls: list[CallRecord] = []
        self.runs: list[RunRecord] = []
        self.on_end: Callable[[Run], None] = lambda run: None
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._number = self._idle = self.cut = 0
        self._playing: dict[str, Play] = {}
        self._due: dict[str, float] = {}
        self._seen: set[Piece] = set()
        tokens = round(tier * profile.kv_tokens)
        self.engines = [Engine(i, profile, tokens, lambda: self.now, self._wake) for i in range(workers)]
        self.system = system(self)
        for engine in self.engines:
            self._put_in(engine)

    def at(self, time: float, what: Callable[[Any], None], argument: Any = None) -> None:
        """Call `what(argument)` at a time, in seconds; those of equal times in the order in which they were asked."""
        self._number += 1
        heapq.heappush(self._events, (max(time, self.now), self._number, what, argument))

    def lose(self, worker: int) -> None:
        """A worker dies. Of a turn whose answer had begun the client sees an error, and calls again a second later."""
        turns = self.engines[worker].lose()
        self.cut += sum(turn.record.first_token is not None for turn in turns)
        self.system.lost(worker, turns)

    def restore(self, worker: int) -> None:
        """It is up again."""
        self.engines[worker].up = True
        self._put_in(self.engines[worker])
        self.system.restored(worker)

    def _put_in(self, engine: Engine) -> None:
        system = self.system
        engine.obey(system.policy(), system.policy(), system.key, system.ours, system.threshold)

    def again(self, turn: Turn) -> None:
        """The client calls again what was cut off, or the front what had not begun."""
        begun, turn.record.first_token = turn.record.first_token is not None, None
        self.at(self.now + (AGAIN if begun else 0.0), self.system.arrived, turn)

    def run(self) -> None:
        """Play until nothing is left to happen."""
        if self.system.tick:
            self.at(self.system.tick, self._tick)
        while self._events:
            self.now, _, what, argument = heapq.heappop(self._events)
            what(argument)
        if self._playing:
            raise RuntimeError(f"{self.system.name} holds {len(self._playing)} runs for ever")

    def play(self, run: Run, skip: int = 0) -> None:
        """A client begins a run; its first `skip` calls are taken as made."""
        spans = self.profile.timeline(run)
        record = RunRecord(run.id, run.tenant, self.now, max(s.end for s in spans), warm=False)
        play = Play(run, record, spans, set(run.calls[:skip]), set(run.calls[:skip]))
        self.runs.append(record)
        self._playing[run.id] = play
        self.system.began(run)
        self._release(play)

    def send(self, turn: Turn, worker: int) -> None:
        """Pass a turn on to an engine, now."""
        turn.worker = worker
        turn.record.worker = str(worker)
        turn.record.held = self.now - turn.sent
        size, block = turn.call.prompt.end + turn.call.output, self.profile.block
        if size > self.profile.kv_tokens // block * block:
            turn.record.error = f"{size} tokens do not fit the worker"
            self.at(self.now, self._over, turn)
        elif self.profile.overhead:
            self.at(self.now + self.profile.overhead, self._submit, turn)
        else:
            self._submit(turn)

    def due(self, owner: str) -> float | None:
        """When an owner's next call is sent, for oracles: exact once it is certain; None if there is none."""
        if owner in self._due:
            return self._due[owner]
        run, _, session = owner.partition("/")
        play = self._playing.get(run)
        if play is None:
            return None
        pairs = zip(play.run.calls, play.spans, strict=True)
        starts = [span.begin for call, span in pairs if call.session == session and call not in play.sent]
        return self.now + max(0.0, min(starts) - play.ahead) if starts else None

    def left(self, run: Run) -> float:
        """Engine seconds that the rest of a run takes alone, for oracles."""
        play = self._playing.get(run.id)
        if play is None:
            return 0.0
        return sum(s.alone for c, s in zip(run.calls, play.spans, strict=True) if c not in play.ended)

    def _tick(self, _: None) -> None:
        self.system.ticked()
        self._idle = 0 if self._events else self._idle + 1
        if self._idle > MOST_IDLE_TICKS:
            raise RuntimeError(f"{self.system.name} holds {len(self._playing)} runs for ever")
        if (self._playing or self._events) and self.system.tick:
            self.at(self.now + self.system.tick, self._tick)

    def _wake(self, engine: Engine, time: float) -> None:
        self.at(time, self._engine, engine)

    def _engine(self, engine: Engine) -> None:
        first, over = engine.advance(self.now)
        for turn in first:
            turn.record.first_token = self.now
            self.system.first_token(turn)
        for turn in over:
            self._over(turn)
        engine.plan(self.now)

    def _submit(self, turn: Turn) -> None:
        assert turn.worker is not None
        if self.engines[turn.worker].up:
            self.engines[turn.worker].submit(turn, self.now)
        else:  # it died meanwhile
            self.system.lost(turn.worker, [turn])

    def _release(self, play: Play) -> None:
        """Set a time for each call that waits for nothing any more."""
        run = play.run
        for index, call in enumerate(run.calls):
            if call in play.sent:
                continue
            ended = sum(one in play.ended for one in call.after)
            if ended >= (call.need if call.need is not None else len(call.after)):
                play.sent.add(call)
                owner = session_of(run, call.session)
                self._due[owner] = min(self._due.get(owner, float("inf")), self.now + call.gap)
                self.at(self.now + call.gap, self._send, (play, index, call))

    def _send(self, what: tuple[Play, int, Call]) -> None:
        play, index, call = what
        run = play.run
        record = CallRecord(run.id, index, call.session, run.tenant, "", self.now, call.prompt.end, call.output)
        record.ideal = self._ideal(call)
        self.calls.append(record)
        play.ahead = max(play.ahead, play.spans[index].begin)
        self.system.arrived(Turn(run, index, call, session_of(run, call.session), record))

    def _over(self, turn: Turn) -> None:
        play = self._playing[turn.run.id]
        if turn.record.error is None:
            turn.record.finished = self.now
        play.ended.add(turn.call)
        play.ahead = max(play.ahead, play.spans[turn.index].end)
        self._due.pop(turn.owner, None)
        self._release(play)
        self.system.finished(turn)
        if play.over:
            play.record.finished = play.record.until = self.now
            del self._playing[turn.run.id]
            self.system.ended(turn.run)
            self.on_end(turn.run)

    def _ideal(self, call: Call) -> int:
        """Tokens that a cache without limit would have, in whole blocks; what was sent before counts as had."""
        at: Piece | None = call.prompt
        new = []
        while at is not None and at not in self._seen:
            new.append(at)
            at = at.parent
        self._seen.update(new)
        if call.answer is not None:
            self._seen.add(call.answer)
        block = self.profile.block
        return min(at.end if at else 0, call.prompt.end - 1) // block * block


@dataclass(frozen=True, slots=True)
class Fault:
    """A worker dies, in seconds, and is up again, empty, at another time; None: never. Or it is drained for good."""

    worker: int
    at: float
    back: float | None = None
    drain: bool = False

    def befall(self, cluster: Cluster) -> None:
        """Have it happen. ValueError where a drained worker is to come back."""
        if self.drain and self.back is not None:
            raise ValueError("a drained worker does not come back")
        cluster.at(self.at, cluster.system.drained if self.drain else cluster.lose, self.worker)
        if self.back is not None:
            cluster.at(self.back, cluster.restore, self.worker)


def simulate(
    workload: Workload,
    system: type[System],
    profile: Profile,
    *,
    workers: int,
    load: float,
    tier: float = 0.0,
    arrivals: str = "closed",
    seed: int = 0,
    supply: int = 4,
    faults: Sequence[Fault] = (),
) -> Played:
    """Play a workload on modelled workers and return what happened.

    `arrivals`: "closed" keeps as many runs live as make up `load` (live runs x mean context / KV tokens of all
    workers), each slot's first one begun part-way and warm, `supply` more a slot; "poisson:R" begins R runs an hour,
    40 x supply in all; "trace" begins each run when its trace did. Windows are those of `bench.schedule`.
    """
    held = replace(profile, kv_tokens=profile.kv_tokens * 1000) if system.unlimited else profile
    cluster = Cluster(system, held, workers, 0.0 if system.unlimited else tier, workload.mean_context, seed)
    for fault in faults:
        fault.befall(cluster)
    kind, _, rate = arrivals.partition(":")
    starved = 0
    if kind == "closed":
        slots = schedule.slots(load, workers * profile.kv_tokens, workload)
        window, starved = _closed(cluster, workload, slots, supply, schedule.starts(seed, slots, workload, profile))
    elif kind == "poisson":
        runs = list(itertools.islice(workload.draw(seed), schedule.OPEN_RUNS * supply))
        window = _open(cluster, runs, schedule.poisson(float(rate), len(runs), seed))
    elif kind == "trace":
        window = _open(cluster, *schedule.traced(workload))
    else:
        raise ValueError(f"arrivals are closed, poisson:RUNS_PER_HOUR or trace, not {arrivals!r}")
    ended = max(run.finished or 0.0 for run in cluster.runs)
    extra = {
        "busy_ratio": sum(engine.busy_seconds for engine in cluster.engines) / workers / max(ended, 1e-9),
        "preemptions": float(sum(engine.preemptions for engine in cluster.engines)),
        "prefilled_tokens": float(sum(engine.prefilled_tokens for engine in cluster.engines)),
        "starved": float(starved),
        "cut": float(cluster.cut),
    }
    return Played(cluster.calls, cluster.runs, window, extra)


def _closed(
    cluster: Cluster, workload: Workload, slots: int, supply: int, starts: list[tuple[float, float]]
) -> tuple[tuple[float, float], int]:
    """Slots that each begin a run when their last one ends, as long as the supply lasts; window and starved runs."""
    runs = workload.draw(cluster.seed)
    first = list(itertools.islice(runs, slots))
    later = itertools.islice(runs, slots * supply)
    turnover = schedule.Turnover({run.id for run in first}, slots * supply)

    def ended(run: Run) -> None:
        turnover.ended(run.id, cluster.now)
        if (another := next(later, None)) is not None:
            turnover.began(cluster.now)
            cluster.play(another)
        else:
            turnover.ran_out(cluster.now)

    def begin(slot: tuple[Run, float]) -> None:
        run, depth = slot
        cluster.play(run, int(depth * len(run.calls)))

    cluster.on_end = ended
    for run, (delay, depth) in zip(first, starts, strict=True):
        cluster.at(delay, begin, (run, depth))
    cluster.run()
    for record in cluster.runs:
        record.warm = record.run in turnover.turned
    return turnover.window, turnover.starved


def _open(cluster: Cluster, runs: list[Run], times: list[float]) -> tuple[float, float]:
    """Each run at its time; the first are warm. The window is from the first counted arrival to the last."""
    for run, at in zip(runs, times, strict=True):
        cluster.at(at, cluster.play, run)
    cluster.run()
    warm = int(schedule.WARM_SHARE * len(runs))
    early = {run.id for run in runs[:warm]}
    for record in cluster.runs:
        record.warm = record.run in early
    return times[warm], times[-1]
