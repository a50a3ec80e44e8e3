"""Agent frameworks, unmodified: they send no identity, and yet Weft sees the workflow, its agents and who follows whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from server.embedded import NAME
from tests.engine.conftest import Served, wait_for

FOLDER = Path(__file__).parent / "frameworks"
DRIVERS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "script"))
PYTHON = Path(sys.prefix) / "frameworks" / "bin" / "python"
TOOL_SECONDS = 0.15  # what each tool of a driver takes, at least
BUSY_SECONDS = 0.05  # by which a busy front notes the end of an answer later than the client has it


def start(served: Served, driver: str, *task: str) -> subprocess.Popen[str]:
    assert PYTHON.exists(), "the frameworks are not installed: run `make frameworks`"
    return subprocess.Popen(
        [PYTHON, FOLDER / f"{driver}.py", served.url, NAME, *task],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=served.home,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def truth(run: subprocess.Popen[str]) -> dict:
    """What the framework says of its run."""
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    return json.loads(out)


def known(served: Served) -> set[str]:
    return {row["workflow"] for row in served.get("/v1/workflows?limit=1000")["workflows"]}


def seen(served: Served, workflow: str) -> dict:
    """What Weft says of a workflow, once all its steps have ended."""
    wait_for(lambda: all(step["finished"] for step in served.get(f"/v1/workflows/{workflow}")["steps"]))
    return served.get(f"/v1/workflows/{workflow}")


def lines(workflow: dict) -> dict[str, list[list[str]]]:
    """For each session the tools that each of its answers called."""
    found: dict[str, list[list[str]]] = {session["id"]: [] for session in workflow["sessions"]}
    for step in sorted(workflow["steps"], key=lambda step: step["arrived"]):
        found[step["session"]].append(step["tools"])
    return found


def agree(workflow: dict, told: dict) -> None:
    """Assert that Weft has seen what the framework tells."""
    steps = {session["id"]: [] for session in workflow["sessions"]}
    for step in sorted(workflow["steps"], key=lambda step: step["arrived"]):
        steps[step["session"]].append(step)
    calls = lines(workflow)
    assert sorted(calls.values()) == sorted(row["calls"] for row in told["agents"])
    roles = {step["role"] for step in workflow["steps"]}
    assert None not in roles
    assert len(roles) == len({row["agent"] for row in told["agents"]})
    for line in steps.values():
        for earlier, later in pairwise(line):
            assert earlier["id"] in later["after"]
            assert later["gap_seconds"] >= (TOOL_SECONDS - BUSY_SECONDS) * bool(earlier["tools"])

    def of(agent: str) -> list[str]:
        """An agent's sessions; agents that did the same look alike."""
        did = [row["calls"] for row in told["agents"] if row["agent"] == agent]
        return [session for session in steps if calls[session] in did]

    def follow(giver: str, taker: str) -> list[tuple[str, str]]:
        return [
            (one["id"], other["id"]) for other in steps[taker] for one in steps[giver] if one["id"] in other["after"]
        ]

    for giver, taker in told["handed"]:
        (one,), (other,) = of(giver), of(taker)
        edges = follow(one, other)
        assert edges
        if [taker, giver] not in told["handed"]:
            assert (steps[one][-1]["id"], steps[other][0]["id"]) in edges
    parents = {session["id"]: session["parent"] for session in workflow["sessions"]}
    for boss, helper in told["delegated"]:
        (one,) = of(boss)
        for other in of(helper):
            assert parents[other] == one
            assert any(steps[other][-1]["id"] in step["after"] for step in steps[one])


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_run_is_one_workflow_with_a_session_for_each_agent(served: Served, driver: str) -> None:
    before = known(served)
    told = truth(start(served, driver))
    (workflow,) = known(served) - before
    agree(seen(served, workflow), told)


def together(served: Served, driver: str, *tasks: str) -> None:
    """Run a program at once for each task; each run is one workflow of its own."""
    before = known(served)
    told = [truth(run) for run in [start(served, driver, task) for task in tasks]]
    seen_now = [seen(served, workflow) for workflow in known(served) - before]
    assert len(seen_now) == len(tasks)
    for run in told:
        calls = sorted(row["calls"] for row in run["agents"])
        agree(next(one for one in seen_now if sorted(lines(one).values()) == calls), run)


@pytest.mark.parametrize("driver", DRIVERS)
def test_two_runs_of_one_program_at_once_stay_apart(served: Served, driver: str) -> None:
    together(served, driver, "Begin in the north.", "Begin in the south.")


@pytest.mark.parametrize("driver", ["langgraph_react", "mini_swe", "openai_handoff"])
def test_two_runs_with_the_same_task_at_once_stay_apart(served: Served, driver: str) -> None:
    """Only the ids of their tool calls tell them apart."""
    together(served, driver, "At once.", "At once.")
