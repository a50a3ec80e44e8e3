from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import cli
from bench.metrics import NAMES
from bench.simulation.profile import CPU
from tests.bench.rivals.fake_engine import FakeEngine
from tests.bench.rivals.runs import quick

SMALL = (
    "--workload", "cascade", "--policies", "stock,weft", "--load", "0.2,0.5", "--workers", "1", "--profile", "cpu",
    "--supply", "2",
)  # fmt: skip


def weft(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process; returns its status."""
    monkeypatch.setattr(sys, "argv", ["weft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def recorded(path: Path, runs: int = 6, calls: int = 4) -> Path:
    """A trace as `weft serve --trace-dir` writes it: runs two seconds apart, each prompt extends the one before."""
    lines: list[dict[str, Any]] = [{"kind": "header", "format": 1, "weft": "0.1.0", "started": 0.0}]
    for run in range(runs):
        segments, last = [("system", 400)], None
        for call in range(calls):
            segments = [*segments, (f"r{run}.{call}", 300)]
            arrived = 1000.0 + 2 * run + 3 * call
            lines.append(
                {
                    "kind": "step", "step": f"r{run}c{call}", "after": [last] if last else [], "tenant": "default",
                    "workflow": f"w{run}", "session": f"s{run}", "parent": None, "role": "agent", "template": None,
                    "rule": "x-session-id", "model": "m", "worker": "w0", "decision": "sticky", "terms": {},
                    "tries": 1, "state": "finished", "status": 200, "arrived": arrived, "first_token": arrived + 0.5,
                    "finished": arrived + 1, "gap_seconds": None, "segments": segments,
                    "prompt_tokens": sum(tokens for _, tokens in segments), "cached_tokens": 0, "output_tokens": 20,
                    "stop": "stop",
                }
            )  # fmt: skip
            last = f"r{run}c{call}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "w11"], "unknown workload 'w11'; the nearest is 'w1'; there are cascade, "),
        (["--workload", "w1", "--policies", "stok"], "unknown system 'stok'; the nearest is 'stock'"),
        (["--workload", "w1", "--policies", ","], "the list of systems is empty"),
        (["--workload", "w1", "--profile", "h100"], "unknown profile 'h100'"),
        (["--workload", "w1", "--profile", "l70:many"], "--profile: 'many' is not a number"),
        (["--workload", "w1", "--profile", "nowhere.json:400"], "unknown profile 'nowhere.json'"),
        (["--workload", "w1", "--options", "stage=3"], "w1 has no option 'stage'; it has runs, stages, "),
        (["--workload", "w1", "--options", "scale=3"], "scale: no workload has an option of that name"),
        (["--workload", "w1", "--options", 'runs="x"'], "w1: runs=x is no int"),
        (["--workload", "w1", "--load", "1,x"], "--load: 'x' is not a number"),
        (["--workload", "w1", "--load", "0"], "--load: 0 must be above 0"),
        (["--workload", "w1", "--load", "nan"], "--load: nan must be above 0"),
        (["--workload", "w1", "--tier", "-1"], "--tier: -1 must be 0 or more"),
        (["--workload", "w1", "--workers", "1.5"], "--workers: '1.5' is not a number"),
        (["--workload", "w1", "--arrivals", "poison:3"], "neither closed nor poisson:RUNS_PER_HOUR nor trace"),
        (["--workload", "w1", "--arrivals", "poisson:"], "--arrivals is empty"),
        (["--workload", "w1", "--arrivals", "trace"], "w1 does not say when its runs arrived"),
        (["--workload", "w1", "--half", "tune"], "w1 has no halves"),
        (["--workload", "w1", "--scale", "0"], "scale: 0.0 is not above 0"),
        (["--workload", "w1", "--trace", "x"], "w1 is made by its seed, it reads no --trace"),
        (["--workload", "mooncake"], "mooncake needs a trace"),
        (["--workload", "mooncake", "--trace", "/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
        (["--workload", "w1", "--max-context", "5"], "all runs have prompts above 5 tokens"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "simulate", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("weft: ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "w11"], "unknown workload 'w11'"),
        (["--workload", "w1", "--systems", "stok"], "unknown system 'stok'"),
        (["--workload", "w1", "--tier", "2", "--url", "http://127.0.0.1:9"], "with what host tier it has"),
        (["--workload", "w1", "--url", "http://127.0.0.1:9", "--systems", "a,b"], "give --systems the one name"),
        (["--workload", "w1", "--url", "http://127.0.0.1:9", "--systems", "a"], "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "bench", *arguments, "--out", tmp_path) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_number_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weft(monkeypatch, "simulate", "--workload", "w1", "--seed", "x") == 2
    assert weft(monkeypatch, "simulate", "--workload", "w1", "--reps", "0") == 2


def test_a_list_names_each_thing_once() -> None:
    assert cli.numbers("1, 2,1.0", "--load", float, 0.0) == [1, 2]
    assert len(cli.points("1,2", "1,4", "0,2", "closed")) == 8
    assert cli.points("1,2", "4", "0", "poisson:20,30")[1] == {
        "workers": 4, "tier": 0.0, "load": None, "arrivals": "poisson:30",
    }  # fmt: skip


def test_all_commands_and_options_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stable = {
        "": ["serve", "down", "key", "bench", "simulate", "replay", "report"],
        "bench": [
            "--workload", "--trace", "--url", "--systems", "--load", "--workers", "--tier", "--arrivals", "--reps",
            "--seed", "--out",
        ],
        "simulate": [
            "--workload", "--trace", "--policies", "--workers", "--load", "--tier", "--profile", "--max-context",
            "--arrivals", "--seed", "--out",
        ],
        "replay": ["TRACE.jsonl", "--policies", "--workers", "--tier", "--out"],
    }  # fmt: skip
    for command, options in stable.items():
        assert weft(monkeypatch, *command.split(), "--help") == 0
        shown = capsys.readouterr().out
        assert not [option for option in options if option not in shown]


def test_a_simulation_writes_everything_and_a_rerun_only_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "simulate", *SMALL, "--reps", 2, "--seed", 3, "--out", tmp_path) == 0
    shown = capsys.readouterr()
    assert "cells to play: 8, there already: 0; expected: " in shown.err
    assert shown.out.splitlines()[0] == "cascade, simulated, cpu, 1 worker, no host tier"
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(c["system"], c["load"], c["seed"]) for c in cells[:3]] == [
        ("stock", 0.2, 3), ("stock", 0.2, 4), ("stock", 0.5, 3),
    ]  # fmt: skip
    assert all(tuple(cell["metrics"]) == NAMES and cell["metrics"]["turns_per_second"] > 0 for cell in cells)
    told = (tmp_path / "run.json").read_text()
    (run,) = json.loads(told)["commands"]
    assert run["command"].startswith("weft simulate --workload cascade")
    assert str(tmp_path.parent) not in run["command"]  # a report may be shown to others
    assert {"revision", "machine", "versions", "seconds", "left_out"} <= run.keys()
    assert "## Losses against stock" in (tmp_path / "report.md").read_text()
    (plot,) = (tmp_path / "plots").iterdir()
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
    before = (tmp_path / "results.json").read_bytes()
    assert weft(monkeypatch, "simulate", *SMALL, "--reps", 2, "--seed", 3, "--out", tmp_path) == 0
    assert "cells to play: 0, there already: 8" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    assert (tmp_path / "run.json").read_text() == told  # it played nothing
    more = ("--reps", 2, "--seed", 3, "--policies", "unlimited", "--out", tmp_path)
    assert weft(monkeypatch, "simulate", *SMALL, *more) == 0
    first, second = json.loads((tmp_path / "run.json").read_text())["commands"]
    assert (first, second["cells"]) == (run, 4)
    assert "--policies unlimited" in second["command"]
    assert weft(monkeypatch, "report", tmp_path) == 0
    assert (tmp_path / "report.md").read_text().count("- Command: ") == 2


def test_a_profile_may_be_one_that_was_measured_and_never_says_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = asdict(CPU) | {"name": "measured", "step": 2 * CPU.step}
    del costs["link"]
    plain, measured = tmp_path / "costs.json", tmp_path / "run.json"
    plain.write_text(json.dumps(costs))
    measured.write_text(json.dumps({"commands": [{"engines": {"profile": costs}}]}))
    small = ("--workload", "cascade", "--load", "0.5", "--workers", "1", "--supply", "1", "--policies", "stock")
    found = []
    for number, profile in enumerate(("cpu:9000", f"{plain}:9000", f"{measured}:9000")):
        assert weft(monkeypatch, "simulate", *small, "--profile", profile, "--out", tmp_path / f"{number}") == 0
        text = (tmp_path / f"{number}" / "cells.jsonl").read_text()
        assert str(tmp_path) not in text
        found.append(json.loads(text))
    assert re.fullmatch("file:[0-9a-f]{12}:9000", found[1]["profile"])
    assert found[0]["metrics"] != found[1]["metrics"] == found[2]["metrics"]
    capsys.readouterr()
    plain.write_text(json.dumps(costs | {"step": "slow"}))
    assert weft(monkeypatch, "simulate", *small, "--profile", plain) == 2
    assert "is no profile: step: not a number" in capsys.readouterr().err


@pytest.mark.parametrize(("supply", "arrivals", "said"), [(3, "closed", 1), (4, "closed", 0), (3, "poisson:600", 0)])
def test_a_supply_too_short_for_a_claim_is_said(
    supply: int, arrivals: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--workload", "cascade", "--load", "0.1", "--workers", "1", "--profile", "cpu", "--policies", "stock")
    assert weft(monkeypatch, "simulate", *small, "--supply", supply, "--arrivals", arrivals) == 0
    assert capsys.readouterr().err.count("weft: --supply 3: figures are claimed of at least 4 runs") == said


def test_the_same_seed_gives_the_same_results_bit_for_bit(tmp_path: Path) -> None:
    for hashes in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "bench.cli",
            "simulate",
            *SMALL,
            "--load",
            "0.2",
            "--tier",
            "1",
            "--out",
            hashes,
        ]
        env = os.environ | {"PYTHONHASHSEED": hashes}
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=200)
    assert (tmp_path / "1" / "results.json").read_bytes() == (tmp_path / "2" / "results.json").read_bytes()


def test_without_a_directory_only_the_table_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert weft(monkeypatch, "simulate", *SMALL, "--arrivals", "poisson:60,600") == 0
    shown = capsys.readouterr().out
    assert "60/h" in shown
    assert "runs an hour at 95% within SLO" in shown
    assert not list(tmp_path.iterdir())


def test_an_interrupt_keeps_what_had_ended_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.cli", "simulate", *SMALL, "--reps", "50", "--out", str(tmp_path)]

    def ignoring() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start what runs in the background

    jobs = [*command, "--jobs", "2"]
    with subprocess.Popen(jobs, stderr=subprocess.PIPE, text=True, preexec_fn=ignoring) as process:
        deadline = time.monotonic() + 60
        while not lines(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said.splitlines()[-1]
    assert 0 < lines(tmp_path) < 200
    done = subprocess.run([*command[:-3], "1", "--out", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "there already: 0" not in done.stderr
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 4


def lines(directory: Path) -> int:
    path = directory / "cells.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_replay_says_what_another_policy_would_gain_on_recorded_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = recorded(tmp_path / "weft-1.jsonl")
    out = tmp_path / "out"
    arguments = ("--policies", "weft,unlimited", "--workers", "1,2", "--profile", "cpu:4000", "--out", out)
    assert weft(monkeypatch, "replay", trace, *arguments) == 0
    shown = capsys.readouterr().out
    assert "Recorded: 6 runs, 24 calls." in shown
    assert "on 1 x 4,000 KV tokens" in shown
    gains = shown[shown.index("What you would gain over stock") :].splitlines()[2:]
    assert [line.split()[:2] + line.split()[-8:-7] for line in gains] == [
        [workers, "workers,", system] for workers in "12" for system in ("unlimited", "weft")
    ]
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert len(cells) == 6
    assert {(cell["workload"], cell["load"], cell["arrivals"]) for cell in cells} == {("recorded", None, "trace")}
    assert all(cell["metrics"]["errors"] == 0 for cell in cells)
    assert "weft-1.jsonl@" in (out / "report.md").read_text()


def test_what_is_no_trace_of_weft_cannot_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert weft(monkeypatch, "replay", tmp_path / "x.jsonl") == 2
    assert "not a line of a trace" in capsys.readouterr().err
    assert weft(monkeypatch, "report", tmp_path) == 2
    assert "no finished cells" in capsys.readouterr().err


def test_vllm_flags_still_pass_through_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weft(monkeypatch, "serve", "--workers", "http://127.0.0.1:9", "m", "--", "--port", "1") == 2
    assert "attached workers run already" in capsys.readouterr().err


@pytest.fixture
def running() -> Iterator[tuple[FakeEngine, str]]:
    """A server that somebody else runs, and its address."""
    loop, engine = asyncio.new_event_loop(), FakeEngine()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(engine.start(), loop).result(10)
    yield engine, engine.url
    asyncio.run_coroutine_threadsafe(engine.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_a_running_server_is_measured_as_it_is(
    running: tuple[FakeEngine, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine, url = running
    monkeypatch.setattr("bench.rivals.measure.starts", lambda seed, slots, workload, profile: quick(slots))
    arguments = ("--workload", "cascade", "--scale", 100, "--url", url, "--load", 0.5, "--supply", 2, "--out", tmp_path)
    assert weft(monkeypatch, "bench", *arguments, "--systems", "mine", "--reps", 2) == 0
    assert "cascade, real, attached, 400 KV tokens" in capsys.readouterr().out
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(cell["system"], cell["load"], cell["rep"]) for cell in cells] == [("mine", 0.5, 0), ("mine", 0.5, 1)]
    for cell in cells:
        assert cell["metrics"]["errors"] == 0
        assert cell["metrics"]["turns_per_second"] > 0
    told = json.loads((tmp_path / "run.json").read_text())["commands"][-1]["engines"]
    assert (told["model"], told["kv_tokens"], engine.resets) == ("fake", 400, 0)
    kept = [(tmp_path / name).read_text() for name in ("results.json", "cells.jsonl")]
    assert not [text for text in (*kept, json.dumps(told)) if url.removeprefix("http://") in text]
    assert weft(monkeypatch, "bench", *arguments, "--systems", "after", "--reps", 2) == 0
    later = json.loads((tmp_path / "results.json").read_text())["cells"]
    gained = later[0]["metrics"]["hit_ratio"] - cells[0]["metrics"]["hit_ratio"]
    assert gained < 0.1  # its caches were not emptied, but nothing of an earlier cell is in the prompts of a later one
