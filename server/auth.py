"""API keys: a file of hashed keys maps each to a tenant.

```yaml
tenants:
  - name: research
    weight: 2.0        # share against other tenants
    workflows: 8       # at once; beyond that, 429
    tokens_per_minute: 200000  # that workers compute for it, prompt and output; beyond that, 429
    isolated: true     # its prefix cache is its own (a cache_salt of the tenant)
    trusted: false     # may send fields that steer the engine (priority, kv_transfer_params, ...)
    keys: ["sha256:9f86d0..."]
```
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from scheduler.quotas import Quota
from server.config import ConfigError

KEY_PREFIX = "weft-"
HASH_PREFIX = "sha256:"


class Tenant(BaseModel):
    """Who a key belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")
    weight: float = Field(default=1.0, gt=0)
    workflows: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    isolated: bool = False
    trusted: bool = False
    keys: tuple[str, ...] = ()
    _salt: bytes = PrivateAttr(default=b"")

    @property
    def salt(self) -> bytes:
        """What makes this deployment's cache salts impossible to guess."""
        return self._salt


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: list[Tenant]


OPEN = Tenant(name="default")
"""Everybody, where no keys are configured."""


class Keys:
    """Looks up the tenant of a request. Without keys everybody is `OPEN`."""

    def __init__(self, tenants: list[Tenant] | None, salt: bytes = b"") -> None:
        for tenant in tenants or ():
            tenant._salt = salt
        self._tenants = None if tenants is None else {key: t for t in tenants for key in t.keys}
        self.several = len(tenants or ()) > 1
        self.weights = {tenant.name: tenant.weight for tenant in tenants or () if tenant.weight != 1.0}
        self.quotas = {
            tenant.name: Quota(tenant.workflows, tenant.tokens_per_minute)
            for tenant in tenants or ()
            if tenant.workflows is not None or tenant.tokens_per_minute is not None
        }

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """Read the file; None leaves the endpoint open. Raises ConfigError where it is unreadable or ambiguous.

        Salts are keyed with the file itself: hashes of random keys, known to the operator only.
        """
        if path is None:
            return cls(None)
        try:
            text = path.read_text()
            tenants = _KeysFile.model_validate(yaml.safe_load(text)).tenants
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"keys: cannot read {path}: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"keys: {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        keys = [key for tenant in tenants for key in tenant.keys]
        names = [tenant.name for tenant in tenants]
        if len(set(keys)) != len(keys) or len(set(names)) != len(names):
            raise ConfigError(f"keys: {path}: a key or a tenant is listed twice")
        if bad := next((key for key in keys if not _is_hash(key)), None):
            raise ConfigError(f"keys: {path}: {bad[:12]}... is not a hash; `weft key` makes one")
        return cls(tenants, hashlib.sha256("".join(sorted(keys)).encode()).digest())

    def tenant(self, headers: Mapping[str, str]) -> Tenant | None:
        """The tenant of a request's `Authorization: Bearer` or `x-api-key`, or None where the key is not known."""
        if self._tenants is None:
            return OPEN
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # A look-up by digest leaks nothing about the keys through its time.
        return self._tenants.get(hashed(key)) if key else None


def new_key() -> str:
    """A fresh random key, 256 bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hashed(key: str) -> str:
    """The form in which a key is stored."""
    return HASH_PREFIX + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _is_hash(text: str) -> bool:
    digits = text.removeprefix(HASH_PREFIX)
    return text.startswith(HASH_PREFIX) and len(digits) == 64 and set(digits) <= set("0123456789abcdef")
