"""The systems that are processes of their own between client and engines: vLLM Router, and Weft itself."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from bench.errors import BenchError
from bench.rivals.costs import measured
from bench.rivals.engines import HOST, Build, Engines
from bench.rivals.front import Front, Place, Turn, owner
from bench.rivals.process import Process, environment
from bench.workloads.runs import Run, Workload
from server.engine import free_port

READY_SECONDS = 60.0


class Server(Front):
    """One process on a port of its own. Everybody's calls carry the session headers, and nothing else about them."""

    program = ""
    holds_seen = False

    def __init__(self) -> None:
        self.process: Process | None = None
        self.folder: Path | None = None

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Start it and wait until it serves."""
        self.folder = Path(tempfile.mkdtemp(prefix="weft-bench-"))
        port = free_port(HOST)
        self.url = f"http://{HOST}:{port}"
        command = [_installed(self.program), *await self.arguments(engines, workload, port)]
        self.process = Process(command, self.folder / "log", environment(HOME=str(self.folder)), cwd=self.folder)
        deadline = time.monotonic() + READY_SECONDS
        while not await self._serves(engines.http, len(engines.urls)):
            if not self.process.alive or time.monotonic() > deadline:
                raise RuntimeError(f"{self.program} does not serve: {self.process.tail()}")
            await asyncio.sleep(0.1)
        self.pid = self.process.pid

    async def stop(self) -> None:
        """End it and what it left."""
        if self.process:
            await self.process.stop()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def arguments(self, engines: Engines, workload: Workload, port: int) -> Sequence[str]:
        """Its command line behind the program."""
        raise NotImplementedError

    async def ready(self, http: aiohttp.ClientSession, engines: int) -> bool:
        """Whether it serves, with so many engines."""
        async with http.get(self.url + "/health") as answer:
            return answer.status == 200

    async def place(self, turn: Turn) -> Place:
        """The server decides."""
        return Place(self.url, "", turn.headers)

    async def _serves(self, http: aiohttp.ClientSession, engines: int) -> bool:
        try:
            return await self.ready(http, engines)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False


class Weft(Server):
    """`weft serve` attached to the engines, with an empty home: it knows nothing of what it served before.

    `policy` is the eviction policy of the engines' plug-in; None: they are stock vLLM.
    """

    program = "weft"

    def __init__(self, policy: str | None = "retention") -> None:
        super().__init__()
        self.policy = policy

    def build(self, runs: Sequence[Run], asked: int, tier: float) -> Build:
        """With our plug-in."""
        return Build(asked, tier, self.policy)

    async def arguments(self, engines: Engines, workload: Workload, port: int) -> Sequence[str]:
        """Nothing but where things are."""
        return [
            *("serve", "--workers", ",".join(engines.urls), "--worker-api-key", engines.key),
            *("--port", str(port), "--home", str(self.folder)),
        ]

    async def ready(self, http: aiohttp.ClientSession, engines: int) -> bool:
        """It has seen every engine, and what that can do."""
        async with http.get(self.url + "/v1/workers") as answer:
            workers = (await answer.json())["workers"]
        if [worker["state"] for worker in workers] != ["up"] * engines:
            return False
        for worker in workers:
            if self.policy is not None and not worker["engine"].get("eviction"):
                raise RuntimeError(f"the plug-in does not keep the KV: {worker['engine']}")
        return True


class WeftHinted(Weft):
    """The same, with clients that say all they can: run and program, declared templates, whom a call follows there, and
    the end of each run."""

    async def start(self, engines: Engines, workload: Workload) -> None:
        """Templates are declared before the first run."""
        self.http, self.telling = engines.http, set[asyncio.Task[None]]()
        await super().start(engines, workload)
        for run in {run.program: run for run in workload.runs}.values():
            if document := run.hints.get("template"):
                url = f"{self.url}/v1/workflows/templates/{run.program}"
                async with self.http.put(url, json=document) as answer:
                    if answer.status != 200:
                        raise RuntimeError(f"the template of {run.program}: {await answer.text()}")

    async def stop(self) -> None:
        """What is still to be said is said first."""
        await asyncio.gather(*self.telling, return_exceptions=True)
        await super().stop()

    async def place(self, turn: Turn) -> Place:
        """The hints go in OpenAI's own field of metadata."""
        run, call = turn.run, turn.call
        said = {"workflow_id": run.id, "workflow": run.program, "node": call.role}
        others = [one.role for one in call.after if one.session != call.session] if "template" in run.hints else []
        if others:
            said["after"] = ",".join(dict.fromkeys(others))
        return Place(self.url, "", turn.headers, {"metadata": said})

    def over(self, run: Run) -> None:
        """It has ended."""
        task = asyncio.create_task(self._finish(run))
        self.telling.add(task)
        task.add_done_callback(self.telling.discard)

    async def _finish(self, run: Run) -> None:
        async with self.http.post(f"{self.url}/v1/workflows/{run.id}/finish") as answer:
            await answer.read()


class Router(Server):
    """vLLM Router with one of its policies, else as it comes."""

    program = "vllm-router"

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.policy = policy

    async def arguments(self, engines: Engines, workload: Workload, port: int) -> Sequence[str]:
        """The policy."""
        metrics = free_port(HOST)
        return [
            *("--host", HOST, "--port", str(port), "--prometheus-port", str(metrics), "--log-level", "warning"),
            *("--worker-urls", *engines.urls, "--policy", self.policy),
        ]


class Program(Router):
    """vLLM Router's program scheduling, set up as its documentation has it: capacity and costs of these engines, one
    queue for all. It sees sessions by the same header as everybody."""

    def __init__(self) -> None:
        super().__init__("consistent_hash")

    async def arguments(self, engines: Engines, workload: Workload, port: int) -> Sequence[str]:
        """The configuration too."""
        given = await super().arguments(engines, workload, port)
        config = (await measured(engines)).config() | {
            "program_scheduling_enable_key": "auto", "global_queue": True, "resume_order": "mru",
            "token_capacity_per_target": engines.kv_tokens, "metrics_interval_seconds": 1.0,
        } | self.tuning(workload)  # fmt: skip
        await engines.reset()
        return [*given, "--enable-program-scheduling", "--program-scheduling-config-json", json.dumps(config)]

    def tuning(self, workload: Workload) -> dict[str, Any]:
        """Settings beyond the documented example."""
        return {}


class Hinted(Program):
    """The same, tuned, and told what only a trace knows: each call's exact output length and when a session ends."""

    def tuning(self, workload: Workload) -> dict[str, Any]:
        """For short calls; and how long a session's KV is kept: three times the mean gap."""
        calls = [call for run in workload.runs for call in run.calls]
        self.ttl = max(0.5, 3 * sum(call.gap for call in calls) / len(calls))
        return {
            "program_scheduling_enable_key": "vllm_xargs.agentic_context", "metrics_interval_seconds": 0.25,
            "stats_window_size": 20, "binding_strategy": "reasoning_token_balance",
            "decode_buffer_tokens": round(sum(call.output for call in calls) / len(calls)) + 1,
        }  # fmt: skip

    async def place(self, turn: Turn) -> Place:
        """The hints go in the body, as a JSON string: vLLM answers 400 to the object that is documented."""
        run, call = turn.run, turn.call
        context = {
            "program_id": turn.owner, "session_id": turn.owner, "task_id": run.id, "agent_id": call.role,
            "step_id": turn.step, "expected_resume": not turn.last, "expected_output_length": call.output,
            "kv_retention_ttl_seconds": self.ttl,
        }  # fmt: skip
        if call.parent is not None:
            context["parent_program_id"] = owner(run, call.parent)
        return Place(self.url, "", {}, {"vllm_xargs": {"agentic_context": json.dumps(context)}})


def _installed(program: str) -> str:
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        raise BenchError(f"{program} is not installed here: pip install 'weft[bench]'")
    return str(path)
