"""A cluster that does nothing by itself, for systems to be driven by hand, and small runs."""

from __future__ import annotations

from typing import Any

from bench.records import CallRecord
from bench.simulation.profile import L70
from bench.simulation.system import System, Turn
from bench.workloads.runs import Call, Piece, Run
from kvcache.policy import Hint


class FakeEngine:
    """Keeps what it is told. Turns wait until a test starts or ends them."""

    def __init__(self, index: int, kv_tokens: int, tier_tokens: int) -> None:
        self.index, self.kv_tokens, self.tier_tokens = index, kv_tokens, tier_tokens
        self.waiting: list[Turn] = []
        self.running: list[Turn] = []
        self.hints: dict[str, Hint] = {}
        self.released: list[str] = []
        self.prefetched: list[Piece] = []
        self.held: dict[Piece, int] = {}

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def free_tokens(self) -> int:
        return self.kv_tokens

    def resident(self, piece: Piece) -> tuple[int, int]:
        return self.held.get(piece, 0), self.held.get(piece, 0)

    def tell(self, owner: str, hint: Hint) -> None:
        self.hints[owner] = hint

    def release(self, owner: str) -> None:
        self.released.append(owner)

    def prefetch(self, piece: Piece) -> int:
        self.prefetched.append(piece)
        return piece.end

    def withdraw(self, turn: Turn) -> None:
        self.waiting.remove(turn)


class FakeCluster:
    """The cluster as a system sees it. `sent` is what it has passed on, as (turn, worker)."""

    def __init__(
        self, system: type[System], workers: int = 2, kv_tokens: int = 10_000, tier: int = 0, mean: float = 1000.0
    ) -> None:
        self.now = 0.0
        self.profile, self.seed, self.mean_context, self.tiered = L70, 0, mean, tier > 0
        self.engines = [FakeEngine(i, kv_tokens, tier * kv_tokens) for i in range(workers)]
        self.sent: list[tuple[Turn, int]] = []
        self.dues: dict[str, float | None] = {}
        self.lefts: dict[str, float] = {}
        self.ticks = 0.0
        self.system: Any = system(self)  # type: ignore[arg-type]

    def send(self, turn: Turn, worker: int) -> None:
        turn.worker = worker
        turn.record.held = self.now - turn.sent
        self.sent.append((turn, worker))
        self.engines[worker].waiting.append(turn)

    def due(self, owner: str) -> float | None:
        return self.dues.get(owner)

    def left(self, run: Run) -> float:
        return self.lefts.get(run.id, 1.0)

    def begin(self, run: Run) -> None:
        self.system.began(run)

    def call(self, run: Run, index: int) -> Turn:
        """The client sends a call."""
        call = run.calls[index]
        record = CallRecord(run.id, index, call.session, run.tenant, "", self.now, call.prompt.end, call.output)
        turn = Turn(run, index, call, f"{run.id}/{call.session}", record)
        self.system.arrived(turn)
        return turn

    def start(self, turn: Turn) -> None:
        """The engine lets the call into its batch."""
        assert turn.worker is not None
        self.engines[turn.worker].waiting.remove(turn)
        self.engines[turn.worker].running.append(turn)

    def end(self, turn: Turn) -> None:
        """The call ends."""
        assert turn.worker is not None
        engine = self.engines[turn.worker]
        (engine.running if turn in engine.running else engine.waiting).remove(turn)
        turn.record.first_token = turn.record.finished = self.now
        self.system.first_token(turn)
        self.system.finished(turn)

    def pass_time(self, seconds: float) -> None:
        """Time goes by, with the system's ticks."""
        until = self.now + seconds
        tick = self.system.tick
        while tick and self.ticks + tick <= until:
            self.ticks += tick
            self.now = max(self.now, self.ticks)
            self.system.ticked()
        self.now = until

    def places(self) -> list[int]:
        """The workers that calls were passed to, in order."""
        return [worker for _, worker in self.sent]


def chain(name: str, calls: int = 3, tokens: int = 1000, output: int = 100, gap: float = 1.0, **run: Any) -> Run:
    """A run of one session, whose context grows by so many tokens a call."""
    made: list[Call] = []
    at: Piece | None = None
    for number in range(calls):
        prompt = Piece(f"{name}/{number}", tokens, at)
        at = Piece(f"{name}/{number}/answer", output, prompt, "assistant")
        last = number == calls - 1
        made.append(
            Call(
                "main", "agent", prompt, output, tuple(made[-1:]), gap=gap if number else 0.0, answer=at,
                stop="stop" if last else "tool_calls", tools=() if last else ("bash",),
            )
        )  # fmt: skip
    return Run(name, "program", made, **run)


def relay(name: str, roles: str = "abc", rounds: int = 2, fixed: int = 800, **run: Any) -> Run:
    """A run whose agents take turns, each with a fixed prompt of its own and a new suffix each time."""
    prompts = {role: Piece(f"{name}/{role}", fixed) for role in roles}
    made: list[Call] = []
    for number in range(rounds):
        for role in roles:
            prompt = Piece(f"{name}/{role}/{number}", 100, prompts[role])
            made.append(Call(role, role, prompt, 50, tuple(made[-1:])))
    return Run(name, "relay", made, **run)
