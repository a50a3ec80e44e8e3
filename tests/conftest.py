"""What holds for all tests."""

from __future__ import annotations

import asyncio
import gc
import io
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, no more.
settings.register_profile("weft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("weft")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Where a test hangs, say what every task waited for: pytest-timeout shows the threads alone."""
    try:
        return (yield)
    except pytest.fail.Exception as failure:
        if "Timeout" in str(failure):
            stacks = io.StringIO()
            for task in [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]:
                task.print_stack(file=stacks)
            item.add_report_section("call", "tasks", stacks.getvalue())
        raise
