"""What is written down of each call and run of a benchmark, real or simulated. Times are seconds since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CallRecord:
    """One call. `held` seconds it waited in front of the engines, None where that cannot be seen; `hosted` tokens came
    from the host tier.

    `ideal` tokens are what a cache without limit would have had. `first_token` and `finished` are None after an error.
    `first_text` is when the first chunk came whose tokens are text, where that was seen.
    """

    run: str
    index: int
    session: str
    tenant: str
    worker: str
    sent: float
    prompt: int
    output: int
    ideal: int = 0
    first_token: float | None = None
    finished: float | None = None
    cached: int = 0
    hosted: int = 0
    held: float | None = 0.0
    error: str | None = None
    first_text: float | None = None


@dataclass(slots=True)
class RunRecord:
    """One run. `unloaded` is how long it takes alone, gaps included, None where nobody knows. `warm`: begun before the
    slots had turned over.

    `finished` is None where it was cut off; `until` is then when.
    """

    run: str
    tenant: str
    started: float
    unloaded: float | None
    warm: bool
    finished: float | None = None
    until: float | None = None


@dataclass(slots=True)
class Played:
    """Everything of one cell. The window is what rates are taken over, [from, to] in seconds."""

    calls: list[CallRecord]
    runs: list[RunRecord]
    window: tuple[float, float]
    extra: dict[str, float]
