"""Copies that no request asked for, with an engine of plain fakes: what is looked at, and what a failure leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.keeper import Keeper
from kvcache.ledger import HOST
from kvcache.plugin.host_moves import Prefetches
from kvcache.policies import POLICIES

GROUP = bytes(4)
HERE = 1000.0


class Engine:
    """A device with `room` for that many blocks of a prefetch, and a host that has all of one owner's line."""

    def __init__(self, room: int) -> None:
        self.room, self.looks, self.freed = room, 0, list[int]()
        self.num_gpu_blocks, self.blocks = 64, [SimpleNamespace(block_id=n, block_hash=None) for n in range(64)]
        self.cached_block_hash_to_block = SimpleNamespace(get_one_block=lambda _: None)
        self.keeper, self.manager, self.config = Keeper(POLICIES["belady"](), 1), self, SimpleNamespace(num_workers=1)
        self.policy = self
        self._chunks_being_loaded: set[bytes] = set()
        self._current_batch_allocated_block_ids: set[int] = set()
        self.keeper.wrote("a", None, [b"0", b"1"], HERE)
        for name in (b"0", b"1"):
            self.keeper.ledger.gained(name, HOST)
        joint: Any = SimpleNamespace(room=lambda *_: self.room)
        self.prefetches = Prefetches(self, self, self.keeper, joint, lambda: 0, lambda: None)

    def get(self, name: bytes) -> Any:
        self.looks += 1
        return SimpleNamespace(is_ready=True)

    def settle(self) -> None:
        pass

    def get_num_free_blocks(self) -> int:
        return 64

    def get_new_blocks(self, count: int) -> list[Any]:
        return self.blocks[:count]

    def free_blocks(self, blocks: Any) -> None:
        self.freed += [block.block_id for block in blocks]

    def on_new_request(self, context: Any) -> None:
        pass

    def prepare_load(self, names: list[bytes], context: Any) -> Any:
        return names

    def complete_load(self, names: list[bytes], context: Any) -> None:
        raise RuntimeError("a fault")

    def _generate_job_id(self) -> int:
        return 7


def engine(room: int) -> Engine:
    made = Engine(room)
    assert made.prefetches.wish("a", 30.0, HERE)
    made.looks = 0
    return made


def test_a_prefetch_that_has_no_room_is_dropped() -> None:
    made = engine(room=0)
    assert made.prefetches.start(HERE) == {}
    assert (len(made.prefetches), made.prefetches.dropped) == (0, 1)


def test_a_load_that_ends_badly_gives_its_blocks_back() -> None:
    made = engine(room=2)
    assert list(made.prefetches.start(HERE)) == [7]
    with pytest.raises(RuntimeError):
        made.prefetches.done(7, 1)
    assert sorted(made.freed) == [0, 1]
    assert not made._chunks_being_loaded
    assert 7 not in made.prefetches
