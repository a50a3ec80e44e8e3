"""The modelled engine gives each sequence its tokens in the step in which vLLM's real scheduler does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from bench.simulation.cluster import Cluster
from bench.simulation.system import System
from bench.simulation.systems.stock import StockThreshold
from kvcache.plugin.engine import WeftScheduler
from tests.bench.simulation.test_engine import SMALL, Ours, Sticky, session
from tests.kvcache.plugin.schedulers import BLOCK, Played

BUDGET, STEPS = 128, 60
SECONDS = replace(
    SMALL, step=1.0, decode=0.0, context=0.0, prefill=0.0, attention=0.0,
    kv_tokens=400 * BLOCK, block=BLOCK, budget=BUDGET, sequences=6,
)  # fmt: skip
Asked = list[tuple[int, int, int]]
"""The step before which each comes, the tokens of its prompt and of its output."""


def modelled(system: type[System], asked: Asked) -> dict[str, int]:
    """After how many steps each has its first token; one second is one step."""
    cluster = Cluster(system, SECONDS, 1, 0.0, 100.0, 0)
    for number, (at, prompt, output) in enumerate(asked):
        cluster.at(max(0.0, at - 0.5), cluster.play, session(f"r{number}", 1, first=prompt, output=output))
    cluster.run()
    return {call.run: round(call.first_token) for call in cluster.calls if call.first_token is not None}


class Capped(Sticky):
    """vLLM's own remedy for long prefills."""

    threshold = StockThreshold.threshold


class CappedScheduler(AsyncScheduler):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scheduler_config.long_prefill_token_threshold = int(Capped.threshold * BUDGET)


def real(kind: type[Any], asked: Asked) -> dict[str, int]:
    played = Played(400, kind=kind, max_num_batched_tokens=BUDGET, max_num_seqs=SECONDS.sequences)
    first: dict[str, int] = {}
    for step in range(max(at for at, _, _ in asked) + 2 * STEPS):
        for number, (at, prompt, output) in enumerate(asked):
            if at == step:
                text = [2 + (number * 31 + place * 7) % 900 for place in range(prompt)]
                played.ask(f"r{number}", text, f"s{number}", output)
        if not played.scheduler.has_requests():
            break
        played.begin()
        played.finish()
        for name, tokens in played.outputs.items():
            if tokens:
                first.setdefault(name, step + 1)
    return first


@pytest.mark.parametrize(
    ("system", "kind"), [(Sticky, AsyncScheduler), (Capped, CappedScheduler), (Ours, WeftScheduler)]
)
@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 12), st.one_of(st.integers(1, 70), st.integers(1, 450)), st.integers(1, 12)),
        min_size=1,
        max_size=7,
    )
)
def test_first_tokens_come_after_as_many_steps(system: type[System], kind: type[Any], asked: Asked) -> None:
    """One that decodes all the time keeps both in step."""
    asked = [(0, 1, STEPS), *asked]
    assert modelled(system, asked) == real(kind, asked), asked


def test_a_short_one_passes_in_both() -> None:
    asked = [(0, 1, STEPS), (1, 450, 4), (2, 20, 4)]
    for system, kind, steps in ((Sticky, AsyncScheduler, 5), (Ours, WeftScheduler, 3)):
        assert modelled(system, asked)["r2"] == real(kind, asked)["r2"] == steps
