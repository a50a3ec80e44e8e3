"""Settings: one set of keys for flags, `WEFT_*` environment and YAML file (flag > environment > file > default)."""

from __future__ import annotations

import difflib
import ipaddress
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "WEFT_"


class ConfigError(Exception):
    """A setting that cannot be used; the text says which one and why."""


class Settings(BaseSettings):
    """Everything that `weft serve` can be told."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid")

    models: Annotated[tuple[str, ...], NoDecode] = ()
    replicas: int = Field(default=1, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    workers: Annotated[tuple[str, ...], NoDecode] = ()
    worker_api_key: str | None = None
    address: str | None = None
    keys: Path | None = None
    trace_dir: Path | None = None
    log_format: Literal["text", "json"] = "text"
    host_tier: float | None = Field(default=None, ge=0)
    drain_seconds: float = Field(default=30.0, ge=0)
    hold_commit_seconds: float = Field(default=10.0, ge=0)
    hold_unary_seconds: float = Field(default=50.0, gt=0)
    home: Path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"
    vllm_args: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("models", "workers", mode="before")
    @classmethod
    def _comma_list(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _shell_words(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(shlex.split(value))
        return tuple(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("workers")
    @classmethod
    def _urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is not an http:// or https:// URL")
        if len(set(value)) != len(value):
            raise ValueError("a worker is named twice")
        return tuple(url.rstrip("/").removesuffix("/v1") for url in value)

    @field_validator("keys", "trace_dir", "home")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # The process leaves the user's directory before it starts Ray.
        return value.expanduser().absolute() if value else None

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.workers and (self.models or self.vllm_args or self.address or self.host_tier):
            raise ValueError(
                "workers: attached workers run already; leave out models, vLLM flags, host tier and address"
            )
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(f"keys: {self.host} is not a loopback address; give a file of API keys (weft key --help)")
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        """Flags, then environment; `load` merges the file below both."""
        return (init_settings, env_settings)


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> Settings:
    """Merge the sources. Raises ConfigError that names the key, and for an unknown one the nearest that exists."""
    known = sorted(Settings.model_fields)
    file = file or (Path(environ[PREFIX + "CONFIG"]) if environ.get(PREFIX + "CONFIG") else None)
    from_file = _read_yaml(file) if file else {}
    _refuse_unknown(from_file, known, f"in {file}")
    from_environ = {k[len(PREFIX) :].lower() for k, v in environ.items() if k.upper().startswith(PREFIX) and v}
    if environ.get("WEFT_PORT", "").startswith("tcp://"):
        raise ConfigError("WEFT_PORT is Kubernetes' word for a Service named weft; set enableServiceLinks: false")
    _refuse_unknown(from_environ, [*known, "config"], f"in the environment ({PREFIX}*)")
    below = {key: value for key, value in from_file.items() if key not in from_environ}
    try:
        return Settings(**{**below, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{key}: {message}" if key else message) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if not isinstance(read or {}, dict):
        raise ConfigError(f"{file} holds no keys")
    return {str(key).replace("-", "_"): value for key, value in (read or {}).items()}


def _refuse_unknown(given: Iterable[str], known: list[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {key!r} {where}; the nearest is {near[0]!r}")
