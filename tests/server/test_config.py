from __future__ import annotations

from pathlib import Path

import pytest

from server.auth import Keys, hashed, new_key
from server.config import ConfigError, load
from server.engine import check_args, world_size
from server.serve import _replicas, _specs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "c.yaml", "port: 1001\nreplicas: 3\ndrain-seconds: 7\n")
    for name, value in {"WEFT_PORT": "1002", "WEFT_REPLICAS": "4"}.items():
        monkeypatch.setenv(name, value)
    environ = {"WEFT_PORT": "1002", "WEFT_REPLICAS": "4"}
    settings = load({"port": 1003}, environ, file)
    assert (settings.port, settings.replicas, settings.drain_seconds, settings.host) == (1003, 4, 7, "127.0.0.1")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("file", "unknown key 'replica' in {file}; the nearest is 'replicas'"),
        ("environment", "unknown key 'prot' in the environment (WEFT_*); the nearest is 'port'"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path: Path, where: str, expected: str) -> None:
    file = write(tmp_path / "c.yaml", "replica: 2\n" if where == "file" else "{}\n")
    environ = {"WEFT_PROT": "1"} if where == "environment" else {}
    with pytest.raises(ConfigError) as error:
        load({}, environ, file)
    assert str(error.value) == expected.format(file=file)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"port": 0}, "port"),
        ({"replicas": 0}, "replicas"),
        ({"workers": "ftp://x"}, "not an http"),
        ({"workers": "http://a,http://a"}, "twice"),
        ({"workers": "http://a", "models": ["m"]}, "attached workers run already"),
        ({"host": "0.0.0.0"}, "not a loopback address"),
    ],
)
def test_settings_that_cannot_be_used_say_why(flags: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(flags, {}, None)


def test_lists_are_given_with_commas_and_vllm_flags_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_MODELS", "a=2,b")
    monkeypatch.setenv("WEFT_VLLM_ARGS", "--chat-template 'my template'")
    settings = load({}, {"WEFT_MODELS": "", "WEFT_VLLM_ARGS": ""}, None)
    assert settings.models == ("a=2", "b")
    assert settings.vllm_args == ("--chat-template", "my template")


def test_a_file_that_is_no_yaml_or_missing_is_an_error(tmp_path: Path) -> None:
    for file in (
        write(tmp_path / "bad.yaml", "a: [1"),
        tmp_path / "missing.yaml",
        write(tmp_path / "list.yaml", "[1]"),
    ):
        with pytest.raises(ConfigError):
            load({}, {}, file)


@pytest.mark.parametrize("flag", ["--port", "--host=1.2.3.4", "--api_key", "--model"])
def test_vllm_flags_that_are_weft_s_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match="is set by Weft"):
        check_args([flag, "1"])


def test_a_worker_reserves_the_gpus_that_its_flags_ask_for() -> None:
    assert world_size([]) == 1
    assert world_size(["--tensor-parallel-size", "4", "-pp=2"]) == 8
    assert world_size(["--tensor_parallel_size=2", "-dp", "3"]) == 6
    with pytest.raises(ConfigError):
        world_size(["-tp"])


def test_a_model_may_say_how_many_replicas_it_gets() -> None:
    assert _replicas("meta/llama=3", 1) == ("meta/llama", 3)
    assert _replicas("meta/llama", 2) == ("meta/llama", 2)
    with pytest.raises(ConfigError):
        _replicas("m=zero", 1)


def test_workers_of_several_models_are_named_apart_and_keep_their_flags(tmp_path: Path) -> None:
    transfer = ("--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}')
    settings = load({"models": ["a/x=2", "b/x"], "vllm_args": transfer, "home": tmp_path}, {}, None)
    specs = _specs(settings, _Quiet())  # type: ignore[arg-type]
    assert [(s.name, s.pool, s.model) for s in specs] == [
        ("x-0", "x", "a/x"), ("x-1", "x", "a/x"), ("x-2-0", "x-2", "b/x"),
    ]  # fmt: skip
    assert all(s.args == transfer for s in specs)


class _Quiet:
    def line(self, text: str) -> None: ...


def test_keys_map_to_tenants_by_either_header(tmp_path: Path) -> None:
    one, two = new_key(), new_key()
    file = write(
        tmp_path / "k.yaml",
        f'tenants:\n  - {{name: a, keys: ["{hashed(one)}"]}}\n  - {{name: b, isolated: true, keys: ["{hashed(two)}"]}}\n',
    )
    keys = Keys.read(file)
    assert keys.tenant({"authorization": f"Bearer {one}"}).name == "a"  # type: ignore[union-attr]
    assert keys.tenant({"x-api-key": two}).name == "b"  # type: ignore[union-attr]
    assert keys.tenant({"authorization": f"bearer  {two} "}).isolated  # type: ignore[union-attr]
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": f"Basic {one}"}, {"authorization": "Bearer"}):
        assert keys.tenant(headers) is None
    assert one not in file.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "tenants: [{name: a, keys: [plain-key]}]",
        "tenants: [{name: a, keyz: []}]",
        "tenants: [{name: a}, {name: a}]",
        "[]",
        "tenants: [{name: a, weight: -1}]",
    ],
)
def test_a_keys_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="keys:"):
        Keys.read(write(tmp_path / "k.yaml", text))
