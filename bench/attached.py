"""A server that runs already and is measured as it is: `weft bench --url`."""

from __future__ import annotations

import secrets
from types import TracebackType
from typing import Any

import aiohttp

from bench.errors import BenchError
from bench.rivals.engines import LIMITS, Build, Engines, connector
from bench.workloads.runs import Workload
from server.probe import describe


class Attached(Engines):
    """One URL that somebody else runs: a vLLM server, a router, or Weft. It is neither started, sized nor emptied.

    `kv_tokens` are those of all that is behind it, None: what it says itself. Texts of earlier cells may lie in its
    caches, so each cell must be played with `afresh` runs. Raises BenchError where nothing answers or says its KV.
    """

    def __init__(self, url: str, kv_tokens: int | None, max_len: int) -> None:
        self.urls, self.max_len, self.count, self.asked = [url.rstrip("/")], max_len, 1, kv_tokens or 0
        self.model, self.costs, self.kv_tokens, self.key = "", None, self.asked, ""

    async def __aenter__(self) -> Attached:
        unlimited = aiohttp.ClientTimeout(total=None)
        self.http = aiohttp.ClientSession(connector=connector(), timeout=unlimited)
        try:
            described = await describe(self.http, self.urls[0], None)
            if isinstance(described, str):
                raise BenchError(f"nothing to measure: {described}")
            self.model = described.pool
            self.asked = self.kv_tokens = self.asked or described.kv_tokens or await self._behind()
            if not self.asked:
                raise BenchError(f"{self.urls[0]} does not say its KV tokens: give --kv-tokens")
        except BaseException:
            await self.http.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.close()

    @property
    def pids(self) -> list[int]:
        """They may run anywhere."""
        return []

    @property
    def limits(self) -> tuple[int, int]:
        """It does not say: vLLM's own on a large GPU."""
        budget, sequences = LIMITS.values()
        return budget, sequences

    async def fit(self, build: Build) -> None:
        """Its memory is as it is."""

    async def reset(self) -> None:
        """Its caches are as they are."""

    def about(self) -> dict[str, Any]:
        """What run.json tells of it; not where it is."""
        return {"model": self.model, "kv_tokens": self.asked}

    async def _behind(self) -> int:
        """The KV tokens of all workers behind Weft; 0 where it does not say."""
        try:
            async with self.http.get(self.urls[0] + "/v1/workers") as answer:
                rows = (await answer.json())["workers"] if answer.status == 200 else []
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
            return 0
        return sum(row["kv_tokens"] for row in rows if row["state"] == "up")


def afresh(workload: Workload) -> Workload:
    """The same runs with ids that were never played: nothing but shared pieces is found in a cache."""
    mark = secrets.token_hex(4)
    return Workload(workload.name, [run.again(f"@{mark}") for run in workload.runs], workload.left_out)
