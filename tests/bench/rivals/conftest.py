from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.bench.rivals.fake_engine import FakeEngine, FakeEngines


@pytest.fixture
async def engines() -> AsyncIterator[FakeEngines]:
    """Two fake engines."""
    started = [await FakeEngine().start(), await FakeEngine().start()]
    async with aiohttp.ClientSession() as http:
        yield FakeEngines(started, http)
    for engine in started:
        await engine.stop()
