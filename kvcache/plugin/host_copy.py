"""The host tier's memory: vLLM's own on CUDA and XPU, host tensors and plain copies on the CPU platform.

On the CPU a transfer counts as done after its bytes over the speed of the link, so that what a transfer costs is real
there, too. Loads and stores are separate directions of the link, each with its transfers one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvcache.plugin.host_policy import HostManager

LOAD, STORE = range(2)


@dataclass(slots=True)
class _Transfer:
    """Blocks and chunks to copy, as row numbers, and when it is done and how long it takes, in seconds."""

    job: int
    way: int
    parts: list[tuple[CanonicalKVCacheRef, torch.Tensor, torch.Tensor]]
    size: int
    until: float
    took: float


class HostCopyWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies of KV blocks between an engine's tensors and `chunks` of host memory.

    `link` is the speed in bytes a second, 0: as fast as it copies. The bytes move when a transfer is done, not before,
    so that whoever reads or writes too early does so here as on a GPU.
    """

    def __init__(
        self, caches: CanonicalKVCaches, chunks: int, link: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.device = [one.tensor for one in caches.tensors]
        self.host = [torch.zeros((chunks, one.page_size_bytes), dtype=torch.int8) for one in caches.tensors]
        self._groups = caches.group_data_refs
        self._link, self._clock = link, clock
        self._free_at = [0.0, 0.0]
        self._transfers: dict[int, _Transfer] = {}
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy device blocks to chunks."""
        return self._submit(job_id, src_spec, dst_spec, STORE)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        """Copy chunks to device blocks."""
        return self._submit(job_id, dst_spec, src_spec, LOAD)

    def get_finished(self) -> list[TransferResult]:
        """The transfers that are done, once each."""
        now = self._clock()
        for job in [job for job, one in self._transfers.items() if one.until <= now]:
            self._copy(self._transfers.pop(job))
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Block until these transfers are done."""
        for job in [job for job in self._transfers if job in job_ids]:
            transfer = self._transfers.pop(job)
            if (left := transfer.until - self._clock()) > 0:
                time.sleep(left)
            self._copy(transfer)

    def _submit(self, job: int, device: Any, host: Any, way: int) -> bool:
        numbers = torch.from_numpy(device.block_ids.astype("int64"))
        chunks = torch.from_numpy(host.block_ids.astype("int64"))
        parts, size, start = [], 0, 0
        for refs, count in zip(self._groups, device.group_sizes, strict=True):
            mine = slice(start, start + count)
            start += count
            parts += [(ref, numbers[mine], chunks[mine]) for ref in refs]
            size += count * sum(ref.page_size_bytes for ref in refs)
        took = size / self._link if self._link else 0.0
        self._free_at[way] = until = max(self._clock(), self._free_at[way]) + took
        self._transfers[job] = _Transfer(job, way, parts, size, until, took)
        return True

    def _copy(self, transfer: _Transfer) -> None:
        began = self._clock()
        for ref, numbers, chunks in transfer.parts:
            device, host, size = self.device[ref.tensor_idx], self.host[ref.tensor_idx], ref.page_size_bytes
            if transfer.way == STORE:
                host[chunks, :size] = device[numbers, :size]
            else:
                device[numbers, :size] = host[chunks, :size]
        took = max(transfer.took, self._clock() - began, 1e-9)
        result = TransferResult(transfer.job, success=True, transfer_size=transfer.size, transfer_time=took)
        self._done.append(result)


class HostTierSpec(CPUOffloadingSpec):  # type: ignore[misc]
    """vLLM's host tier, ranked with the device's blocks; `link_gbps` in the extra configuration, for the CPU alone.

    ValueError where a chunk is not one block: a chunk of several would be lost whole for its least block.
    """

    _manager: OffloadingManager | None
    _worker: OffloadingWorker | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.blocks_per_chunk != 1:
            raise ValueError("Weft's host tier keeps single blocks: leave blocks_per_chunk and block_size out")
        self.eviction_policy, self.cache_policy_module_path = "HostPolicy", "kvcache.plugin.host_policy"

    def get_manager(self) -> OffloadingManager:
        """The scheduler's side."""
        if self._manager is None:
            self._manager = HostManager(
                num_chunks=self.num_chunks,
                cache_policy=self.eviction_policy,
                cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events,
            )
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker's side."""
        if current_platform.is_cuda_alike() or current_platform.is_xpu():
            return super().get_worker(kv_caches)
        if self._worker is None:
            link = float(self.extra_config.get("link_gbps", 0)) * 1e9
            self._worker = HostCopyWorker(kv_caches, self.num_chunks, link)
        return self._worker
