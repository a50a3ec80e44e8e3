"""Measures what an engine costs: the seven coefficients that vLLM Router's program scheduling wants of its user.

Prefill of x thousand tokens takes intercept + linear x + quadratic x² seconds; a decode step of B sequences with C
tokens of context in all takes fixed + request B + context C; while a prefill runs, decoding keeps the share `alpha` of
its speed. (The documentation of vLLM Router, "Offline calibration models".)
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from bench.rivals.chat import Exchange, request
from bench.rivals.engines import Engines
from bench.rivals.texts import Texts, calibrate, made

PREFILLS = (0.05, 0.2, 0.45, 0.7, 0.9)
"""Prompt lengths, as shares of the longest call."""

BATCHES = ((1, 0.05), (4, 0.05), (8, 0.05), (1, 0.8), (4, 0.4), (8, 0.25))
"""Sequences in a decode step, and the context of each as a share of the longest call."""

REPEATS = 2
STEPS = 32
ROOM = 8 * STEPS
"""Tokens of the longest call that an engine must take to be measured."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The coefficients, in seconds, thousands of prompt tokens and tokens of context."""

    intercept: float
    linear: float
    quadratic: float
    alpha: float
    fixed: float
    request: float
    context: float

    def config(self) -> dict[str, Any]:
        """As the router reads them."""
        return {
            "prefill_cost_model": {
                "intercept_seconds": self.intercept,
                "linear_seconds_per_1k_tokens": self.linear,
                "quadratic_seconds_per_1k_tokens_squared": self.quadratic,
                "decode_throughput_alpha": self.alpha,
            },
            "decode_throughput_model": {
                "fixed_step_seconds": self.fixed,
                "batch_step_seconds_per_request": self.request,
                "context_step_seconds_per_token": self.context,
            },
        }


async def measured(engines: Engines) -> Costs:
    """Measure them on the first engine, which must be idle; once for the life of `engines`."""
    known: Costs | None = engines.costs
    if known is None:
        bench = _Bench(engines, await calibrate(engines.http, engines.urls[0], engines.model, 0))
        prefills = [await bench.prefill(share) for share in PREFILLS for _ in range(REPEATS)]
        intercept, linear, quadratic = fit([[1, x, x * x] for x, _ in prefills], [seconds for _, seconds in prefills])
        steps = [await bench.decode(*batch) for batch in BATCHES]
        fixed, each, context = fit([[1, b, c] for b, c, _ in steps], [seconds for _, _, seconds in steps])
        alpha = await bench.interference()
        engines.costs = known = Costs(intercept, linear, quadratic, alpha, max(fixed, 1e-4), each, context)
    return known


def fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Least squares with no coefficient below 0, by relative error: the best over all choices of which are 0."""
    import numpy  # comes with vLLM

    size, best, least = len(rows[0]), [0.0] * len(rows[0]), math.inf
    weight = 1 / numpy.array(values)
    matrix = numpy.array(rows) * weight[:, None]
    for mask in range(1, 1 << size):
        free = [column for column in range(size) if mask >> column & 1]
        found = numpy.linalg.lstsq(matrix[:, free], numpy.ones(len(values)), rcond=None)[0]
        error = float(numpy.sum((matrix[:, free] @ found - 1) ** 2))
        if min(found) >= 0 and error < least - 1e-12:
            least = error
            best = [float(found[free.index(column)]) if column in free else 0.0 for column in range(size)]
    return best


class _Bench:
    """Calls to one idle engine. No two prompts share a prefix unless they are the same."""

    def __init__(self, engines: Engines, texts: Texts) -> None:
        self.engines, self.texts, self.count = engines, texts, 0
        self.longest = min(engines.max_len, engines.kv_tokens // 2) - 4 * STEPS

    async def prefill(self, share: float) -> tuple[float, float]:
        """Thousands of tokens of a prompt, and the seconds until its first token."""
        began = perf_counter()
        exchange = await self._call(self._prompt(share * self.longest), 1)
        return exchange.usage["prompt_tokens"] / 1000, exchange.times[0] - began

    async def decode(self, batch: int, share: float) -> tuple[int, float, float]:
        """Sequences, tokens of context in all, and seconds of a step in which all of them decode."""
        size = min(share * self.longest, 0.8 * self.engines.kv_tokens / batch - STEPS)
        prompts = [self._prompt(size) for _ in range(batch)]
        for prompt in prompts:
            await self._call(prompt, 1)
        done = await asyncio.gather(*(self._call(prompt, STEPS) for prompt in prompts))
        begin, end = max(e.times[0] for e in done), min(e.times[-1] for e in done)
        if end <= begin:
            raise RuntimeError("measuring the engine's costs: it never decoded all at once")
        steps = [(sum(begin < at <= end for at in e.times), e) for e in done]
        context = sum(e.usage["prompt_tokens"] for _, e in steps) + batch * STEPS / 2
        return batch, context, (end - begin) / max(1, max(count for count, _ in steps))

    async def interference(self) -> float:
        """The share of its speed that decoding keeps while a prefill runs."""
        prompt = self._prompt(0.05 * self.longest)
        alone = Exchange()
        decoding = asyncio.create_task(self._call(prompt, 4 * STEPS, alone))
        while len(alone.times) < STEPS and not decoding.done():
            await asyncio.sleep(0.005)
        began, pace = perf_counter(), (alone.times[-1] - alone.times[0]) / (len(alone.times) - 1)
        first = (await self._call(self._prompt(0.9 * self.longest), 1)).times[0]
        await decoding
        if alone.times[-1] < first:  # it had ended before: nothing can be said of its speed
            first = alone.times[-1]
        kept = sum(began < at <= first for at in alone.times) * pace / max(pace, first - began)
        return min(1.0, max(0.0, kept))

    def _prompt(self, tokens: float) -> list[dict[str, str]]:
        self.count += 1
        return [{"role": "user", "content": f"{self.count}\n" + made(f"cost {self.count}", tokens / self.texts.word)}]

    async def _call(self, messages: list[dict[str, str]], output: int, exchange: Exchange | None = None) -> Exchange:
        exchange = exchange or Exchange()
        body = request(self.engines.model, messages, output)
        await exchange.send(self.engines.http, self.engines.urls[0], body, {})
        if exchange.error or not exchange.times:
            raise RuntimeError(f"measuring the engine's costs: {exchange.error or 'no token came'}")
        return exchange
