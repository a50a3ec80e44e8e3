"""vLLM engines that are measured: started, sized, emptied and ended by the harness, on loopback.

On the CPU build each engine is pinned to a core (`bench.rivals.isolation`); with GPUs each has its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from bench.errors import BenchError
from bench.rivals.chat import Exchange, request
from bench.rivals.isolation import Isolation
from bench.rivals.process import Process, environment
from bench.rivals.texts import made
from bench.workloads.runs import Piece, Workload
from server import embedded
from server.config import Settings
from server.core import bearer
from server.engine import GIB, free_port, installed, plugin_args
from server.probe import describe

HOST = "127.0.0.1"
BLOCK = 32
CHARACTERS_A_TOKEN = 2.0  # fewer than a text of any kind has, by the embedded tokenizer
FRAME = 8  # tokens that a chat template and our mark may add to a piece
START_SECONDS = 300.0
RESET_SECONDS = 60.0
KEPT_SECONDS = 2.0  # an idle connection; uvicorn closes it after 5
HOME: Path = Settings.model_fields["home"].default
CPU_ARGS = ("--enforce-eager", "--max-num-seqs", "16", "--max-num-batched-tokens", "1024")
LIMITS = {"--max-num-batched-tokens": 8192, "--max-num-seqs": 1024}
CPU_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip

_COUNTERS = ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens")


@dataclass(frozen=True, slots=True)
class Build:
    """How engines are to be: `kv_tokens` each, a host tier of `tier` times as much, and stock vLLM, or our plug-in with
    an eviction `policy`. Under stock vLLM a tier is its own offloading connector, with LRU."""

    kv_tokens: int
    tier: float = 0.0
    policy: str | None = None


class Engines:
    """`count` engines of one model. Used as an async context manager, in the event loop that plays on them.

    `asked` KV tokens per engine are what the load is reckoned with; `kv_tokens` is what each has now, as vLLM says.
    `model`: a path or name, None for the embedded one. `max_len` tokens may a call have. `args` are more vLLM flags;
    each engine takes `gpus` GPUs where vLLM's build has any. `link_gbps`: the speed of the link to a host tier that the
    CPU backend pretends to have, in GB/s; 0: as fast as it copies. Logs go to `folder`.
    """

    block = BLOCK

    def __init__(
        self, count: int, kv_tokens: int, folder: Path, *, model: str | None = None, max_len: int = 4096,
        args: Sequence[str] = (), gpus: int = 1, home: Path = HOME, link_gbps: float = 0.0,
    ) -> None:  # fmt: skip
        if kv_tokens < max_len:
            raise BenchError(f"an engine of {kv_tokens} KV tokens cannot take calls of {max_len} tokens")
        if (build := installed()) is None:
            raise BenchError("vLLM is not installed here: `make setup`")
        self.count, self.asked, self.max_len, self.args, self.gpus = count, kv_tokens, max_len, tuple(args), gpus
        self._folder, self._home, self._cpu = folder, home, build == "cpu"
        self._source = str(Path(model).absolute()) if model and Path(model).is_dir() else model
        self._processes: list[Process] = []
        self._isolation = Isolation(count) if self._cpu else None
        self._link_gbps = link_gbps
        self._started = 0
        self._given: Build | None = None
        self.key = secrets.token_urlsafe(24)
        self.urls: list[str] = []
        self.kv_tokens = 0
        self.model = ""
        self.costs: Any = None
        """What `bench.rivals.costs` measured here, None before."""

    async def __aenter__(self) -> Engines:
        unlimited = aiohttp.ClientTimeout(total=None)
        self.http = aiohttp.ClientSession(connector=connector(), timeout=unlimited, headers=bearer(self.key))
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / ".gitignore").write_text("*\n")
        try:
            await self._start(Build(self.asked))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()
        if self._isolation:
            self._isolation.release()
        await self.http.close()

    async def fit(self, build: Build) -> None:
        """Have the engines so; restarts them where they are not, or where one has died."""
        if build != self._given or not all(process.alive for process in self._processes):
            await self._stop()
            await self._start(build)

    async def reset(self) -> None:
        """Empty the prefix caches. Raises RuntimeError where an engine refuses, as it does while calls run."""
        for url in self.urls:
            deadline = time.monotonic() + RESET_SECONDS
            while not await self._emptied(url):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{url} does not reset its prefix cache")
                await asyncio.sleep(0.2)

    async def counters(self) -> dict[str, float]:
        """vLLM's own counters since the engines started, summed over them."""
        found = dict.fromkeys(_COUNTERS, 0.0)
        for url in self.urls:
            async with self.http.get(url + "/metrics") as answer:
                text = await answer.text()
            for name in _COUNTERS:
                values = re.findall(rf"^vllm:{name}_total\{{[^}}]*\}} (\S+)$", text, re.M)
                found[name] += sum(map(float, values))
        return found

    def about(self) -> dict[str, Any]:
        """What run.json tells of them."""
        gpus = [f"{self.gpus} GPU(s) for each engine"]
        return {
            "model": Path(self._source).name if self._source else embedded.NAME,
            "engines": self.count,
            "kv_tokens": self.asked,
            "block": BLOCK,
            "max_len": self.max_len,
            "flags": self._flags(Build(self.asked)),
            "link_gbps": self._link_gbps,
            "isolation": list(self._isolation.said) if self._isolation else gpus,
        }

    @property
    def pids(self) -> list[int]:
        """The API servers' processes."""
        return [process.pid for process in self._processes]

    @property
    def limits(self) -> tuple[int, int]:
        """The engines' max_num_batched_tokens and max_num_seqs: as flags say, else as vLLM sets them on a large GPU."""
        flags = self._flags(Build(self.asked))
        given = {name: int(value) for name, value in itertools.pairwise(flags) if name in LIMITS}
        budget, sequences = (given.get(name, value) for name, value in LIMITS.items())
        return budget, sequences

    async def _start(self, build: Build) -> None:
        model = self._source or str(await asyncio.to_thread(embedded.ensure, self._home))
        if self._isolation:
            self._isolation.release()
        self._started += 1
        ports: list[int] = []
        while len(ports) < self.count:
            if (port := free_port(HOST)) not in ports:
                ports.append(port)
        self.urls = [f"http://{HOST}:{port}" for port in ports]
        for index, port in enumerate(ports):
            log = self._folder / f"engine-{index}.{self._started}.log"
            command = [*_server(self._cpu, model), "--host", HOST, "--port", str(port), *self._flags(build, model)]
            self._processes.append(Process(command, log, self._environment(index, model), cwd=log.parent))
        await asyncio.gather(*map(self._ready, self._processes, self.urls))
        if self._isolation:
            for index, process in enumerate(self._processes):
                self._isolation.isolate(process.pid, index)
            self._isolation.confine()
        await self._describe()
        await asyncio.gather(*map(self._warm_up, self.urls))
        self._given = build

    async def _stop(self) -> None:
        self._given = None
        await asyncio.gather(*(process.stop() for process in self._processes))
        self._processes.clear()

    def _flags(self, build: Build, model: str = "") -> list[str]:
        flags = ["--served-model-name", embedded.NAME] if self._source is None else []
        flags += ["--block-size", str(BLOCK), "--max-model-len", str(self.max_len)]
        flags += ["--num-gpu-blocks-override", str(build.kv_tokens // BLOCK + 1)]  # one block is vLLM's null block
        flags += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        numbers = embedded.dtype() if self._cpu else "auto"
        flags += ["--dtype", numbers]
        flags += [*(CPU_ARGS if self._cpu else ("--tensor-parallel-size", str(self.gpus))), *self.args]
        gib = build.tier * build.kv_tokens * kv_bytes(model, numbers) / GIB if build.tier else 0.0
        if build.policy is not None:
            flags += ["--middleware", "kvcache.plugin.guard.RequireKey", *plugin_args(self.args, gib, self._link_gbps)]
            flags += ["--additional-config", json.dumps({"weft_policy": build.policy})]
        elif gib:
            flags += stock_tier_args(gib, self._link_gbps)
        return flags

    def _environment(self, index: int, model: str) -> dict[str, str]:
        env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env["VLLM_API_KEY"] = self.key
        if Path(model).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
        own = range(index * self.gpus, (index + 1) * self.gpus)
        return environment(**env, **(CPU_ENV if self._cpu else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}))

    async def _ready(self, process: Process, url: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not await _answers(self.http, url + "/health"):
            if not process.alive or time.monotonic() > deadline:
                raise RuntimeError(f"an engine did not start, see {process.log}: {process.tail()}")
            await asyncio.sleep(0.25)

    async def _describe(self) -> None:
        for url in self.urls:
            described = await describe(self.http, url, self.key)
            if isinstance(described, str):
                raise RuntimeError(described)
            self.model, self.kv_tokens = described.pool, described.kv_tokens

    async def _warm_up(self, url: str) -> None:
        """The first calls of an engine are slow."""
        for size in (16, self.max_len // 8):
            exchange = Exchange()
            body = request(self.model, [{"role": "user", "content": made(f"warm up {size}", size)}], 8)
            await exchange.send(self.http, url, body, {})
            if exchange.error:
                raise RuntimeError(f"{url}: {exchange.error}")

    async def _emptied(self, url: str) -> bool:
        external = self._given is not None and self._given.tier > 0
        async with self.http.post(url + "/reset_prefix_cache" + "?reset_external=true" * external) as answer:
            said = await answer.read()
            return answer.status == 200 and b"false" not in said


def connector() -> aiohttp.TCPConnector:
    """Connections without limit, which we close before a server does: it would do so just when a call is sent."""
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS)


def kv_bytes(model: str, numbers: str = "auto") -> int:
    """Bytes of KV for each token of a model, of four bytes a number in float32, else of two."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * (4 if numbers == "float32" else 2))


def stock_tier_args(gib: float, link_gbps: float) -> list[str]:
    """vLLM's own offloading with its own LRU; on the CPU backend, for which it has no worker, our copying one."""
    extra = {
        "spec_name": "HostTierSpec", "spec_module_path": "kvcache.plugin.host_copy", "cpu_bytes_to_use": int(gib * GIB),
        "offload_prompt_only": False, "link_gbps": link_gbps,
    }  # fmt: skip
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ["--kv-transfer-config", json.dumps(config)]


def length_for(workload: Workload) -> int:
    """A `max_len` that fits every call of a workload, with room: how long its pieces say they are may be a guess."""
    ends: dict[Piece | None, float] = {None: 0.0}
    longest = 0.0
    for call in (call for run in workload.runs for call in run.calls):
        for piece in call.prompt.path():
            if piece not in ends:
                own = max(piece.tokens * 1.05, len(piece.text or "") / CHARACTERS_A_TOKEN)
                ends[piece] = ends[piece.parent] + own + FRAME
        longest = max(longest, ends[call.prompt] + call.output)
    return -(-int(longest + 2 * FRAME) // BLOCK) * BLOCK


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _server(cpu: bool, model: str) -> list[str]:
    """The command that starts vLLM. The CPU wheel's `vllm serve` looks for a distribution that it does not find."""
    python = [sys.executable, "-P", "-m"]
    if cpu:
        return [*python, "vllm.entrypoints.openai.api_server", "--model", model]
    return [*python, "vllm.entrypoints.cli.main", "serve", model]
