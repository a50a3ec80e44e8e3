"""`weft serve`: workers, then the front end, then an orderly end."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from server import embedded, engine, local_ray, log
from server.app import build
from server.auth import Keys
from server.banner import Banner
from server.config import ConfigError, Settings
from server.core import Core
from server.engine import EngineSpec
from server.fleet import Attached, Fleet
from server.local_ray import LocalRay
from server.memory import Memory
from server.ray_fleet import RayFleet, end_workers, list_workers
from server.relay import SLOW_READER_SECONDS
from server.trace import Trace

CLOSE_SECONDS = 5


def run(settings: Settings) -> int:
    """Serve until told to stop; return the exit status. Raises ConfigError on what cannot be served."""
    log.configure(settings.log_format)
    keys = Keys.read(settings.keys)
    listening = _listen(settings.host, settings.port)
    banner = Banner(settings)
    sys.stdout = sys.stderr  # what libraries print (Ray, of each worker that dies) is no word of ours
    _raise_file_limit()
    for sig in (signal.SIGTERM, signal.SIGHUP):  # while uvicorn does not handle them: what runs must be ended
        if signal.getsignal(sig) is not signal.SIG_IGN:  # nohup
            signal.signal(sig, _interrupt)
    if settings.workers:
        attached = Attached(settings.workers, settings.worker_api_key)
        return _run_loop(_serve(settings, keys, attached, listening, banner))
    specs = _specs(settings, banner)
    _leave_users_directory(settings)
    if settings.address is not None:
        local_ray.join(settings.address)
        return _run_workers(settings, keys, specs, None, listening, banner)
    banner.line("starting Ray")
    local = local_ray.start_or_join(settings.home, settings.port)
    try:
        return _run_workers(settings, keys, specs, local, listening, banner)
    finally:
        _ignore_signals()
        banner.line("ending the workers and Ray")
        try:
            end_workers(list_workers())
        finally:
            local_ray.end(settings.home, settings.port, local)


def _run_workers(
    settings: Settings, keys: Keys, specs: list[EngineSpec], local: LocalRay | None, listening: socket.socket,
    banner: Banner,
) -> int:  # fmt: skip
    home = str(settings.home / "workers" / str(settings.port))
    workers = RayFleet(specs, home, "127.0.0.1" if local else None, _cpu_share(len(specs)))
    workers.start(exclusive=local is not None, report=banner.line)
    return _run_loop(_serve(settings, keys, workers, listening, banner))


def _run_loop(serving: Coroutine[Any, Any, int]) -> int:
    gc.collect()
    gc.freeze()  # what is imported by now stays: a full collection over it would hold up every stream
    gc.set_threshold(10_000, 20, 50)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serving)


def _interrupt(sig: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + sig)


def _ignore_signals() -> None:
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)


def _raise_file_limit() -> None:
    """A stream holds two sockets; the usual soft limit of 1024 would end at some 500 streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(settings: Settings, keys: Keys, fleet: Fleet, listening: socket.socket, banner: Banner) -> int:
    core = Core(hold_commit_seconds=settings.hold_commit_seconds, hold_unary_seconds=settings.hold_unary_seconds)
    trace = Trace(settings.trace_dir) if settings.trace_dir else None
    told = asyncio.Event()
    memory = Memory(settings.home / "memory" / f"{settings.port}.sqlite")
    server = _Server(build(core, keys, fleet, trace, memory), told.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    announcing = asyncio.create_task(banner.announce(core, fleet))
    stopping = asyncio.create_task(told.wait())
    await asyncio.wait({serving, stopping, announcing}, return_when=asyncio.FIRST_COMPLETED)
    if announcing.done() and not announcing.result():  # no worker can start
        server.should_exit = True
        await serving
        return 1
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    await _drain(core, settings.drain_seconds, serving)
    server.should_exit = True
    await serving
    return 0


async def _drain(core: Core, seconds: float, serving: asyncio.Task[None]) -> None:
    """Take no new workflow; let the steps that run, and those that continue a workflow, end."""
    core.draining = True
    deadline = core.now() + seconds
    while core.attempts and core.now() < deadline and not serving.done():
        await asyncio.sleep(0.05)


class _Server(uvicorn.Server):
    """Uvicorn, but the first signal drains; the second ends at once."""

    def __init__(self, app: object, stop: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                access_log=False,
                proxy_headers=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                timeout_keep_alive=75,
                backlog=4096,
            )
        )
        self._stop, self._told = stop, False
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn on SIGINT and SIGTERM. It must not send the signal again: our own end comes after."""
        if self._told:
            self.should_exit = self.force_exit = True
        self._told = True
        self._loop.call_soon_threadsafe(self._stop)


def _listen(host: str, port: int) -> socket.socket:
    """Take the port first: a start that cannot serve should fail before it loads a model."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(info[0], socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it: without, every first token waits 40 ms for the client's delayed ACK.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client that reads nothing for so long is cut off by the kernel too, with what is buffered for it.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * SLOW_READER_SECONDS))
        listening.bind(info[4])
        listening.listen(4096)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listening


def _specs(settings: Settings, banner: Banner) -> list[EngineSpec]:
    """The workers to run, named so that a later start finds them again. Raises ConfigError on what cannot run."""
    engine.check_args(settings.vllm_args)
    build = engine.installed()
    if build is None and settings.address is None:
        raise ConfigError("vLLM is not installed here: `make setup`, or attach with --workers")
    gpus = engine.world_size(settings.vllm_args) if build != "cpu" else 0
    specs: list[EngineSpec] = []
    for text in settings.models or ("",):
        model, count = _replicas(text, settings.replicas)
        args, shown = settings.vllm_args, model
        env: tuple[tuple[str, str], ...] = ()
        if not model:
            banner.line("making the embedded model") if not embedded.folder(settings.home).exists() else None
            model, shown = str(embedded.ensure(settings.home)), embedded.NAME
            numbers = ("--dtype", embedded.dtype()) if build == "cpu" else ()
            args, env = (*embedded.VLLM_ARGS, *numbers, *args), (("HF_HUB_OFFLINE", "1"),)
        elif os.path.isdir(model):
            model = os.path.abspath(model)
        slug = _slug(shown, {spec.pool for spec in specs})
        tier = settings.host_tier
        specs += [EngineSpec(f"{slug}-{i}", slug, model, args, env, gpus, host_tier=tier) for i in range(count)]
    return specs


def _replicas(text: str, default: int) -> tuple[str, int]:
    model, equals, number = text.rpartition("=")
    if not equals:
        return text, default
    if not number.isdigit() or int(number) < 1:
        raise ConfigError(f"models: {text!r}: the number of replicas is not a positive number")
    return model, int(number)


def _slug(model: str, taken: set[str]) -> str:
    base = "".join(c if c.isalnum() or c in "-_." else "-" for c in model.rstrip("/").rpartition("/")[2]) or "model"
    slug, copy = base, 2
    while slug in taken:
        slug, copy = f"{base}-{copy}", copy + 1
    return slug


def _leave_users_directory(settings: Settings) -> None:
    """Ray puts the driver's directory on its workers' path: no folder there may shadow our packages."""
    neutral = settings.home / "empty"
    neutral.mkdir(parents=True, exist_ok=True)
    os.chdir(neutral)


def _cpu_share(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)
