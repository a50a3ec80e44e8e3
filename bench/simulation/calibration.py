"""A worker's cost profile from what was measured of one, and profiles in files."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import orjson

from bench.errors import BenchError
from bench.rivals.costs import Costs
from bench.simulation.profile import PROFILES, Profile


def fitted(
    costs: Costs, *, name: str, kv_tokens: int, kv_bytes: int, block: int, budget: int, sequences: int
) -> Profile:
    """The profile of an engine whose costs were measured; what a call spends outside it is in their intercept.

    A prompt of x tokens takes ceil(x / budget) steps, whose fixed time the measured slope contains. No link: the engine
    has no host tier until one is measured.
    """
    return Profile(
        name,
        step=costs.fixed,
        decode=costs.request,
        context=costs.context,
        prefill=max(0.0, costs.linear / 1000 - costs.fixed / budget),
        attention=2 * costs.quadratic / 1e6,
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes,
        block=block,
        budget=budget,
        sequences=sequences,
        link=float("inf"),
        overhead=max(0.0, costs.intercept - costs.fixed),
    )


def document(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values."""
    return {k: v for k, v in asdict(profile).items() if v != float("inf")}


def load(name: str) -> Profile:
    """A profile by name, or from a JSON file: its fields, the same under "profile", or a run.json of `weft bench`,
    where the newest command that measured its engines counts. Raises BenchError for anything else.
    """
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.is_file():
        raise BenchError(f"no profile {name!r}: one of {', '.join(PROFILES)}, or a JSON file")
    try:
        found = orjson.loads(path.read_bytes())
        for command in found.get("commands", ()):
            found = command.get("engines", {}) if "profile" in command.get("engines", {}) else found
        found = found.get("profile", found)
        if wrong := [f.name for f in fields(Profile)[1:] if not isinstance(found.get(f.name, 0), int | float)]:
            raise ValueError(f"{', '.join(wrong)}: not a number")
        return Profile(**{"link": float("inf")} | {f.name: found[f.name] for f in fields(Profile) if f.name in found})
    except (ValueError, TypeError, AttributeError) as error:
        raise BenchError(f"{name} is no profile: {error}") from error
