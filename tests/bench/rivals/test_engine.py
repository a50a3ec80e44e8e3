"""The harness on real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.rivals.engines import BLOCK, Engines, length_for
from bench.rivals.measure import measure
from tests.bench.rivals.runs import TOOLS, workload
from tests.bench.rivals.test_engines import wait_for_end


@pytest.mark.engine
@pytest.mark.timeout(600)
async def test_stock_and_weft_play_on_one_engine_that_is_emptied_between_them(tmp_path: Path) -> None:
    asked = workload(runs=2, calls=3, root=TOOLS)
    async with Engines(1, 1024, tmp_path, max_len=length_for(asked)) as engines:
        assert engines.kv_tokens == 1024
        assert (await engines.counters())["prompt_tokens"] > 0
        for system in ("stock", "weft"):
            played = await measure(system, engines, asked, seed=1, load=0.2, supply=2)
            assert {call.error for call in played.calls} == {None}
            assert played.calls[0].cached == 0
            # Our mark does not keep the frame of its message from being shared too: at most one block more.
            assert all(call.ideal <= call.cached <= call.ideal + BLOCK for call in played.calls if call.finished)
            assert sum(call.cached for call in played.calls) > 0
            assert all(call.sent < call.first_token <= call.finished for call in played.calls if call.finished)
        assert (tmp_path / ".gitignore").read_text() == "*\n"
        pids = [process.pid for process in engines._processes]
    wait_for_end(pids)
