"""Workers that Ray runs: one named, detached actor in a placement group of its own per worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
import structlog
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from server.config import ConfigError
from server.engine import EngineSpec
from server.fleet import Location
from server.local_ray import NAMESPACE
from server.worker import WorkerActor

log = structlog.get_logger("weft")

GROUP = "weft:"  # placement groups have no namespace
PLACE_SECONDS = 60.0
ANSWER_SECONDS = 10.0


class RayFleet:
    """Starts or adopts the workers that `specs` name, in the Ray cluster that this process has joined."""

    def __init__(self, specs: Sequence[EngineSpec], home: str, host: str | None, cpu_share: int) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._arguments = (home, host, cpu_share, len(specs))
        self._actors: dict[str, Any] = {}
        self.states: dict[str, str] = dict.fromkeys(self.specs, "placing")
        self.failed: dict[str, str] = {}

    def start(self, exclusive: bool, report: Callable[[str], None] = lambda _: None) -> None:
        """Adopt the workers that run as asked and start the rest. Blocks.

        In a Ray of our own (`exclusive`) workers that run otherwise are ended; in a shared cluster they may be
        another's. Raises ConfigError where one stands in the way, or where there is no room, naming what is missing.
        """
        for name in list_workers():
            actor = ray.get_actor(name, NAMESPACE)
            info = _info(actor) if name in self.specs else None
            if info and info["state"] in ("starting", "ready") and info["spec"] == self.specs[name]:
                self._actors[name] = actor
                report(f"adopted {name}")
            elif exclusive or (info and info["state"] in ("failed", "stopped")):
                end_workers([name])
            elif name in self.specs:
                why = "runs with other settings" if info else "does not answer"
                raise ConfigError(f"{name} is in this cluster and {why}; `weft down --address` ends it")
        missing = [spec for name, spec in self.specs.items() if name not in self._actors]
        end_workers([spec.name for spec in missing])  # what a killed start may have reserved
        _check_room(missing)
        try:
            for spec in missing:
                self._actors[spec.name] = self._start_one(spec)
        except BaseException:
            end_workers([spec.name for spec in missing])
            raise

    def _start_one(self, spec: EngineSpec) -> Any:
        group = _place(spec)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options = {
            "name": spec.name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_concurrency": 4,
            "num_cpus": spec.cpus,
            "num_gpus": spec.gpus,
            "scheduling_strategy": strategy,
        }
        return ray.remote(WorkerActor).options(**options).remote(spec, *self._arguments)

    async def locate(self, worker: str) -> Location | None:
        """Ask the actor where its server is; None while it starts, restarts or has failed."""
        try:
            info = await asyncio.wait_for(self._actors[worker].info.remote(), ANSWER_SECONDS)
        except ActorDiedError as error:  # for good: its node could not make it
            self.states[worker], self.failed[worker] = "failed", str(error)
            return None
        except (RayError, TimeoutError):
            self.states[worker] = "restarting"
            return None
        self.states[worker] = info["state"]
        if info["state"] == "failed":
            self.failed[worker] = _telling(info["log_tail"], info["log"])
        if info["state"] != "ready":
            return None
        return Location(info["url"], info["api_key"], info["incarnation"], info.get("note", ""))


def list_workers() -> list[str]:
    """The names of Weft's workers in the cluster."""
    return sorted(
        row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE
    )


def end_workers(names: Sequence[str]) -> None:
    """End workers: their servers first, gracefully and at the same time, then the actors and what they reserved."""
    actors = {}
    for name in names:
        with suppress(ValueError):
            actors[name] = ray.get_actor(name, NAMESPACE)
    stopping = [actor.stop.remote() for actor in actors.values()]
    if stopping:
        ray.wait(stopping, num_returns=len(stopping), timeout=40)
    for actor in actors.values():
        ray.kill(actor, no_restart=True)
    groups = {GROUP + name for name in names}
    for group_id, row in placement_group_table().items():
        if row["name"] in groups and row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
    _await_gone(list(actors))


def _await_gone(names: Sequence[str], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while set(names) & set(list_workers()) and time.monotonic() < deadline:
        time.sleep(0.1)


def _info(actor: Any) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = ray.get(actor.info.remote(), timeout=ANSWER_SECONDS)
    except RayError:
        return None
    return info


def _telling(tail: str, log_path: str) -> str:
    """The lines of a server's last words that say why it died."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line][-3:] or lines[-3:]
    return "\n".join([*(line[:300] for line in telling), f"(its log: {log_path})"])


def _bundle(spec: EngineSpec) -> dict[str, float]:
    return {"CPU": spec.cpus} | ({"GPU": spec.gpus} if spec.gpus else {})


def _check_room(specs: Sequence[EngineSpec]) -> None:
    total = ray.cluster_resources()
    for resource in ("GPU", "CPU"):
        needed = sum(_bundle(spec).get(resource, 0) for spec in specs)
        if needed > total.get(resource, 0):
            raise ConfigError(
                f"{len(specs)} workers need {needed:g} {resource}, the Ray cluster has {total.get(resource, 0):g}"
            )


def _place(spec: EngineSpec) -> PlacementGroup:
    """Reserve the worker's resources on one node. Raises ConfigError that names what is missing."""
    bundle = _bundle(spec)
    group = placement_group([bundle], name=GROUP + spec.name, lifetime="detached")
    if not group.wait(PLACE_SECONDS):
        free = ray.available_resources()
        remove_placement_group(group)
        needs = ", ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
        left = ", ".join(f"{free.get(resource, 0):g} {resource}" for resource in bundle)
        raise ConfigError(f"worker {spec.name} needs {needs} on one node; free in the Ray cluster: {left}")
    return group
