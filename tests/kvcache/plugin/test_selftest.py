"""What the plug-in finds out about a vLLM that is not the one it was made for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import PriorityRequestQueue

from kvcache.plugin import engine, selftest
from kvcache.plugin.selftest import Seams, Tiers, failures, submits_first
from kvcache.plugin.versions import supported
from tests.kvcache.plugin.schedulers import Played


class NoFreeing:
    """A scheduler that frees blocks some other way."""

    schedule = AsyncScheduler.schedule
    reset_prefix_cache = AsyncScheduler.reset_prefix_cache
    add_request = AsyncScheduler.add_request
    _free_request = AsyncScheduler._free_request
    _is_blocked_waiting_status = AsyncScheduler._is_blocked_waiting_status


class OtherFreeing(AsyncScheduler):
    def _free_request_blocks(self, request: Any, fence: int) -> None:  # type: ignore[override]
        raise NotImplementedError


class OtherSteps(AsyncScheduler):
    def schedule(self, throttle_prefills: bool = False) -> Any:
        return super().schedule(throttle_prefills)


class OtherBlocks:
    def get_blocks(self) -> None:
        raise NotImplementedError


class LongerQueue(FreeKVCacheBlockQueue):
    def popright(self) -> None:
        raise NotImplementedError


class NoQueue:
    """A pool that is made some other way."""

    get_cached_block = BlockPool.get_cached_block


class LinkedPool(BlockPool):
    """One that follows the links of the list itself."""

    def get_new_blocks(self, num_blocks: int) -> Any:
        head = self.free_block_queue.fake_free_list_head
        assert head is not None
        return super().get_new_blocks(num_blocks)


class OtherPool(BlockPool):
    """One that puts blocks back in another way than its queue is asked."""

    def free_blocks(self, ordered_blocks: Any) -> None:
        super().free_blocks(ordered_blocks)
        if isinstance(self.free_block_queue, FreeKVCacheBlockQueue):
            self.free_block_queue.append(self.free_block_queue.popleft())


class OldRequest:
    """One without a session, as before vLLM 0.30."""

    def __init__(self, request_id: str, priority: int = 0, block_hasher: object = None) -> None:
        raise NotImplementedError


class PlainRequest:
    def __init__(self, request_id: str, session_id: str | None = None, block_hasher: object = None) -> None:
        raise NotImplementedError


class FixedQueue:
    add_request = PriorityRequestQueue.add_request
    __iter__ = PriorityRequestQueue.__iter__


class OtherConnector:
    """One that is asked for more than the request, as no version known is."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int, budget: int) -> None:
        raise NotImplementedError


class OtherScheduling:
    """One that keeps its transfers some other way."""

    def __init__(self) -> None:
        self.manager = None


class RequestTypes(Enum):
    ADD = 0


TIERS = Tiers.installed()
assert TIERS is not None
LACKS = [
    ("eviction", {"scheduler": NoFreeing}), ("eviction", {"scheduler": OtherFreeing}),
    ("eviction", {"coordinator": OtherBlocks}), ("eviction", {"free_queue": LongerQueue}),
    ("eviction", {"pool": LinkedPool}), ("eviction", {"pool": OtherPool}), ("eviction", {"pool": NoQueue}),
    ("order", {"waiting": FixedQueue}), ("order", {"request": PlainRequest}), ("session", {"request": OldRequest}),
    ("passing", {"scheduler": OtherSteps}),
    ("control", {"request_type": RequestTypes}), ("host_tier", {"tier": None}),
    ("host_tier", {"tier": replace(TIERS, connector=OtherConnector)}),
    ("host_tier", {"tier": replace(TIERS, scheduler=OtherScheduling)}),
    ("host_tier", {"tier": replace(TIERS, policy=object)}),
]  # fmt: skip


def lacking(**classes: Any) -> Callable[[], Seams]:
    return lambda: replace(Seams.installed(), **classes)


def test_this_vllm_has_it_all() -> None:
    assert failures() == {}


@pytest.mark.parametrize(("ability", "classes"), LACKS)
def test_what_one_seam_lacks_is_one_ability(ability: str, classes: dict[str, Any]) -> None:
    assert list(failures(lacking(**classes))) == [ability]


def test_a_vllm_that_has_moved_everything_is_left_alone() -> None:
    def gone() -> Seams:
        raise ImportError("no module named vllm.v1.core.block_pool")

    assert set(failures(gone)) == set(selftest.CHECKS)


@pytest.mark.parametrize(("ability", "classes"), LACKS)
def test_an_engine_does_without_what_it_lacks(
    ability: str, classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "failures", lambda: failures(lacking(**classes)))
    played = Played()
    able = played.scheduler.abilities
    assert {name for name in selftest.CHECKS if not able[name]} == {ability, "host_tier"}, "it has no connector"
    assert [why.partition(":")[0] for why in able["why"]] == [ability]
    for name in "ab":
        played.ask(name, [5] * 70, f"{name}.r")
    said = played.tell(1, ("weft.priority", {"owner": "a", "priority": 3}))
    assert said["counts"]["unsupported" if ability == "order" else "accepted"] == 1
    played.run(2)
    assert {name: len(tokens) for name, tokens in played.outputs.items()} == {"a": 4, "b": 4}
    assert played.pool.get_num_free_blocks() == 16


@pytest.mark.parametrize(("version", "yes"), [
    ("0.32.0", True), ("0.33.0", True), ("0.33.1.dev3+gabc", True), ("0.31.2", False), ("0.34.0", False),
    ("0.24.1", False), ("1.0.0", False), ("dev", False),
])  # fmt: skip
def test_the_versions_it_was_made_for(version: str, yes: bool) -> None:
    assert supported(version) is yes


class CopiesLater(OffloadingConnectorWorker):
    """One that waits for what it has not begun to copy."""

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.worker.wait(kv_connector_metadata.jobs_to_flush)  # type: ignore[union-attr]


def test_what_a_step_takes_can_be_copied_before_it_begins_where_the_worker_does_so() -> None:
    assert submits_first()
    assert not submits_first(CopiesLater)
    assert not submits_first(object)


def test_it_prints_what_it_finds() -> None:
    command = [sys.executable, "-m", "kvcache.plugin.selftest"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(said[said.index("{\n") :])
    assert found["supported"]
    assert all(found[name] for name in selftest.CHECKS)
