"""Small runs for the players' tests."""

from __future__ import annotations

from bench.workloads.runs import ASSISTANT, SYSTEM, USER, Call, Piece, Run, Workload

TOOLS = Piece("tools", 30, speaker=SYSTEM, text="you are an agent " * 5, shared=True)


def chain(name: str, calls: int = 3, gap: float = 0.0, root: Piece | None = None, output: int = 2) -> Run:
    """A session whose prompts grow."""
    prompt, made = root, list[Call]()
    for number in range(calls):
        prompt = Piece(f"{name}.{number}", 10, prompt, USER)
        call = Call("main", "agent", prompt, output, tuple(made[-1:]), gap=gap if made else 0.0)
        call.answer = prompt = Piece(f"{name}.{number}.answer", output, prompt, ASSISTANT)
        made.append(call)
    return Run(name, "chain", made)


def call(session: str, text: str, after: tuple[Call, ...] = (), need: int | None = None, gap: float = 0.0) -> Call:
    """A call of one message."""
    piece = Piece(f"{session} {text}", len(text.split()), text=text)
    return Call(session, session, piece, 1, after, need, gap)


def quick(slots: int) -> list[tuple[float, float]]:
    """Starts of slots that come at once, each deeper than the one before."""
    return [(0.001 * slot, 0.75 * slot / slots) for slot in range(slots)]


def workload(runs: int = 4, calls: int = 3, gap: float = 0.0, root: Piece | None = None) -> Workload:
    """Chains."""
    return Workload("chains", [chain(f"run{number}", calls, gap, root) for number in range(runs)])
