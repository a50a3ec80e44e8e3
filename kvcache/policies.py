"""The eviction policies by name."""

from __future__ import annotations

from kvcache.belady import Belady
from kvcache.kvflow import KVFlow
from kvcache.policy import Policy
from kvcache.retention import Retention
from kvcache.saga import Saga

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Policy, Saga, KVFlow, Belady, Retention)}
