"""How a `weft serve` begins and ends, and what it says."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import openai

from server import embedded
from server.local_ray import read
from tests.engine.conftest import WEFT, Served, free_port, wait_for

TINY = ("--max-model-len", "2048", "--block-size", "32")


def weft(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([WEFT, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def test_the_first_words_are_few_and_say_how_to_call(served: Served) -> None:
    lines = served.out.read_text().splitlines()
    assert len(lines) <= 15
    text = "\n".join(lines)
    for word in (f"{served.url}/v1/chat/completions", "OPENAI_BASE_URL=", "ANTHROPIC_BASE_URL=", "noise"):
        assert word in text


def test_a_port_in_use_is_said_before_anything_starts(served: Served) -> None:
    said = weft("serve", "--port", str(served.port), "--home", str(served.home))
    assert said.returncode == 2
    assert said.stderr == f"weft: cannot listen on 127.0.0.1:{served.port}: Address already in use\n"


def test_sigterm_lets_steps_end_then_ends_the_workers_and_ray(served: Served) -> None:
    local = read(served.home, served.port)
    assert local
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
    said = [{"role": "user", "content": "Talk."}]
    stream = client.chat.completions.create(
        model=embedded.NAME, messages=said, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    served.process.send_signal(signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert served.process.wait(timeout=120) == 0
    wait_for(lambda: not served.processes())
    assert not local.alive()
    assert read(served.home, served.port) is None


def test_two_models_behind_one_endpoint_and_weft_down(home: Path) -> None:
    model = embedded.ensure(home)
    copies = []
    for name in ("planner", "coder"):
        (home / name).symlink_to(model)
        copies.append(str(home / name))
    both = Served(home, [*copies, "--", *TINY]).start().ready(2)
    client = openai.OpenAI(base_url=both.url + "/v1", api_key="none", max_retries=0)
    assert sorted(m.id for m in client.models.list()) == sorted(copies)
    workers = []
    for model_id in (*copies, *copies):
        raw = client.chat.completions.with_raw_response.create(
            model=model_id, messages=[{"role": "user", "content": "hi"}], max_tokens=4,
            extra_headers={"x-session-id": "run"},
        )  # fmt: skip
        assert raw.parse().model == model_id
        workers.append(raw.headers["x-weft-worker"])
    assert workers == ["planner-0", "coder-0"] * 2
    told = both.get("/v1/workflows/run")
    assert [step["model"] for step in told["steps"]] == copies * 2
    both.process.kill()  # what a crash leaves is what `weft down` ends
    both.process.wait()
    assert len(both.engines()) == 2
    assert weft("down", "--port", str(both.port), "--home", str(home)).stdout == "down\n"
    wait_for(lambda: not both.processes())
    assert "nothing of Weft's" in weft("down", "--port", str(both.port), "--home", str(home)).stdout


def test_a_worker_that_cannot_start_ends_the_start_with_its_reason(home: Path) -> None:
    port = free_port()
    said = weft("serve", "--port", str(port), "--home", str(home), "--", "--max-model-len", "nonsense")
    assert said.returncode == 1
    assert "did not start" in said.stdout
    assert "max-model-len" in said.stdout
    assert read(home, port) is None


def test_a_wrong_flag_or_key_names_the_nearest() -> None:
    flag = weft("serve", "--replica", "2")
    assert flag.returncode == 2
    assert "--replicas" in flag.stderr
    key = weft("serve", WEFT_REPLICA="2")
    assert key.stderr == "weft: unknown key 'replica' in the environment (WEFT_*); the nearest is 'replicas'\n"


def test_beyond_loopback_a_file_of_keys_is_needed() -> None:
    said = weft("serve", "--host", "0.0.0.0")
    assert said.returncode == 2
    assert "file of API keys" in said.stderr
