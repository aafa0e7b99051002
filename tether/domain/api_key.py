"""API keys: what a client shows, and what is kept of it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets

import msgspec

SCOPES = ("infer", "jobs", "models:read", "models:write", "models:code", "metrics", "admin")
"""What a key may do; ``admin`` implies all others, ``models:code`` allows models that are programs to be pushed,
``metrics`` to read metrics that name models."""

_TEXT = re.compile(r"tk_([a-z2-7]{8})_([A-Za-z0-9_-]{43})")


class ApiKey(msgspec.Struct, frozen=True):
    """The stored half of a key: everything but its secret. ``created_at`` is UTC seconds."""

    id: str
    hash: str
    """Hex SHA-256 of the whole key text; the secret has 256 random bits, so it needs no slow hash."""
    tenant: str
    scopes: tuple[str, ...]
    name: str
    created_at: float
    revoked: bool = False
    models: tuple[str, ...] = ("*",)
    """Patterns of the models it may use, within those of its tenant."""
    rate: float = 0.0
    """Requests a second over all gateways; 0: no limit of its own."""
    burst: int = 0
    """Requests that may come at once; 0: as many as ``rate`` allows in a second."""
    concurrency: int = 0
    """Requests that may be open at the same time over all gateways; 0: no limit of its own."""
    expires_at: float = 0.0
    """UTC seconds; 0.0: never."""
    replaces: str = ""
    """The id of the key that this one took over from when it was rotated."""

    def accepts(self, text: str) -> bool:
        """Whether ``text`` is this key and the key still counts; takes the same time for every wrong text."""
        return hmac.compare_digest(self.hash, key_hash(text)) and not self.revoked

    def counts(self, now: float) -> bool:
        """Whether it is neither revoked nor expired at ``now`` (UTC seconds)."""
        return not self.revoked and (not self.expires_at or now < self.expires_at)

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


def new_key_text() -> str:
    """A key to hand out once: ``tk_<8 character id>_<43 character secret>``."""
    prefix = base64.b32encode(os.urandom(5)).decode().lower()
    return f"tk_{prefix}_{secrets.token_urlsafe(32)}"


def key_id(text: str) -> str | None:
    """The public id inside a key text, or None when it has not the form of a key."""
    found = _TEXT.fullmatch(text)
    return None if found is None else found[1]


def key_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stored_key(text: str, *, tenant: str, scopes: tuple[str, ...], name: str, created_at: float) -> ApiKey:
    """What to keep of a key that :func:`new_key_text` made; it has no limits and does not expire."""
    return ApiKey(key_id(text) or "", key_hash(text), tenant, scopes, name, created_at)


def rotated(record: ApiKey, text: str, now: float) -> ApiKey:
    """The key that takes over from ``record`` at ``now``: the same rights, and the same lifetime from now on."""
    expires_at = now + (record.expires_at - record.created_at) if record.expires_at else 0.0
    return msgspec.structs.replace(
        record, id=key_id(text) or "", hash=key_hash(text), created_at=now, expires_at=expires_at, replaces=record.id
    )
