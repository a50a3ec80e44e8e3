"""What names a block: the tokens up to its end, and all else that its KV depends on, by vLLM's own hashing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request

from kvcache.ledger import ANONYMOUS
from kvcache.plugin.groups import Group
from kvcache.plugin.owners import owners_of

BLOCK = 4


def request(tokens: list[int], **more: Any) -> Request:
    init_none_hash(sha256)
    return Request("1", tokens, SamplingParams(), None, block_hasher=get_request_block_hasher(BLOCK, sha256), **more)


def picture(name: str) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=BLOCK, length=BLOCK)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=place, mm_hash=name)


def keys(**more: Any) -> list[Any]:
    found = Group(0, BLOCK, True).prompt(request(list(range(3 * BLOCK + 1)), **more))
    assert found is not None
    assert len(found) == 3
    return found


def test_the_same_prompt_has_the_same_keys_under_any_owner() -> None:
    assert keys(session_id="a.r") == keys(session_id="b.s")


@pytest.mark.parametrize(("more", "other", "same"), [
    ({"lora_request": LoRARequest("one", 1, "/one")}, {"lora_request": LoRARequest("two", 2, "/two")}, 0),
    ({"lora_request": LoRARequest("one", 1, "/one")}, {}, 0),
    ({"cache_salt": "tenant one"}, {"cache_salt": "tenant two"}, 0),
    ({"mm_features": [picture("a cat")]}, {"mm_features": [picture("a dog")]}, 1),
    ({"mm_features": [picture("a cat")]}, {}, 1),
])  # fmt: skip
def test_adapters_salts_and_pictures_are_in_the_keys_from_where_they_matter(
    more: dict[str, Any], other: dict[str, Any], same: int
) -> None:
    one, two = keys(**more), keys(**other)
    assert one == keys(**more)
    assert [mine == its for mine, its in zip(one, two, strict=True)] == [True] * same + [False] * (3 - same)


def test_a_line_ends_at_the_first_block_without_a_hash() -> None:
    found = [make_block_hash_with_group_id(key, 3) for key in keys()]  # type: ignore[arg-type]
    blocks = [SimpleNamespace(block_hash=one) for one in [*found[:2], None, found[2]]]
    assert Group(1, BLOCK, True).line([[], blocks]) == keys()[:2]  # type: ignore[arg-type]


def test_where_blocks_are_not_hashed_one_by_one_nobody_knows_a_prompts_blocks() -> None:
    assert Group(0, 2 * BLOCK, False).prompt(request(list(range(20)))) is None


@pytest.mark.parametrize(("session", "extra", "owners"), [
    ("b.r", None, ("b", "r")), ("b", None, ("b", None)), ("b.r.x", None, ("b", "r.x")), ("", None, (ANONYMOUS, None)),
    (None, None, (ANONYMOUS, None)), (".r", None, (ANONYMOUS, "r")), (None, {"session_id": "b.r"}, ("b", "r")),
    ("b.r", {"session_id": "c.s"}, ("b", "r")), (None, {"session_id": 7}, (ANONYMOUS, None)),
])  # fmt: skip
def test_a_request_runs_on_the_account_of_its_branch_and_role(
    session: str | None, extra: dict[str, Any] | None, owners: tuple[str, str | None]
) -> None:
    one = SimpleNamespace(session_id=session, sampling_params=SimpleNamespace(extra_args=extra))
    assert owners_of(one) == owners  # type: ignore[arg-type]
