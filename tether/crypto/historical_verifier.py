"""Verifies frames stored for years against the keysets at their time of signing.

A key that has since expired, rotated or been revoked still vouches for its earlier signatures. Use
:class:`~tether.crypto.Verifier` for messages that are acted on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import nacl.exceptions
import nacl.signing

from tether.crypto import envelope as wire
from tether.crypto.envelope import DOMAIN, Envelope, Header
from tether.crypto.keyset import KEYSET_DOMAIN, KID_BYTES, MAX_SKEW_MS, IdentityRecord, Keyset
from tether.crypto.roles import MessageType
from tether.errors import (
    BadEncoding,
    BadSignature,
    KeyExpired,
    KeyRevoked,
    KeysetError,
    RoleNotAllowed,
    SubjectMismatch,
    UnknownKey,
    Unsigned,
)
from tether.wire import codec

_HEARD_MS = 10_000
"""Grace after a revocation, in which the service may not yet have received it."""


class Historical:
    """Verifies frames against every past and current keyset; none needs to be in force."""

    def __init__(self, keysets: Iterable[Keyset]) -> None:
        self._records: dict[bytes, list[IdentityRecord]] = {}
        self._keys: dict[bytes, nacl.signing.VerifyKey] = {}
        self.revoked: dict[bytes, int] = {}
        """First revocation of each key, UTC milliseconds, by key id."""
        for keyset in keysets:
            for record in keyset.identities:
                self._records.setdefault(record.kid, []).append(record)
                self._keys[record.kid] = nacl.signing.VerifyKey(record.ed25519)
            for gone in keyset.revoked:
                self.revoked[gone.kid] = min(gone.revoked_at, self.revoked.get(gone.kid, gone.revoked_at))

    def header(self, frame: bytes) -> tuple[Header, IdentityRecord]:
        """Return the signed header and its signer, without checking the body.

        Raises:
            Unsigned, BadEncoding, UnknownKey, BadSignature: the signature is not valid.
            KeyExpired, KeyRevoked: it was signed outside the validity of its key.
        """
        kid, signed, signature = _parts(frame)
        if kid not in self._keys:
            raise UnknownKey(f"no identity in any known keyset has the key {kid.hex()}")
        try:
            self._keys[kid].verify(DOMAIN + kid + signed, signature)
        except nacl.exceptions.BadSignatureError as error:
            raise BadSignature("the envelope's signature does not match") from error
        header = wire._decode_header(signed)  # noqa: SLF001 - one format, one decoder
        return header, self._in_force(kid, header.issued_at)

    def open(self, frame: bytes, *, subject: str, types: tuple[MessageType, ...]) -> Envelope:
        """Verify a stored frame as of the time of its signing.

        Raises:
            Unsigned, BadEncoding, UnknownKey, BadSignature, KeyExpired, KeyRevoked, RoleNotAllowed, SubjectMismatch
        """
        header, record = self.header(frame)
        if header.role != record.role or header.type not in record.types or header.type not in types:
            raise RoleNotAllowed(f"'{record.name}' ({record.role}) may not send '{header.type}' here")
        if header.subject != subject:
            raise SubjectMismatch("the frame was signed for another subject than the one it lies on")
        body = body_of(frame)
        if len(body) != header.body_length or hashlib.sha256(body).digest() != header.body_digest:
            raise BadSignature("the body is not the one that was signed")
        return Envelope(header, body, record.name, record.tenant)

    def _in_force(self, kid: bytes, at: int) -> IdentityRecord:
        if kid in self.revoked and at >= self.revoked[kid] + _HEARD_MS:
            raise KeyRevoked(f"the key of '{self._records[kid][0].name}' had been revoked when this was signed")
        for record in self._records[kid]:
            if record.not_before - MAX_SKEW_MS <= at < record.expires_at:
                return record
        raise KeyExpired(f"the key of '{self._records[kid][0].name}' was not in force when this was signed")


def open_old_keyset(data: bytes, root_public: bytes) -> Keyset:
    """Return a keyset that the pinned root key signed, in force or not: for :class:`Historical` only.

    Raises:
        KeysetError: unsigned, signed by another root, or unreadable.
    """
    try:
        nacl.signing.VerifyKey(root_public).verify(KEYSET_DOMAIN + data[64:], data[:64])
        return codec.decode(data[64:], Keyset)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError, BadEncoding) as error:
        raise KeysetError("the keyset is not signed by the pinned root key") from error


def body_of(frame: bytes) -> bytes:
    """Return the bytes after the header, verified or not.

    Raises:
        Unsigned, BadEncoding: there is no header.
    """
    kid, signed, _ = _parts(frame)
    return frame[wire._PREFIX.size + len(kid) + len(signed) :]  # noqa: SLF001 - one format, one struct


def kid_of(frame: bytes) -> bytes:
    """Return the key id in a frame, verified or not.

    Raises:
        Unsigned, BadEncoding: there is no header.
    """
    return _parts(frame)[0]


def _parts(frame: bytes) -> tuple[bytes, bytes, bytes]:
    """Split a frame into key id, rest of the header, signature."""
    prefix = wire._PREFIX  # noqa: SLF001 - one format, one struct
    if len(frame) < prefix.size or frame[:4] != wire.MAGIC:
        raise Unsigned("the message is not a signed envelope")
    _, version, length, signature = prefix.unpack_from(frame)
    end = prefix.size + length
    if version != wire.VERSION or not KID_BYTES < length <= wire.MAX_HEADER or end > len(frame):
        raise BadEncoding("the envelope's version or length is not one this receiver knows")
    return frame[prefix.size : prefix.size + KID_BYTES], frame[prefix.size + KID_BYTES : end], signature
