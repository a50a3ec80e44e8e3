"""W8: light tenants, a greedy one and a lying one, whose agents have the same names."""

from __future__ import annotations

import random
from typing import Any

from bench.workloads.drafts import Draft, Shelf, about, after, template
from bench.workloads.runs import Call, Run, Workload

ROLES = ("planner", "worker", "reviewer")
LIGHT, GREEDY, LIAR = "light", "greedy", "liar"
HONEST = template("planner worker,worker worker 0.6,worker reviewer 0.4,reviewer planner 0.3")


def lie() -> dict[str, Any]:
    """Every agent is said to run right after every step."""
    return template(",".join(f"{one} {two}" for one in ROLES for two in ROLES))


def w8(
    seed: int, *, scale: float = 1.0, tenants: int = 6, light: int = 8, greedy: int = 48, lying: int = 16
) -> Workload:
    """So many tenants; so many runs of each light one, of the greedy one with contexts three times as long, of the
    liar.
    """
    rng, shelf = random.Random(seed), Shelf("w8", scale)
    small = [f"{LIGHT}-{number}" for number in range(1, tenants - 1)]
    runs = []
    for number, tenant in enumerate(
        [*(one for one in small for _ in range(light)), *[GREEDY] * greedy, *[LIAR] * lying]
    ):
        longer = 3.0 if tenant == GREEDY else 1.0
        runs.append(_run(Draft(shelf, number, "app", tenant), shelf, rng, tenant, longer))
    return Workload("w8", runs)


def _run(draft: Draft, shelf: Shelf, rng: random.Random, tenant: str, longer: float) -> Run:
    """A planner, a worker whose context grows, and a reviewer, perhaps again."""
    while not draft.calls or rng.random() < 0.3:
        _step(draft, shelf, rng, "planner", longer)
        call = _step(draft, shelf, rng, "worker", longer)
        while rng.random() < 0.6:
            prompt = draft.say(after(call), about(rng, 800 * longer))
            gap = about(rng, 2.0, 1.0, 60.0)
            call = draft.call(call.session, "worker", prompt, about(rng, 250), draft.calls[-1:], gap=gap)
        _step(draft, shelf, rng, "reviewer", longer)
    return draft.run({"template": lie() if tenant == LIAR else HONEST})


def _step(draft: Draft, shelf: Shelf, rng: random.Random, role: str, longer: float) -> Call:
    system = shelf.shared(f"{draft.tenant}/{role}", 2000)
    session = f"{role}-{len(draft.calls)}"
    return draft.call(session, role, draft.say(system, about(rng, 3000 * longer)), about(rng, 250), draft.calls[-1:])
