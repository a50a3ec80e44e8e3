"""What the core costs: time and memory per step, against the budgets of the design.

python -m bench.core [--sessions 10000] [--out DIR]
python -m bench.core --fleet [--sessions 100000] [--workers 512] [--out DIR]

The second is a fleet with a gate: that many live sessions with names, one run each, on that many workers. First all
fits; then the same workers are so small that a part of the steps that come is held.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import resource
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

import orjson

from scheduler.actions import Dispatch
from scheduler.events import AdviceDue, FirstToken, StepArrived, StepFinished, Tick, Usage, WorkerUp
from scheduler.identity import Identity, resolve
from scheduler.prompt import Answer, read
from scheduler.scheduler import Scheduler
from scheduler.segments import chain

STEPS = 20_000
RUNNING, SMALL = 2_000, 0.8  # steps that run or wait at once, and of their contexts what small workers have room for
CONTEXT = 10_000  # tokens of a session
PAUSE, ADVICE = 0.001, 0.1  # seconds from one step's end to the next one's, and between what engines are told
TURN = 700  # bytes of a message, of which a turn has two


def scheduler(workers: int) -> Scheduler:
    """A scheduler over so many workers."""
    made = Scheduler()
    for index in range(workers):
        made.handle(WorkerUp(f"w{index}", "m", ("m",), "1", 1_000_000), 0.0)
    return made


def core(sessions: int, workers: int) -> Scheduler:
    """A scheduler with so many live sessions that their clients name, one finished step each."""
    made = scheduler(workers)
    for index in range(sessions):
        step(made, f"warm-{index}", f"session-{index}", 0.0)
    return made


def step(made: Scheduler, name: str, session: str, now: float) -> None:
    """One step of a session with a name, from arrival to end."""
    who = Identity(tenant="t", session=session, rule="x-session-id")
    made.handle(StepArrived(name, "m", who), now)
    made.handle(StepFinished(name, Usage(1000, 900, 50), "stop"), now)


def conversation(session: int, turns: int) -> list[dict[str, str]]:
    """The messages of a session's call after so many turns."""
    messages = [{"role": "system", "content": "You are an agent."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{session} result {turn} " + "w" * TURN})
        messages.append({"role": "assistant", "content": f"{session} thought {turn} " + "w" * TURN})
    return [*messages, {"role": "user", "content": f"{session} result {turns} " + "w" * TURN}]


def nameless(made: Scheduler, name: str, session: int, turn: int, now: float) -> None:
    """One step of a session that nobody names, from its parsed body to its end."""
    prompt = read("t", {"messages": conversation(session, turn)})
    made.handle(StepArrived(name, "m", Identity(tenant="t"), None, prompt), now)
    answer = Answer(f"{session} thought {turn} " + "w" * TURN)
    made.handle(StepFinished(name, Usage(1000, 900, 50), "stop", answer), now)


def timed(work: Any, count: int) -> dict[str, float]:
    """p50 and p99 of `work(index)`, in microseconds."""
    spent = []
    gc.collect()
    for index in range(count):
        began = time.perf_counter_ns()
        work(index)
        spent.append((time.perf_counter_ns() - began) / 1000)
    return cut(spent)


def cut(spent: list[float]) -> dict[str, float]:
    """p50 and p99 of microseconds."""
    cuts = statistics.quantiles(spent, n=100)
    return {"p50_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}


def bytes_per_session(sessions: int, turns: int) -> int:
    """Memory of an idle session that nobody names, with its workflow, after so many turns, in bytes."""
    gc.collect()
    tracemalloc.start()
    made = scheduler(4)
    before, _ = tracemalloc.get_traced_memory()
    for session in range(sessions):
        for turn in range(turns):
            nameless(made, f"{session}/{turn}", session, turn, session * 0.001)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made.graph.live) == sessions
    return (used - before) // sessions


def body(size: int) -> bytes:
    """A chat request of about `size` bytes, in messages of 2 KB, every other with a tool call."""
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": orjson.dumps({"a": "x" * 1900}).decode()},
    }
    made: list[dict[str, Any]] = [{"role": "system", "content": "word " * 100}]
    for index in range(max(1, size // 4000)):
        made.append({"role": "user", "content": f"{index} " + "word " * 400})
        made.append({"role": "assistant", "content": None, "tool_calls": [call]})
    return orjson.dumps({"model": "m", "messages": made})


def identify(raw: bytes) -> None:
    """All that is done with a body to know whose it is, from its bytes on."""
    fields = orjson.loads(raw)
    resolve("t", {"user-agent": "x"}, fields)
    read("t", fields)


def naming(sessions: int) -> Any:
    """Work for `timed`: the next step of a session with a name, so many live."""
    made = core(sessions, 4)
    return lambda i: step(made, f"s{i}", f"session-{i % sessions}", 1.0)


def continuing(made: Scheduler, sessions: int) -> Any:
    """Work for `timed`: the core's part of the next step of a session without a name; prompts are read beforehand."""
    prompts = [read("t", {"messages": conversation(index, 1)}) for index in range(STEPS // 4)]
    stride = max(1, sessions // len(prompts))
    for index in range(sessions):
        nameless(made, f"first-{index}", index // stride if index % stride == 0 else 10**9 + index, 0, 0.0)

    def work(index: int) -> None:
        prompt = prompts[index]
        made.handle(StepArrived(f"s{index}", "m", Identity(tenant="t"), None, prompt), 1.0)
        made.handle(StepFinished(f"s{index}", Usage(1000, 900, 50), "stop", Answer("an answer of some words")), 1.0)

    return work


def measure(sessions: int) -> dict[str, Any]:
    """All figures."""
    small, large = body(4_000), body(400_000)
    told: dict[str, Any] = {f"named step, {live} live sessions": timed(naming(live), STEPS) for live in (100, sessions)}
    fleet = scheduler(64)
    told["new step over 64 workers"] = timed(lambda i: step(fleet, f"s{i}", f"new-{i}", 1.0), STEPS // 4)
    for live in (sessions, 10 * sessions):
        made = scheduler(4)
        told[f"nameless step, {live} live sessions"] = timed(continuing(made, live), STEPS // 4)
        assert len(made.graph.live) >= live
    told |= {
        "parse and identify 4 KB": timed(lambda _: identify(small), 2000),
        "parse and identify 400 KB": timed(lambda _: identify(large), 200),
        "parse 400 KB": timed(lambda _: orjson.loads(large), 200),
        "chain of segments of 400 KB (trace only)": timed(lambda _: chain(orjson.loads(large)), 200),
        "bytes per idle session, 1 step": bytes_per_session(2000, 1),
        "bytes per idle session, 21 steps": bytes_per_session(500, 21),
    }
    of_messages = told["bytes per idle session, 21 steps"] - told["bytes per idle session, 1 step"]
    told["bytes per message"] = round(of_messages / 40)
    return told


class Fleet:
    """Workers with room for so many contexts each, so many live sessions, a run each, and `RUNNING` steps at once."""

    def __init__(self, sessions: int, workers: int, contexts: float) -> None:
        self.sessions, self.now, self._names, self._due = sessions, 0.0, itertools.count(), 0.0
        self.core = Scheduler()
        self.spent: dict[str, list[float]] = {}
        self._running: dict[str, None] = {}
        self._known: set[str] = set()
        for index in range(workers):
            self.core.handle(WorkerUp(f"w{index}", "m", ("m",), "1", int(contexts * CONTEXT), 0, True, False), 0.0)
        for session in range(sessions):
            self.arrive(session, "a new run is placed")
            self.end()
        self.spent.clear()

    def arrive(self, session: int, what: str = "arrives, continuing") -> None:
        """The next step of a session comes."""
        who = Identity(tenant="t", session=f"session-{session}", rule="x-session-id")
        self._handle(what, StepArrived(f"{session}#{next(self._names)}", "m", who, size=CONTEXT))

    def end(self) -> None:
        """The step that runs longest ends, and time passes."""
        name = next(iter(self._running))
        del self._running[name]
        session = name.partition("#")[0]
        cached = CONTEXT - 1_000 if session in self._known else 0
        self._known.add(session)
        self._handle("first token", FirstToken(name))
        self._handle("ends", StepFinished(name, Usage(CONTEXT - 50, cached, 50), "tool_calls"))
        self.now += PAUSE
        if self.now >= self._due:
            self._due += ADVICE
            self._handle("what engines are told", AdviceDue())
            if int(self.now) > int(self.now - ADVICE):
                self._handle("tick", Tick())

    def play(self, steps: int) -> dict[str, Any]:
        """What the events cost, each session coming again in its turn, and then new ones."""
        for session in range(RUNNING):
            self.arrive(session)
        for index in range(steps):
            self.arrive((RUNNING + index) % self.sessions)
            self.end()
        for index in range(steps // 10):
            self.arrive(self.sessions + index, "a new run is placed")
            self.end()
        return {"held steps then": len(self.core.gate.held), **{name: cut(one) for name, one in self.spent.items()}}

    def _handle(self, what: str, event: Any) -> None:
        began = time.perf_counter_ns()
        actions = self.core.handle(event, self.now)
        self.spent.setdefault(what, []).append((time.perf_counter_ns() - began) / 1000)
        self._running.update(dict.fromkeys(one.step for one in actions if isinstance(one, Dispatch)))


def resident() -> int:
    """Bytes of memory that this process has now. To trace each object would take longer than all the rest."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fleet(sessions: int, workers: int) -> dict[str, Any]:
    """All figures of a large fleet, and the memory of all that the core knows of it."""
    told: dict[str, Any] = {}
    for name, contexts in (("all fits", 2.0 * sessions / workers), ("a part is held", SMALL * RUNNING / workers)):
        before, began = resident(), time.perf_counter()
        made = Fleet(sessions, workers, contexts)
        built = {"build_seconds": round(time.perf_counter() - began), "memory_mib": (resident() - before) >> 20}
        told[name] = built | made.play(STEPS)
        del made
    return told


def main() -> None:
    """Run from the command line; prints the figures, and writes DIR/core.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int)
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--fleet", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.fleet:
        result = fleet(arguments.sessions or 100_000, arguments.workers)
    else:
        result = measure(arguments.sessions or 10_000)
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "core.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
