"""What a vLLM server says of itself over HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kvcache.plugin.route import PATH
from server.core import Endpoint, bearer
from server.relay import LOST

TIMEOUT = aiohttp.ClientTimeout(total=5)

_CACHE_INFO = re.compile(rb"vllm:cache_config_info\{([^}]*)\}")
_LABEL = re.compile(rb'(block_size|num_gpu_blocks)="(\d+)"')


@dataclass(frozen=True, slots=True)
class Described:
    """A server that answers: its models, its vLLM, and its KV capacity in tokens (0 where it does not say).

    `abilities` are those that our plug-in tells of its engine; empty without it.
    """

    cards: tuple[dict[str, Any], ...]
    version: str
    kv_tokens: int
    abilities: dict[str, Any] = field(default_factory=dict)

    @property
    def pool(self) -> str:
        """The base model: adapters name it as their parent."""
        base = next((card for card in self.cards if not card.get("parent")), None)
        return str(base["id"]) if base else ""


async def describe(client: aiohttp.ClientSession, url: str, api_key: str | None) -> Described | str:
    """Ask a server what it serves; returns the reason where it does not answer as vLLM does."""
    headers = bearer(api_key)
    try:
        async with client.get(url + "/v1/models", headers=headers, timeout=TIMEOUT) as answer:
            if answer.status != 200:
                return f"{url}/v1/models answers {answer.status}"
            cards = tuple(card for card in (await answer.json())["data"] if isinstance(card, dict) and "id" in card)
        version = await _json(client, url + "/version", headers)
        async with client.get(url + "/metrics", headers=headers, timeout=TIMEOUT) as answer:
            kv_tokens = _capacity(await answer.read())
        abilities = await _abilities(client, url, headers)
    except (*LOST, ValueError, KeyError, TypeError) as error:
        return f"{url}: {error or type(error).__name__}"
    return Described(cards, str(version.get("version", "")), kv_tokens, abilities)


async def alive(client: aiohttp.ClientSession, endpoint: Endpoint) -> bool | None:
    """True where the engine is well, False where it is dead or refuses, None where it did not answer in time."""
    try:
        async with client.get(endpoint.url + "/health", timeout=TIMEOUT) as answer:
            return answer.status < 500
    except TimeoutError:
        return None
    except LOST:
        return False


async def _json(client: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    async with client.get(url, headers=headers, timeout=TIMEOUT) as answer:
        body = await answer.json(content_type=None) if answer.status == 200 else {}
        return body if isinstance(body, dict) else {}


async def _abilities(client: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Only an engine with our plug-in has the route."""
    asked = {"ask": "abilities"}
    async with client.post(url + PATH, json=asked, headers=headers, timeout=TIMEOUT) as answer:
        found = await answer.json(content_type=None) if answer.status == 200 else {}
        return found if isinstance(found, dict) and found.get("plugin") else {}


def _capacity(metrics: bytes) -> int:
    """Blocks times tokens per block, less the null block, over all data-parallel engines of the server."""
    total = 0
    for info in _CACHE_INFO.findall(metrics):
        labels = {name: int(number) for name, number in _LABEL.findall(info)}
        total += labels.get(b"block_size", 0) * max(0, labels.get(b"num_gpu_blocks", 0) - 1)
    return total
