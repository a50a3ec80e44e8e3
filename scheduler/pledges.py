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
    from scheduler.events import Usage
    from scheduler.graph import Step
    from scheduler.identity import Identity
    from scheduler.knowledge import Knowledge

DRAWS = 64
HOPELESS = 0.05  # chance below which a run is refused, where the client asked for that
AT_RISK = 0.5  # chance below which it is warned of
KNOWN = 0.8  # confidence in what is foretold from which a run may be refused for it
YIELDS, MOST = 0.1, 60.0  # the share of its spare time by which a run stands back, and the most seconds
INFINITY = float("inf")


@dataclass(slots=True)
class Pledge:
    """Of one run: `until` when it is to be done, on the clock of `now`; `budget` tokens, of which `spent` are gone.

    `in_time` and `in_budget` are the chances as of its latest step, 1 where nothing was asked; `spare` are the seconds
    that it has beyond what it probably needs. `strict`: it is to be refused as soon as it cannot be kept.
    """

    until: float = INFINITY
    budget: float = INFINITY
    strict: bool = False
    spent: int = 0
    in_time: float = 1.0
    in_budget: float = 1.0
    spare: float = INFINITY

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

    Deterministic: the same run at the same place draws the same.
    """
    workflow = step.session.workflow
    pledge = workflow.pledge
    if who.deadline is not None or who.budget is not None:
        pledge = workflow.pledge = pledge or Pledge()
        pledge.strict = strict
        if who.deadline is not None:
            pledge.until = workflow.arrived + who.deadline
        if who.budget is not None:
            pledge.budget = who.budget
    if pledge is None:
        return None
    rests, confidence = knowledge.prospects(workflow, now, Dice(crc32(step.id.encode())), DRAWS)
    pledge.in_time = sum(now + one.seconds <= pledge.until for one in rests) / len(rests)
    pledge.in_budget = sum(pledge.spent + one.tokens <= pledge.budget for one in rests) / len(rests)
    seconds, tokens = median(one.seconds for one in rests), median(one.tokens for one in rests)
    pledge.spare = max(0.0, pledge.until - now - seconds)
    if not pledge.strict:
        return None
    if now > pledge.until:
        return f"its deadline passed {now - pledge.until:.0f} s ago"
    if pledge.spent >= pledge.budget:
        return f"its budget of {pledge.budget:g} tokens is spent"
    if confidence < KNOWN:
        return None
    if pledge.in_time < HOPELESS:
        return f"it needs some {seconds:.0f} s more, and its deadline is in {pledge.until - now:.0f} s"
    if pledge.in_budget < HOPELESS:
        return f"it needs some {tokens:.0f} tokens more, and {pledge.budget - pledge.spent:.0f} are left of its budget"
    return None


def ended(step: Step, usage: Usage) -> None:
    """A step of a run has ended with this usage."""
    if (pledge := step.session.workflow.pledge) is not None:
        pledge.spent += usage.prompt + usage.output


def stands_back(step: Step) -> float:
    """Seconds by which a step of a run that has time stands back."""
    pledge = step.session.workflow.pledge
    return min(MOST, YIELDS * pledge.spare) if pledge is not None and pledge.until < INFINITY else 0.0
