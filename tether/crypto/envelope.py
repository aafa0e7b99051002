"""Signs and verifies frames, the form of every message between services.

Frame, all integers big-endian::

    magic "TTHR" | version u8 | header length u16 | signature 64 | header | body
    header = key id (16 bytes) | msgpack array of the fields of Header, in order

The Ed25519 (RFC 8032) signature covers ``DOMAIN | header``; the header carries the length and SHA-256 of the body,
so every byte of the frame is covered. A receiver looks the key id up by its fixed place, verifies, and only then
decodes anything: see :meth:`Verifier.verify_envelope`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping

import msgspec
import nacl.exceptions
import nacl.signing

from tether.crypto.keyset import KID_BYTES, MAX_SKEW_MS, Identity, IdentityRecord, Keyset
from tether.crypto.roles import MessageType, Role
from tether.errors import (
    BadEncoding,
    BadSignature,
    ClockSkew,
    EnvelopeExpired,
    KeyExpired,
    KeyRevoked,
    Replayed,
    RoleNotAllowed,
    SubjectMismatch,
    UnknownKey,
    Unsigned,
)
from tether.wire import codec

MAGIC = b"TTHR"
VERSION = 1
DOMAIN = b"tether/envelope/v1\0"
MAX_HEADER = 16 * 1024
REPLAY_WINDOW_MS = 60_000 + MAX_SKEW_MS
"""How long nonces are remembered: a minute, plus as much for a sender's clock that runs ahead."""

_PREFIX = struct.Struct(">4sBH64s")


class Header(msgspec.Struct, frozen=True, array_like=True):
    """The signed header. Times are UTC milliseconds since the epoch."""

    role: Role
    type: MessageType
    subject: str
    """NATS subject the frame was published on; a receiver compares it with the subject it arrived on."""
    reply: str
    message_id: str
    jobs: tuple[str, ...]
    attempt: int
    tenant: str
    issued_at: int
    expires_at: int
    """0: no expiry of its own (key-value entries)."""
    nonce: bytes
    content_type: str
    body_length: int
    body_digest: bytes
    traceparent: str


class Envelope(msgspec.Struct, frozen=True):
    """A verified frame. ``sender`` is the identity's name from the keyset, ``sender_tenant`` its isolated
    tenant, or empty.
    """

    header: Header
    body: bytes
    sender: str
    sender_tenant: str = ""


class Signer:
    """Signs frames for one identity. ``now_ms`` is the UTC clock in milliseconds; ``nonces`` returns 16
    unique bytes per frame (non-random ones are for test vectors only).
    """

    def __init__(
        self,
        identity: Identity,
        now_ms: Callable[[], int],
        nonces: Callable[[], bytes] = lambda: os.urandom(16),
    ) -> None:
        self._nonces = nonces
        self.name = identity.name
        self.role = identity.role
        self._now_ms = now_ms
        self._key: nacl.signing.SigningKey | None
        self.replace(identity)

    @property
    def kid(self) -> bytes:
        """Id of the current signing key."""
        return self._kid

    def replace(self, identity: Identity) -> None:
        """Sign with another key of the same identity from now on."""
        if (identity.name, identity.role) != (self.name, self.role):
            raise ValueError(f"'{identity.name}' ({identity.role}) is not '{self.name}' ({self.role})")
        self._kid, self._key = identity.kid, nacl.signing.SigningKey(identity.seed)

    def retire(self) -> None:
        """Stop signing: the key was revoked."""
        self._key = None

    def _signing(self) -> nacl.signing.SigningKey:
        if self._key is None:
            raise KeyRevoked(f"the key of '{self.name}' was revoked; it signs nothing")
        return self._key

    def sign_envelope(
        self,
        kind: MessageType,
        subject: str,
        body: bytes,
        *,
        reply: str = "",
        message_id: str = "",
        jobs: tuple[str, ...] = (),
        attempt: int = 0,
        tenant: str = "",
        expires_at: int = 0,
        content_type: str = "application/msgpack",
        traceparent: str = "",
        after: int = 0,
    ) -> bytes:
        """Build the signed frame to publish on ``subject``.

        ``after`` is the issue time of the replaced value: this one is issued later, whatever the clock says.

        Raises:
            BadEncoding: the header would be larger than a receiver accepts (too many jobs in one bundle).
            KeyRevoked: this identity's key was revoked.
        """
        key = self._signing()
        fields = (
            self.role.value,
            kind.value,
            subject,
            reply,
            message_id,
            jobs,
            attempt,
            tenant,
            max(self._now_ms(), after + 1),
            expires_at,
            self._nonces(),
            content_type,
            len(body),
            hashlib.sha256(body).digest(),
            traceparent,
        )
        header = self._kid + codec.pack(fields)
        if len(header) > MAX_HEADER:
            raise BadEncoding(f"envelope header of {len(header)} bytes is over the limit of {MAX_HEADER}")
        signature = key.sign(DOMAIN + header).signature
        return b"".join((_PREFIX.pack(MAGIC, VERSION, len(header), signature), header, body))

    def sign_statement(self, domain: bytes, statement: bytes) -> bytes:
        """Sign a statement that travels by itself: key id, ``domain`` and ``statement``; return the signature
        (64 bytes).
        """
        return self._signing().sign(domain + self._kid + statement).signature


class _Trusted:
    """A keyset by key id; verify keys are reused from the previous keyset where unchanged."""

    __slots__ = ("keys", "keyset", "revoked")

    def __init__(self, keyset: Keyset, known: Mapping[bytes, tuple[IdentityRecord, nacl.signing.VerifyKey]]) -> None:
        self.keyset = keyset
        self.revoked = {item.kid: item.name for item in keyset.revoked}
        self.keys = {
            record.kid: (record, _verify_key(record, known))
            for record in keyset.identities
            if record.kid not in self.revoked
        }

    def lookup(self, kid: bytes, now: int, *, stored: bool) -> tuple[IdentityRecord, nacl.signing.VerifyKey]:
        found = self.keys.get(kid)
        if found is None:
            if (name := self.revoked.get(kid)) is not None:
                raise KeyRevoked(f"the key of '{name}' was revoked")
            raise UnknownKey(f"no identity in the keyset has the key {kid.hex()}")
        record = found[0]
        if now >= self.keyset.expires_at:
            raise KeyExpired("the keyset is expired; renew it with 'tether identity renew'")
        if record.not_before - MAX_SKEW_MS > now:
            early_s = (record.not_before - now) // 1000
            raise KeyExpired(
                f"the key of '{record.name}' is expired or not yet valid: it begins in {early_s} s; if it "
                "is in use, this "
                f"machine's clock is that much behind, and at most {MAX_SKEW_MS // 1000} s are allowed: set the clocks"
            )
        if now >= record.expires_at and not stored:
            raise KeyExpired(f"the key of '{record.name}' is expired or not yet valid")
        return found


def _verify_key(
    record: IdentityRecord, known: Mapping[bytes, tuple[IdentityRecord, nacl.signing.VerifyKey]]
) -> nacl.signing.VerifyKey:
    before = known.get(record.kid)
    if before is not None and before[0].ed25519 == record.ed25519:
        return before[1]
    return nacl.signing.VerifyKey(record.ed25519)


class Verifier:
    """Verifies frames against a replaceable keyset. One per connection; a verify key is built once."""

    def __init__(self, keyset: Keyset, now_ms: Callable[[], int], *, replay_capacity: int = 65536) -> None:
        self._now_ms = now_ms
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._replay_capacity = replay_capacity
        self._trusted = _Trusted(keyset, {})
        self._replaced: list[Callable[[], None]] = []

    @property
    def keyset(self) -> Keyset:
        """The keyset currently trusted."""
        return self._trusted.keyset

    def replace(self, keyset: Keyset) -> None:
        """Verify against another keyset from the next frame on; seen nonces stay remembered."""
        self._trusted = _Trusted(keyset, self._trusted.keys)
        for callback in list(self._replaced):
            callback()

    def on_replace(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` whenever the keyset is replaced. Return a function that stops that."""
        self._replaced.append(callback)
        return lambda: self._replaced.remove(callback)

    def verify_envelope(
        self,
        frame: bytes,
        *,
        subject: str,
        types: tuple[MessageType, ...],
        once: bool = False,
        max_age_ms: int = 0,
        stored: bool = False,
        grace_ms: int = 0,
    ) -> Envelope:
        """Verify ``frame``, which arrived on ``subject``, and return header and body.

        ``types`` are the message types that this receiver accepts there. ``once`` refuses a nonce seen within
        ``REPLAY_WINDOW_MS``, for requests that act on arrival; ``max_age_ms`` refuses older messages (0: any
        age, or a minute with ``once``, so that no nonce is forgotten before its message is too old). A
        ``stored`` message stays valid if its key was in force when it was signed; a revoked key is never
        valid. Expired messages are accepted for ``grace_ms`` longer,
        because the sender's clock may be behind.

        Raises:
            Unsigned, BadEncoding, UnknownKey, KeyRevoked, KeyExpired, BadSignature, RoleNotAllowed,
        SubjectMismatch,
            EnvelopeExpired, ClockSkew, Replayed: before the body is decoded.
        """
        record, header, body = self._authenticate(frame, stored=stored)
        if header.role != record.role or header.type not in record.types:
            raise RoleNotAllowed(f"'{record.name}' ({record.role}) may not send '{header.type}'")
        if header.subject != subject:
            raise SubjectMismatch("the frame was signed for another subject than the one it arrived on")
        if header.type not in types:
            raise RoleNotAllowed(f"'{header.type}' is not handled on this subject")
        try:
            self._check_time(record.name, header, max_age_ms or (60_000 if once else 0), grace_ms)
        except (ClockSkew, EnvelopeExpired) as error:
            error.sender, error.role, error.reply = record.name, record.role.value, header.reply
            error.age_s = (self._now_ms() - header.issued_at) / 1000
            raise
        if len(body) != header.body_length or hashlib.sha256(body).digest() != header.body_digest:
            raise BadSignature("the body is not the one that was signed")
        if once:
            self._refuse_replay(header.nonce)
        return Envelope(header, body, record.name, record.tenant)

    def verify_statement(self, domain: bytes, kid: bytes, statement: bytes, signature: bytes) -> IdentityRecord:
        """Return the signer of a statement from :meth:`Signer.sign_statement`.

        Raises:
            UnknownKey, KeyRevoked, KeyExpired, BadSignature: the signature is not valid.
        """
        record, key = self._trusted.lookup(kid, self._now_ms(), stored=False)
        try:
            key.verify(domain + kid + statement, signature)
        except (nacl.exceptions.BadSignatureError, ValueError) as error:
            raise BadSignature("the statement's signature does not match") from error
        return record

    def _authenticate(self, frame: bytes, *, stored: bool) -> tuple[IdentityRecord, Header, bytes]:
        if len(frame) < _PREFIX.size or frame[:4] != MAGIC:
            raise Unsigned("the message is not a signed envelope")
        _, version, length, signature = _PREFIX.unpack_from(frame)
        end = _PREFIX.size + length
        if version != VERSION or not KID_BYTES < length <= MAX_HEADER or end > len(frame):
            raise BadEncoding("the envelope's version or length is not one this receiver knows")
        header = frame[_PREFIX.size : end]
        record, key = self._trusted.lookup(header[:KID_BYTES], self._now_ms(), stored=stored)
        try:
            key.verify(DOMAIN + header, signature)
        except nacl.exceptions.BadSignatureError as error:
            raise BadSignature("the envelope's signature does not match") from error
        fields = _decode_header(header[KID_BYTES:])
        if stored and fields.issued_at >= record.expires_at:
            raise KeyExpired(f"the key of '{record.name}' was expired when it signed this")
        return record, fields, frame[end:]

    def _check_time(self, sender: str, header: Header, max_age_ms: int, grace_ms: int) -> None:
        now = self._now_ms()
        age = now - header.issued_at
        if age < -MAX_SKEW_MS:
            raise ClockSkew(
                f"'{sender}' issued the message {-age} ms in the future: its clock is ahead, or this one's behind; "
                "set the clocks"
            )
        if max_age_ms and age > max_age_ms:
            raise EnvelopeExpired(
                f"the message of '{sender}' is {age} ms old, and at most {max_age_ms} ms are allowed: it "
                "was delayed, or its "
                "sender's clock is behind"
            )
        if header.expires_at and now >= header.expires_at + grace_ms:
            raise EnvelopeExpired(f"the message of '{sender}' expired {now - header.expires_at} ms ago")

    def _refuse_replay(self, nonce: bytes) -> None:
        now = self._now_ms()
        while self._seen and (
            next(iter(self._seen.values())) < now - REPLAY_WINDOW_MS or len(self._seen) >= self._replay_capacity
        ):
            self._seen.popitem(last=False)
        if nonce in self._seen:
            raise Replayed("the message was received before")
        self._seen[nonce] = now


def _decode_header(data: bytes) -> Header:
    fields = codec.unpack(data)
    try:
        return msgspec.convert(fields, Header, strict=True)
    except msgspec.ValidationError as error:
        raise BadEncoding(f"the envelope's header does not have the expected form: {error}", raw=data) from error
