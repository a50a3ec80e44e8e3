"""The copies of the CPU platform, on tensors of this process and a clock of the test."""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kvcache.plugin.host_copy import HostCopyWorker

PAGE = 16


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def worker(clock: Clock, link: float = 0.0, tensors: int = 2, groups: int = 1) -> HostCopyWorker:
    """Every tensor holds each block's number; each group has its share of the tensors."""
    rows = torch.arange(8, dtype=torch.int8).repeat_interleave(PAGE).view(8, PAGE)
    caches = CanonicalKVCaches(
        [CanonicalKVCacheTensor(rows.clone(), PAGE) for _ in range(tensors)],
        [[CanonicalKVCacheRef(one, PAGE) for one in range(tensors) if one % groups == g] for g in range(groups)],
    )
    return HostCopyWorker(caches, 4, link, clock)


def device(*blocks: int) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(list(blocks), [len(blocks)], [0])


def test_what_is_stored_is_loaded_again_in_all_tensors() -> None:
    copier = worker(Clock())
    copier.submit_store(1, device(3, 5), CPULoadStoreSpec([0, 2]))
    assert [(one.job_id, one.success, one.transfer_size) for one in copier.get_finished()] == [(1, True, 4 * PAGE)]
    copier.submit_load(2, CPULoadStoreSpec([2, 0]), device(6, 7))
    assert [one.job_id for one in copier.get_finished()] == [2]
    for tensor in copier.device:
        assert tensor[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 5, 3]
    assert copier.get_finished() == []


def test_a_transfer_is_done_after_its_bytes_over_the_link_and_not_visible_before() -> None:
    clock = Clock()
    copier = worker(clock, link=64.0)
    copier.submit_store(1, device(3), CPULoadStoreSpec([0]))
    clock.now = 0.4
    assert copier.get_finished() == []
    assert not copier.host[0].any()
    clock.now = 0.5
    assert [(one.job_id, one.transfer_time) for one in copier.get_finished()] == [(1, 0.5)]
    assert copier.host[0][0].tolist() == [3] * PAGE


def test_loads_queue_behind_loads_but_not_behind_stores() -> None:
    clock = Clock()
    copier = worker(clock, link=64.0)
    copier.submit_store(1, device(3), CPULoadStoreSpec([0]))
    copier.submit_load(2, CPULoadStoreSpec([1]), device(4))
    copier.submit_load(3, CPULoadStoreSpec([2]), device(5))
    clock.now = 0.6
    assert {one.job_id for one in copier.get_finished()} == {1, 2}
    clock.now = 1.0
    assert [(one.job_id, one.transfer_time) for one in copier.get_finished()] == [(3, 0.5)]


def test_who_waits_for_a_transfer_finds_it_done() -> None:
    clock = Clock()
    copier = worker(clock)
    copier.submit_store(1, device(3), CPULoadStoreSpec([0]))
    copier.submit_store(2, device(4), CPULoadStoreSpec([1]))
    copier.wait({1, 7})
    assert copier.host[0][:, 0].tolist() == [3, 0, 0, 0]
    assert {one.job_id for one in copier.get_finished()} == {1, 2}


def test_each_group_of_kv_has_its_own_blocks() -> None:
    copier = worker(Clock(), tensors=2, groups=2)
    copier.submit_store(1, GPULoadStoreSpec([3, 4], [1, 1], [0, 0]), CPULoadStoreSpec([0, 0]))
    copier.get_finished()
    assert [tensor[0, 0].item() for tensor in copier.host] == [3, 4]
