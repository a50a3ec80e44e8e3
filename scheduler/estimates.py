"""What is learned online about a step's end: when the branch returns, if it does; how long answers are; what is left.

Each quantity is learned in levels, every one drawn towards the wider one: for gaps all of a tenant's stops of one kind,
those of a role, those that called the same tools; then the session's own latest values, which tell most. The constants
were chosen on one half of a trace (`bench/predict.py`), but for tools, which it does not name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.calibration import Calibration
from scheduler.chances import Chances
from scheduler.gaps import GAPS, Gap
from scheduler.histogram import Key, LogBins, Spread, Tree, blend, remember
from scheduler.lengths import Lengths, StepsLeft

TOOL, END, LENGTH, OTHER, START = "tool", "end", "length", "other", "start"
KINDS = {
    "tool_calls": TOOL, "function_call": TOOL, "tool_use": TOOL,
    "stop": END, "end_turn": END, "stop_sequence": END, "completed": END,
    "length": LENGTH, "max_tokens": LENGTH, "incomplete": LENGTH, "model_context_window_exceeded": LENGTH,
}  # fmt: skip

OUTPUTS = LogBins(1, 131_072, 48)  # tokens
LAYOUT = 1  # of a dump
KEYS = 10_000
MOST = 1000.0  # counts of one key, before they are halved

# Pseudo-counts of the level above, and of all levels against a session's own memory.
KAPPA = 20.0
SESSION_GAPS, SESSION_OUTPUTS = 8.0, 15.0
NEVER = 1.0  # pseudo-events
SCORED = 5  # one in so many distributions is scored; odd, as gaps and outputs take turns

# Where nothing is known: the median gap in seconds with its sigma, and the share that never returns.
_PRIOR = {kind: (GAPS.log_normal(8, 1.5), 0.02) for kind in (START, TOOL, OTHER)} | {
    kind: (GAPS.log_normal(90, 2.2), 0.2) for kind in (END, LENGTH)
}
_PRIOR_OUTPUT = OUTPUTS.log_normal(200, 1.2)


def kind(stop: str | None, tools: Sequence[str] = ()) -> str:
    """The kind of a stop, from the finish reason of any of the APIs and the tools that the answer called."""
    return TOOL if tools else KINDS.get(stop or "", OTHER)


@dataclass(frozen=True, slots=True)
class Past:
    """What a session has done, as far as predictions need it. About 0.2 KiB; a fork starts with its parent's.

    `steps` ended so far; `stop` and `before` are the kinds of the last two stops; `gap` is the bin of the gap that
    has just ended, -1 while none has; the rest are bins of its latest gaps (after tools, after others) and outputs.
    """

    steps: int = 0
    stop: str = START
    before: str = START
    gap: int = -1
    tool_gaps: bytes = b""
    other_gaps: bytes = b""
    outputs: bytes = b""

    @property
    def gaps(self) -> bytes:
        """The session's latest gaps after the kind of stop at which it is."""
        return self.tool_gaps if self.stop == TOOL else self.other_gaps

    def ended(self, stop: str, tokens: int) -> Past:
        """A step has ended with this kind of stop and so many output tokens."""
        outputs = remember(self.outputs, OUTPUTS.bin(tokens))
        return Past(self.steps + 1, stop, self.stop, -1, self.tool_gaps, self.other_gaps, outputs)

    def returned(self, seconds: float) -> Past:
        """The next step has arrived, so many seconds after the end of the one before."""
        bin_ = GAPS.bin(seconds)
        gaps = remember(self.gaps, bin_)
        return (
            replace(self, gap=bin_, tool_gaps=gaps) if self.stop == TOOL else replace(self, gap=bin_, other_gaps=gaps)
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a branch stands. `tools` are the names that its last answer called, sorted; empty where none or unknown."""

    tenant: str
    role: str
    tools: tuple[str, ...] = ()
    past: Past = Past()


class Estimates:
    """All that is learned, bounded by `KEYS` per quantity. Nothing here reads a clock: seconds are passed in."""

    def __init__(self, keys: int = KEYS) -> None:
        self.keys = keys
        self._gaps = Tree(GAPS.count, KAPPA, keys, MOST)
        self._never = Chances(NEVER, keys)
        self._outputs = Tree(OUTPUTS.count, KAPPA, keys, MOST)
        self._lengths = Lengths(keys)
        self._calibration = Calibration()
        self._turn = 0

    def gap(self, place: Place) -> Gap:
        """The time from the end of the step at which the branch stands to its next one, in seconds."""
        stop = place.past.stop
        base = self._gaps.mixture(_gap_path(place), _PRIOR[stop][0])
        return Gap(blend(base, place.past.gaps, SESSION_GAPS), self._never_probability(place))

    def returned(self, place: Place, seconds: float | None) -> None:
        """Learn that the branch which stood at this place returned after so many seconds (None: nobody knows)."""
        if seconds is not None:
            if self._is_scored():
                self._calibration.spread("gap", self.gap(place).spread, seconds)
            self._gaps.add(_gap_path(place), GAPS.bin(seconds))
        self._calibration.score("never_brier", self._never_probability(place) ** 2)
        self._stood(place, ended=False)

    def never(self, place: Place) -> None:
        """Learn that the session made no further call: it ended, or was given up."""
        self._calibration.score("never_brier", (1 - self._never_probability(place)) ** 2)
        steps = place.past.steps
        for depth in (1 << i for i in range(max(steps - 1, 0).bit_length())):
            left, truth = self._lengths.left(place.tenant, place.role, depth).quantile(0.5), steps - depth
            self._calibration.score("steps_left_error", abs(left - truth))
            self._calibration.score("steps_left_error_ratio", abs(left - truth) / max(truth, 1))
        self._stood(place, ended=True)

    def output_tokens(self, place: Place) -> Spread:
        """The length of the answer to the step that has just arrived (`place.past` knows its gap), in tokens."""
        base = self._outputs.mixture(_output_path(place), _PRIOR_OUTPUT)
        return Spread(OUTPUTS, blend(base, place.past.outputs, SESSION_OUTPUTS))

    def output(self, place: Place, tokens: int) -> None:
        """Learn that the answer to the step which arrived at this place had so many tokens."""
        if self._is_scored():
            self._calibration.spread("output", self.output_tokens(place), tokens)
        self._outputs.add(_output_path(place), OUTPUTS.bin(tokens))

    def steps_left(self, place: Place) -> StepsLeft:
        """How many more steps the session makes after the one at whose end it stands."""
        never = self._never_probability(place) if place.past.steps else 0.0
        return self._lengths.left(place.tenant, place.role, place.past.steps, never)

    def ended(self, place: Place) -> float:
        """How many sessions of the role have been seen to end."""
        return self._lengths.ended(place.tenant, place.role)

    def calibration(self) -> dict[str, float]:
        """How good the predictions have lately been: means over the last 1,000 or so of each kind.

        `*_below_p90_ratio` is the share of truths under the 90 % quantile, `*_log_error` the mean |ln(truth / median)|.
        """
        return self._calibration.values()

    def dump(self) -> dict[str, Any]:
        """All that was learned, as plain JSON values. The calibration starts anew."""
        return {
            "layout": LAYOUT,
            "gaps": self._gaps.dump(),
            "never": self._never.dump(),
            "outputs": self._outputs.dump(),
            "lengths": self._lengths.dump(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Replace all that was learned by a dump. Raises ValueError, and changes nothing, where it does not fit."""
        if state.get("layout") != LAYOUT:
            raise ValueError(f"estimates of layout {state.get('layout')}, not {LAYOUT}")
        new = Estimates(self.keys)
        try:
            new._gaps.load(state["gaps"])
            new._never.load(state["never"])
            new._outputs.load(state["outputs"])
            new._lengths.load(state["lengths"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a dump of estimates: {error!r}") from error
        self._gaps, self._never, self._outputs, self._lengths = new._gaps, new._never, new._outputs, new._lengths

    def _is_scored(self) -> bool:
        """One in `SCORED`: a distribution costs more to score than to learn."""
        self._turn = (self._turn + 1) % SCORED
        return self._turn == 1 % SCORED

    def _never_probability(self, place: Place) -> float:
        return self._never.chance(_never_path(place), _PRIOR[place.past.stop][1])

    def _stood(self, place: Place, *, ended: bool) -> None:
        self._never.add(_never_path(place), ended)
        self._lengths.add(place.tenant, place.role, place.past.steps, ended)


def _gap_path(place: Place) -> tuple[Key, ...]:
    stop = place.past.stop
    wide = (place.tenant, stop), (place.tenant, place.role, stop)
    return (*wide, (place.tenant, place.role, stop, place.tools)) if place.tools else wide


def _never_path(place: Place) -> tuple[Key, ...]:
    past = place.past
    role = (place.tenant, place.role, past.stop)
    return (place.tenant, past.stop), role, (*role, past.before)


def _output_path(place: Place) -> tuple[Key, ...]:
    past = place.past
    wide = (place.tenant, past.stop)
    return wide, (*wide, past.gap), (place.tenant, place.role, past.stop, past.gap)
