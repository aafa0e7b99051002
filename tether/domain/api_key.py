"""API keys: their text, and the record that is stored."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets

import msgspec

SCOPES = ("infer", "jobs", "models:read", "models:write", "models:code", "metrics", "admin")
"""Scopes of keys. ``admin`` implies all others; ``models:code`` allows pushes of models that contain code;
``metrics`` allows metrics that name models."""

_TEXT = re.compile(r"tk_([a-z2-7]{8})_([A-Za-z0-9_-]{43})")


class ApiKey(msgspec.Struct, frozen=True):
    """The stored record of a key, without its secret. ``created_at`` is UTC seconds."""

    id: str
    hash: str
    """Hex SHA-256 of the whole key text; the secret has 256 random bits, so it needs no slow hash."""
    tenant: str
    scopes: tuple[str, ...]
    name: str
    created_at: float
    revoked: bool = False
    models: tuple[str, ...] = ("*",)
    """Patterns of the models it may use, within its tenant's."""
    rate: float = 0.0
    """Requests per second over all gateways; 0: no limit of its own."""
    burst: int = 0
    """Requests at once; 0: one second's worth of ``rate``."""
    concurrency: int = 0
    """Concurrent requests over all gateways; 0: no limit of its own."""
    expires_at: float = 0.0
    """UTC seconds; 0.0: never."""
    replaces: str = ""
    """The id of the key that it was rotated from."""

    def accepts(self, text: str) -> bool:
        """Return True if ``text`` is this key and it is not revoked, in constant time."""
        return hmac.compare_digest(self.hash, key_hash(text)) and not self.revoked

    def counts(self, now: float) -> bool:
        """Return True if it is neither revoked nor expired at ``now`` (UTC seconds)."""
        return not self.revoked and (not self.expires_at or now < self.expires_at)

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


def new_key_text() -> str:
    """Generate a key to show once: ``tk_<8 character id>_<43 character secret>``."""
    prefix = base64.b32encode(os.urandom(5)).decode().lower()
    return f"tk_{prefix}_{secrets.token_urlsafe(32)}"


def key_id(text: str) -> str | None:
    """Return the public id in a key's text, or None if the text is malformed."""
    found = _TEXT.fullmatch(text)
    return None if found is None else found[1]


def key_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stored_key(text: str, *, tenant: str, scopes: tuple[str, ...], name: str, created_at: float) -> ApiKey:
    """Return the record of a key from :func:`new_key_text`, without limits or expiry."""
    return ApiKey(key_id(text) or "", key_hash(text), tenant, scopes, name, created_at)


def rotated(record: ApiKey, text: str, now: float) -> ApiKey:
    """Return the successor of ``record`` at ``now``, with the same rights and the same lifetime from now on."""
    expires_at = now + (record.expires_at - record.created_at) if record.expires_at else 0.0
    return msgspec.structs.replace(
        record, id=key_id(text) or "", hash=key_hash(text), created_at=now, expires_at=expires_at, replaces=record.id
    )
