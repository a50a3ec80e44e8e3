"""What happened to each step of a workflow, and why, as lines for a person."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from server.config import ConfigError

SECONDS = 30.0


def fetched(url: str, workflow: str, api_key: str | None) -> dict[str, Any]:
    """`GET /v1/workflows/{id}`. Raises ConfigError that says what Weft answered."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not an http:// or https:// URL")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    asked = urllib.request.Request(f"{url.rstrip('/')}/v1/workflows/{quote(workflow, safe='')}", headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{workflow}: {_message(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{url}: {error}") from None


def explained(workflow: Mapping[str, Any]) -> str:
    """One line a step: when it came, what it waited for, where it went and why, what the cache had."""
    steps = workflow["steps"]
    first = steps[0]["arrived"] if steps else 0.0
    head = f"workflow {workflow['workflow']} of {workflow['tenant']}: {workflow['state']}, {len(steps)} steps"
    asked = [_asked(workflow["asked"], first)] if workflow["asked"] else []
    return "\n".join([head, *asked, *(_step(step, first) for step in steps)])


def _asked(asked: Mapping[str, Any], first: float) -> str:
    parts = []
    if asked["deadline"] is not None:
        due, chance = asked["deadline"] - first, asked["in_time_probability"]
        parts.append(f"to be done at +{due:.1f} s, {chance:.0%} likely when its latest step came")
    if asked["token_budget"] is not None:
        spent, budget, chance = asked["spent_tokens"], asked["token_budget"], asked["in_budget_probability"]
        parts.append(f"{spent} of {budget:.0f} tokens spent, {chance:.0%} likely to be enough")
    return "asked: " + "; ".join(parts)


def _step(step: Mapping[str, Any], first: float) -> str:
    came = f"+{step['arrived'] - first:8.1f} s  {step['session']}"
    if held := step["held"]:
        until = held["deadline"] - held["since"]
        return f"{came}  held at {held['worker']}: no room for {held['tokens']} tokens; at most {until:.0f} s in all"
    took = f"  first token after {step['first_token'] - step['arrived']:.2f} s" if step["first_token"] else ""
    prompt = step["prompt_tokens"]
    found = f"  {step['cached_tokens']} of {prompt} tokens found" if prompt else ""
    return f"{came}  {step['worker'] or '-'}: {step['decision'] or step['state']}{took}{found}"


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
