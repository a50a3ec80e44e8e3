"""vLLM's own manager of the host tier with our policy, against vLLM's LRU and an audit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from vllm.v1.kv_offload.base import ReqContext
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvcache.joint import Joint
from kvcache.keeper import Keeper
from kvcache.ledger import HOST
from kvcache.plugin.host_policy import HostManager
from kvcache.policies import POLICIES

GROUP = bytes(4)
ROOM = 6


def key(owner: str, place: int) -> bytes:
    return f"{owner}{place:02d}".encode() + GROUP


class Tier:
    """A manager whose device holds nothing: what is told of the host alone."""

    def __init__(self, policy: str = "lru", attached: bool = True) -> None:
        self.now, self.keeper = 1000.0, Keeper(POLICIES[policy](), 1)
        self.manager = HostManager(
            num_chunks=ROOM, cache_policy="HostPolicy", cache_policy_module_path="kvcache.plugin.host_policy"
        )
        self.stock = CPUOffloadingManager(num_chunks=ROOM)
        self.requests: dict[str, Any] = {}
        self.flights: list[tuple[list[bytes], ReqContext]] = []
        self.count = 0
        if attached:
            self.manager.policy.attach(self.keeper, Joint(self.keeper, self, 4), self.requests.get, lambda: self.now)

    def block(self, name: Any) -> None:
        return None

    def name(self, number: int) -> None:
        return None

    def stored(self, name: Any) -> bool:
        return name in self.manager.policy.chunks

    def ready(self, name: Any) -> bool:
        return self.manager.policy.chunks[name].is_ready

    def depth(self, name: Any) -> int:
        return self.manager.policy.depths.get(name, 0)

    idle = 0

    @property
    def vacant(self) -> int:
        return self.manager.policy.vacant

    def context(self, owner: str, count: int) -> ReqContext:
        """That of a new request with so many blocks."""
        self.count += 1
        self.now += 1.0
        context = ReqContext(req_id=str(self.count))
        line = [key(owner, place) for place in range(count)]
        self.requests[context.req_id] = SimpleNamespace(
            session_id=f"{owner}.r", block_hashes=[one[:-4] for one in line]
        )
        for place, one in enumerate(line):
            context.set_offload_key_position(one, place + 1)
        return context


def played(manager: Any, tier: Tier, requests: list[tuple[str, int]]) -> list[set[bytes]]:
    """What the manager holds after each request, which stores all of its line and then ends."""
    held = []
    for owner, count in requests:
        context = tier.context(owner, count)
        manager.on_new_request(context)
        # Past what a full tier refuses: the order is compared, not what is let in.
        output = CPUOffloadingManager.prepare_store(manager, [key(owner, place) for place in range(count)], context)
        manager.complete_store(output.keys_to_store, context)
        manager.on_request_finished(context)
        held.append(set(manager._policy.chunks))
    return held


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 3)), max_size=30))
def test_without_our_scheduler_it_is_vllms_lru(requests: list[tuple[str, int]]) -> None:
    tier = Tier(attached=False)
    assert played(tier.manager, tier, requests) == played(tier.stock, Tier(attached=False), requests)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 3)), max_size=30))
def test_under_lru_what_the_device_does_not_hold_goes_as_in_vllms_lru(requests: list[tuple[str, int]]) -> None:
    tier = Tier()
    assert played(tier.manager, tier, requests) == played(tier.stock, Tier(attached=False), requests)


def test_a_chunk_is_its_requests_and_goes_with_its_owner() -> None:
    tier = Tier("belady")
    for owner in "ab":
        context = tier.context(owner, 3)
        tier.manager.on_new_request(context)
        stored = tier.manager.prepare_store([key(owner, place) for place in range(3)], context)
        tier.manager.complete_store(stored.keys_to_store, context)
    assert tier.keeper.held("a") == (0, 3)
    tier.keeper.released("a", tier.now)
    context = tier.context("c", 4)
    tier.manager.on_new_request(context)
    output = tier.manager.prepare_store([key("c", place) for place in range(4)], context)
    assert output.evicted_keys == [key("a", place) for place in (2, 1, 0)]
    assert output.keys_to_store == [key("c", place) for place in range(3)], "for the fourth somebody would lose one"
    assert tier.manager.refused == 1


def test_what_is_stored_while_the_rest_is_used_takes_its_place_among_the_rest() -> None:
    tier = Tier()
    context = tier.context("a", 3)
    tier.manager.on_new_request(context)
    head = tier.manager.prepare_store([key("a", 0), key("a", 1)], context)
    tier.manager.complete_store(head.keys_to_store, context)
    tail = tier.manager.prepare_store([key("a", 2)], context)
    tier.manager.on_request_finished(context)
    tier.manager.policy.settle()
    assert list(tier.keeper.host) == [key("a", 1), key("a", 0)]
    tier.manager.complete_store(tail.keys_to_store, context)
    tier.manager.policy.settle()
    assert list(tier.keeper.host) == [key("a", 2), key("a", 1), key("a", 0)]


def test_a_failure_of_the_ranking_leaves_vllms_lru() -> None:
    tier = Tier()
    requests = [("a", 3), ("b", 3), ("a", 3)]
    expected = played(tier.stock, Tier(attached=False), [*requests, ("c", 2), ("d", 3)])
    held = played(tier.manager, tier, requests)
    tier.manager.policy.joint.spare = lambda *_: 1 / 0  # type: ignore[method-assign, union-attr]
    assert held + played(tier.manager, tier, [("c", 2), ("d", 3)]) == expected
    assert tier.manager.policy.joint is None
    assert tier.keeper.held("a") == (0, 0)


class Failing:
    """What it stands for, of which the n-th call of all raises."""

    def __init__(self, real: Any, left: list[int]) -> None:
        self.__dict__.update(_real=real, _left=left)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name in ("ledger", "host", "device"):
            return Failing(found, self._left)
        return self._called(found) if callable(found) else found

    def _called(self, does: Any) -> Any:
        def called(*args: Any) -> Any:
            self._count()
            return does(*args)

        return called

    def _count(self) -> None:
        self._left[0] -= 1
        if self._left[0] == 0:
            raise RuntimeError("a fault")

    def __contains__(self, name: Any) -> bool:
        self._count()
        return name in self._real

    def __len__(self) -> int:
        return len(self._real)


def audit(manager: HostManager) -> None:
    """No chunk is lost, held twice, or counted wrong."""
    numbers = [chunk.chunk_id for chunk in manager.policy.chunks.values()]
    assert len(numbers) == len(set(numbers))
    assert not set(numbers) & set(manager._free_list)
    assert len(numbers) + len(manager._free_list) == manager._num_allocated_chunks <= ROOM
    evictable = {name for name, chunk in manager.policy.chunks.items() if chunk.ref_cnt == 0}
    assert evictable == manager.policy._evictable
    assert len(evictable) == manager._num_evictable_cache_chunks


def lived(tier: Tier, stored: list[tuple[str, int]]) -> None:
    """All that vLLM asks of its manager, again and again."""
    manager = tier.manager
    for turn, (owner, count) in enumerate(stored):
        names, context = [key(owner, place) for place in range(count)], tier.context(owner, count)
        manager.on_new_request(context)
        ready = [name for name in names if name in manager.policy.chunks]
        manager.touch(ready, context)
        manager.prepare_load(ready, context)
        audit(manager)
        output = manager.prepare_store(names, context)
        audit(manager)
        manager.complete_load(ready, context)
        if output is not None:
            manager.complete_store(output.keys_to_store, context, turn % 5 != 4)
        audit(manager)
        manager.on_request_finished(context)
        saving = ReqContext(req_id="save")
        manager.on_new_request(saving)
        moved = manager.move({key("m", turn): (tier.now, 1)}, sorted(manager.policy._evictable)[:1], saving)
        if moved is not None:
            manager.complete_store(moved.keys_to_store, saving)
        audit(manager)
        if turn == 7:
            manager.reset_cache()
            audit(manager)


@given(st.integers(1, 250), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4)), min_size=10, max_size=14))
@settings(max_examples=80, deadline=None)
def test_whatever_of_ours_fails_vllms_manager_goes_on_as_lru(at: int, stored: list[tuple[str, int]]) -> None:
    tier, left = Tier("belady"), [at]
    policy = tier.manager.policy
    policy._keeper = Failing(tier.keeper, left)
    policy.joint._keeper = Failing(tier.keeper, left)  # type: ignore[union-attr]
    lived(tier, stored)
    assert (policy.joint is None) == (left[0] <= 0)
    if policy.joint is None:
        # From here on it is told apart from vLLM's only by what it held before.
        context = tier.context("z", ROOM)
        tier.manager.on_new_request(context)
        output = tier.manager.prepare_store([key("z", place) for place in range(ROOM)], context)
        tier.manager.complete_store(output.keys_to_store, context)
        assert set(policy.chunks) == {key("z", place) for place in range(ROOM)}
        assert not policy._uses
        audit(tier.manager)


def test_what_is_saved_from_the_tail_on_goes_from_the_tail() -> None:
    tier = Tier("belady")
    context = tier.context("a", 3)
    tier.keeper.wrote("a", None, [key("a", place)[:-4] for place in range(3)], tier.now)
    tier.manager.on_new_request(context)
    coming = {key("a", place): (tier.now, place + 1) for place in (2, 1, 0)}
    tier.manager.complete_store(tier.manager.move(coming, [], context).keys_to_store, context)
    tier.manager.policy.settle()
    assert list(tier.keeper.host) == [key("a", 2), key("a", 1), key("a", 0)]


class HostMachine(RuleBasedStateMachine):
    """Stores and loads that end late, well or not, in any order, with resets between."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier("belady")
        self.stores: list[tuple[list[bytes], ReqContext]] = []
        self.loads: list[tuple[list[bytes], ReqContext]] = []

    @rule(owner=st.sampled_from("abcd"), count=st.integers(1, 4), ends=st.booleans())
    def store(self, owner: str, count: int, ends: bool) -> None:
        manager, context = self.tier.manager, self.tier.context(owner, count)
        manager.on_new_request(context)
        output = manager.prepare_store([key(owner, place) for place in range(count)], context)
        if output is not None and output.keys_to_store:
            self.stores.append((output.keys_to_store, context))
        if ends:
            manager.on_request_finished(context)

    @rule(which=st.integers(0, 9), well=st.booleans())
    def stored(self, which: int, well: bool) -> None:
        if self.stores:
            names, context = self.stores.pop(which % len(self.stores))
            self.tier.manager.complete_store(names, context, well)

    @rule(owner=st.sampled_from("abcd"))
    def load(self, owner: str) -> None:
        names = [name for place in range(4) if (name := key(owner, place)) in self.tier.manager.policy.chunks]
        if names and all(map(self.tier.ready, names)):
            context = self.tier.context(owner, 4)
            self.tier.manager.on_new_request(context)
            self.tier.manager.prepare_load(names, context)
            self.loads.append((names, context))

    @rule(which=st.integers(0, 9))
    def loaded(self, which: int) -> None:
        if self.loads:
            self.tier.manager.complete_load(*self.loads.pop(which % len(self.loads)))

    @rule(owner=st.sampled_from("abcd"))
    def released(self, owner: str) -> None:
        self.tier.keeper.released(owner, self.tier.now)

    @rule()
    def reset(self) -> None:
        self.tier.manager.reset_cache()
        self.stores.clear()
        self.loads.clear()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        manager, policy, keeper = self.tier.manager, self.tier.manager.policy, self.tier.keeper
        numbers = [chunk.chunk_id for chunk in policy.chunks.values()]
        assert len(numbers) == len(set(numbers))
        assert not set(numbers) & set(manager._free_list)
        assert len(numbers) + len(manager._free_list) == manager._num_allocated_chunks <= ROOM
        policy.settle()
        assert set(keeper.host) == policy._evictable
        assert len(policy._evictable) == manager._num_evictable_cache_chunks
        assert set(policy._uses) == set(policy.chunks) == set(policy.depths)
        assert all(keeper.ledger.copies(name[:-4], HOST) == 1 for name in policy.chunks)
        assert all(keeper.ledger.span(name[:-4]) is None for owner in "abcd" for place in range(4)
                   if (name := key(owner, place)) not in policy.chunks)  # fmt: skip
        assert set(policy.joint._copies) <= set(policy.chunks)  # type: ignore[union-attr]


TestHostMachine = HostMachine.TestCase
TestHostMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
