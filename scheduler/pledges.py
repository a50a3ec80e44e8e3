"""What clients ask of a run: to be done in time, to use no more than so many tokens; and whether it will (design §7).

A deadline makes nobody overtake others: a run that has time stands back for those that have not, by a share of what it
has to spare and a minute at most, so that nothing is won by naming one that is too short.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING
from zlib import crc32

from scheduler.prospect import Dice

if TYPE_CHECKING:
    from scheduler.graph import Step, Workflow
    from scheduler.identity import Identity
    from scheduler.knowledge import Knowledge

DRAWS = 32
PAUSE = 1.0  # seconds for which what was drawn holds
HOPELESS = 0.05  # chance below which a run is refused, where the client asked for that
AT_RISK = 0.5  # chance below which it is warned of
KNOWN = 0.8  # confidence in what is foretold from which a run may be refused for it
YIELDS, MOST = 0.1, 60.0  # the share of its spare time by which a run stands back, and the most seconds
INFINITY = float("inf")


@dataclass(slots=True)
class Pledge:
    """Of one run: `until` when it is to be done, on the clock of `now`; `budget` tokens for all its steps.

    `in_time` and `in_budget` are the chances as of its latest step, 1 where nothing was asked; `spare` are the seconds
    that it has beyond what it probably needs. `strict`: it is to be refused as soon as it cannot be kept; `hopeless`:
    why it cannot.
    """

    until: float = INFINITY
    budget: float = INFINITY
    strict: bool = False
    in_time: float = 1.0
    in_budget: float = 1.0
    spare: float = INFINITY
    looked: float = -INFINITY
    hopeless: str | None = None

    @property
    def terms(self) -> dict[str, float]:
        """The chances, as far as something was asked."""
        terms = {"in_time_probability": self.in_time} if self.until < INFINITY else {}
        return terms | ({"in_budget_probability": self.in_budget} if self.budget < INFINITY else {})

    @property
    def warning(self) -> str:
        """What is at risk; empty: nothing."""
        risks = [
            *(["deadline"] if self.in_time < AT_RISK else []), *(["budget"] if self.in_budget < AT_RISK else []),
        ]  # fmt: skip
        return f"{' and '.join(risks)} at risk" if risks else ""


def came(step: Step, who: Identity, strict: bool, knowledge: Knowledge, now: float) -> str | None:
    """A step of a run has come: look anew at what was asked of it. Returns why the run cannot keep that and is refused.

    What is drawn holds for a second. Bounded: at most `DRAWS` times `scheduler.prospect.MOST` steps are drawn.
    """
    workflow = step.session.workflow
    pledge = workflow.pledge
    if who.deadline is not None or who.budget is not None:
        pledge = workflow.pledge = pledge or Pledge()
        until = pledge.until if who.deadline is None else workflow.arrived + who.deadline
        budget = pledge.budget if who.budget is None else who.budget
        if (until, budget) != (pledge.until, pledge.budget):
            pledge.until, pledge.budget, pledge.looked = until, budget, -INFINITY
        pledge.strict = strict
    if pledge is None:
        return None
    if now >= pledge.looked + PAUSE:
        pledge.looked = now
        _look(pledge, workflow, step.id, knowledge, now)
    if now > pledge.until:
        pledge.in_time, pledge.hopeless = 0.0, f"its deadline passed {now - pledge.until:.0f} s ago"
    elif workflow.spent >= pledge.budget:
        pledge.in_budget, pledge.hopeless = 0.0, f"its budget of {pledge.budget:g} tokens is spent"
    return pledge.hopeless if pledge.strict else None


def _look(pledge: Pledge, workflow: Workflow, seed: str, knowledge: Knowledge, now: float) -> None:
    """Draw how the run may go on."""
    rests, confidence = knowledge.prospects(workflow, now, Dice(crc32(seed.encode())), DRAWS)
    left = pledge.budget - workflow.spent
    pledge.in_time = sum(now + one.seconds <= pledge.until for one in rests) / len(rests)
    pledge.in_budget = sum(one.tokens <= left for one in rests) / len(rests)
    seconds, tokens = median(one.seconds for one in rests), median(one.tokens for one in rests)
    pledge.spare = max(0.0, pledge.until - now - seconds)
    pledge.hopeless = None
    if confidence >= KNOWN and pledge.in_time < HOPELESS:
        pledge.hopeless = f"it needs some {seconds:.0f} s more, and its deadline is in {pledge.until - now:.0f} s"
    elif confidence >= KNOWN and pledge.in_budget < HOPELESS:
        pledge.hopeless = f"it needs some {tokens:.0f} tokens more, and {left:.0f} are left of its budget"


def stands_back(step: Step) -> float:
    """Seconds by which a step of a run that has time stands back."""
    pledge = step.session.workflow.pledge
    return min(MOST, YIELDS * pledge.spare) if pledge is not None and pledge.until < INFINITY else 0.0
