"""What holds for all tests."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anthropic
import openai
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
            with suppress(Exception):  # whatever it is, the failure itself is told
                loop = item.session._weft_loop  # type: ignore[attr-defined]
                waits = Counter(" <- ".join(waiting(one)) for one in asyncio.all_tasks(loop))
                item.add_report_section("call", "tasks", "\n".join(f"{n} x {where}" for where, n in waits.items()))
                item.add_report_section("call", "sockets that the loop waits for, the kernel does not", str(deaf(loop)))
        raise


@pytest.fixture(autouse=True, scope="session")
def _sdks_are_closed() -> Iterator[None]:
    """An SDK's client that is garbage aborts its connections when their sockets are closed and the numbers given out
    again: it takes the reader of whoever has the number now, a server of the next test. So a test closes its own."""

    def left_open(client: object) -> None:
        if not client.is_closed:  # type: ignore[attr-defined]
            raise ResourceWarning("a test left the client of an SDK open")

    with pytest.MonkeyPatch.context() as patch:
        for sdk in (openai._base_client, anthropic._base_client):
            patch.setattr(sdk.AsyncHttpxClientWrapper, "__del__", left_open)
        yield


@pytest.fixture(autouse=True, scope="session")
async def _known_loop(request: pytest.FixtureRequest) -> None:
    request.session._weft_loop = asyncio.get_running_loop()  # type: ignore[attr-defined]


def waiting(task: asyncio.Task) -> list[str]:
    """Where a task waits, innermost first, as `function (file:line)`."""
    frames, awaited = [], task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)) is not None:
        name = frame.f_code.co_filename.rpartition("site-packages/")[2]
        frames.append(f"{frame.f_code.co_name} ({name}:{frame.f_lineno})")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return frames[::-1]


def deaf(loop: asyncio.AbstractEventLoop) -> dict[int, object]:
    """What the loop has registered although the kernel has not: closed behind its back, its number given out again."""
    selector = loop._selector  # type: ignore[attr-defined]
    told = re.findall(r"tfd:\s*(\d+)", Path(f"/proc/self/fdinfo/{selector.fileno()}").read_text())
    return {fd: key.data for fd, key in selector.get_map().items() if str(fd) not in told}
