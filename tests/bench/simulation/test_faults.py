"""Workers that die, come back and are drained: no call is lost, and what held their KV goes on elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.records import Played
from bench.simulation.cluster import Fault, simulate
from bench.simulation.profile import CPU
from bench.simulation.systems import SYSTEMS
from bench.workloads.runs import Workload
from tests.bench.simulation.fronts import chain

PROFILE = replace(CPU, kv_tokens=8_000)


def played(system: str, *faults: Fault, load: float = 1.5) -> Played:
    """Runs of six calls of 1,000 tokens on two workers."""
    runs = Workload("chains", [chain(f"run{number}", calls=6) for number in range(16)])
    return simulate(runs, SYSTEMS[system], PROFILE, workers=2, load=load, supply=2, faults=faults)


@pytest.mark.parametrize("system", ["stock", "weft", "weft-attached"])
@pytest.mark.parametrize("back", [10.0, None])
def test_when_a_worker_dies_every_call_is_answered_by_another(system: str, back: float | None) -> None:
    at = sum(played(system).window) / 2
    found = played(system, Fault(0, at, None if back is None else at + back))
    assert all(call.finished is not None and call.error is None for call in found.calls)
    gone = [call for call in found.calls if call.worker == "0" and call.finished and call.finished > at]
    assert bool(gone) == (back is not None), "it serves again only where it comes back"
    assert all(call.finished is not None and call.finished > at + 10.0 for call in gone)


def test_a_call_whose_answer_had_begun_is_counted_and_made_again() -> None:
    at = sum(played("weft").window) / 2
    cuts = {played("weft", Fault(0, at + later)).extra["cut"] for later in (0.0, 0.3, 0.6, 0.9)}
    assert max(cuts) >= 1
    assert played("weft").extra["cut"] == 0


def test_a_drained_worker_finishes_what_it_has_and_begins_nothing_new() -> None:
    at = sum(played("weft", load=0.5).window) / 2
    found = played("weft", Fault(0, at, drain=True), load=0.5)
    assert all(call.finished is not None for call in found.calls)
    begun = {run.run: run.started for run in found.runs}
    later = [call for call in found.calls if call.worker == "0" and call.sent > at]
    assert later, "its sessions go on where their KV is"
    assert all(begun[call.run] <= at for call in later)
