"""The keyset: the list of identities that the root key signed.

As bytes: Ed25519 signature (64) of the root key over ``KEYSET_DOMAIN | map``, then the msgpack map of
:class:`Keyset`.
"""

from __future__ import annotations

import hashlib
import os

import msgspec
import nacl.exceptions
import nacl.public
import nacl.signing

from tether.crypto.roles import ROLE_TYPES, MessageType, Role
from tether.errors import BadEncoding, KeysetError
from tether.wire import codec

KEYSET_DOMAIN = b"tether/keyset/v1\0"
MAX_SKEW_MS = 30_000
"""Maximum difference between the clocks of two machines: messages from further in the future are refused."""
MAX_DELAY_MS = 5_000
"""Maximum transit time of messages that must be young, beside the skew."""

KID_BYTES = 16


class IdentityRecord(msgspec.Struct, frozen=True):
    """One identity in the keyset. Keys are raw bytes; times are UTC milliseconds."""

    kid: bytes
    name: str
    role: Role
    ed25519: bytes
    x25519: bytes
    types: tuple[MessageType, ...]
    not_before: int
    expires_at: int
    tenant: str = ""
    """Of a worker: the one isolated tenant it serves; empty for shared workers."""
    nats: str = ""
    """Public nkey of this identity's broker login."""


class Revocation(msgspec.Struct, frozen=True):
    """A key that was revoked before its expiry. ``revoked_at`` is UTC milliseconds."""

    kid: bytes
    name: str
    revoked_at: int


class Keyset(msgspec.Struct, frozen=True):
    """Every trusted identity, signed by the root key. Two keys of one name overlap during a rotation."""

    version: int
    not_before: int
    expires_at: int
    identities: tuple[IdentityRecord, ...]
    revoked: tuple[Revocation, ...] = ()


class Identity(msgspec.Struct, frozen=True):
    """A service's own secrets. ``seed`` gives its Ed25519 key, ``box_seed`` its X25519 key; 32 bytes each."""

    name: str
    role: Role
    seed: bytes
    box_seed: bytes

    def __repr__(self) -> str:
        return f"Identity(name={self.name!r}, role={self.role.value!r}, seed=<secret>)"

    @property
    def kid(self) -> bytes:
        return key_id(bytes(nacl.signing.SigningKey(self.seed).verify_key))

    def record(self, *, not_before: int, expires_at: int, tenant: str = "", nats: str = "") -> IdentityRecord:
        """Return the public half, with the message types of its role; ``tenant`` and ``nats`` as in the record."""
        return IdentityRecord(
            kid=self.kid,
            name=self.name,
            role=self.role,
            ed25519=bytes(nacl.signing.SigningKey(self.seed).verify_key),
            x25519=bytes(nacl.public.PrivateKey(self.box_seed).public_key),
            types=tuple(sorted(ROLE_TYPES[self.role])),
            not_before=not_before,
            expires_at=expires_at,
            tenant=tenant,
            nats=nats,
        )


def key_id(public_key: bytes) -> bytes:
    """Return the 16-byte id of an Ed25519 public key: the start of its SHA-256."""
    return hashlib.sha256(public_key).digest()[:KID_BYTES]


def new_identity(name: str, role: Role) -> Identity:
    return Identity(name, role, os.urandom(32), os.urandom(32))


def root_public_key(seed: bytes) -> bytes:
    return bytes(nacl.signing.SigningKey(seed).verify_key)


def sign_keyset(root_seed: bytes, keyset: Keyset) -> bytes:
    """Return the keyset as bytes for a file or a bucket: signature (64 bytes), then msgpack."""
    body = codec.encode(keyset)
    return nacl.signing.SigningKey(root_seed).sign(KEYSET_DOMAIN + body).signature + body


def open_keyset(data: bytes, root_public: bytes, *, now_ms: int | None, newer_than: int = 0) -> Keyset:
    """Decode a keyset after checking that the pinned root key signed it and that it is in force at ``now_ms``.

    Without a time it may be expired, for its renewal.

    Raises:
        KeysetError: unsigned, signed by another root, older than ``newer_than``, not yet valid or expired.
    """
    try:
        nacl.signing.VerifyKey(root_public).verify(KEYSET_DOMAIN + data[64:], data[:64])
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError) as error:
        raise KeysetError("the keyset is not signed by the pinned root key") from error
    try:
        keyset = codec.decode(data[64:], Keyset)
    except BadEncoding as error:
        raise KeysetError("the keyset cannot be decoded", reason="undecodable") from error
    if keyset.version < newer_than:
        raise KeysetError(
            f"keyset version {keyset.version} is older than version {newer_than}, which was seen before", reason="older"
        )
    if now_ms is not None and not keyset.not_before - MAX_SKEW_MS <= now_ms < keyset.expires_at:
        raise KeysetError(
            "the keyset is expired or not yet valid; renew it with 'tether identity renew' or set the clock",
            reason="not_in_force",
        )
    return keyset
