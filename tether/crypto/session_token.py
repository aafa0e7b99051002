"""Session tokens: signed by a gateway, valid at every gateway, carried by a client.

As text: ``ts_`` + base64url(payload) + ``.`` + base64url(signature), without padding. The payload is the key
id of the signing gateway (16 bytes), then the msgpack array of :class:`Session`. The Ed25519 signature covers
``SESSION_DOMAIN | payload``, so it cannot pass for an envelope's.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from tether.crypto.envelope import Signer, Verifier
from tether.crypto.keyset import KID_BYTES
from tether.crypto.roles import Role
from tether.errors import BadEncoding, RoleNotAllowed, Unsigned
from tether.wire import codec

SESSION_DOMAIN = b"tether/session/v1\0"
SESSION_PREFIX = "ts_"
MAX_SESSION_TEXT = 6144
"""Maximum length of a token, which must fit into one header."""


class Session(msgspec.Struct, frozen=True, array_like=True):
    """A short-lived grant derived from an API key. Times are UTC seconds."""

    id: str
    key: str
    """Id of the API key that it was created with, and is revoked with."""
    tenant: str
    scopes: tuple[str, ...]
    models: tuple[str, ...]
    issued_at: float
    expires_at: float


def issue_session(signer: Signer, session: Session) -> str:
    """Return the token of a session.

    Raises:
        BadEncoding: it would not fit into a header.
    """
    body = codec.pack(msgspec.to_builtins(session))
    signature = signer.sign_statement(SESSION_DOMAIN, body)
    text = f"{SESSION_PREFIX}{_text(signer.kid + body)}.{_text(signature)}"
    if len(text) > MAX_SESSION_TEXT:
        raise BadEncoding(
            f"the session token would have {len(text)} characters; at most {MAX_SESSION_TEXT} are allowed"
        )
    return text


def open_session(verifier: Verifier, text: str) -> Session:
    """Verify a token and return its session; the caller checks the expiry.

    Raises:
        Unsigned, BadEncoding, UnknownKey, KeyRevoked, KeyExpired, BadSignature, RoleNotAllowed: the token is
    not valid.
    """
    if not text.startswith(SESSION_PREFIX) or len(text) > MAX_SESSION_TEXT:
        raise Unsigned("the text is not a session token")
    head, _, tail = text[len(SESSION_PREFIX) :].partition(".")
    payload, signature = _bytes(head), _bytes(tail)
    kid, body = payload[:KID_BYTES], payload[KID_BYTES:]
    record = verifier.verify_statement(SESSION_DOMAIN, kid, body, signature)
    if record.role is not Role.GATEWAY:
        raise RoleNotAllowed(f"'{record.name}' ({record.role}) may not issue sessions")
    try:
        return msgspec.convert(codec.unpack(body), Session, strict=True)
    except msgspec.ValidationError as error:
        raise BadEncoding("the session does not have the expected form") from error


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadEncoding("the session token is not base64url") from error
