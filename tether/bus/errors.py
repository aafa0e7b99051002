"""Translates NATS errors into ours, at the only place where they enter."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import msgspec
import nats.errors

from tether.bus.tls import TlsMismatchError
from tether.errors import (
    BrokerUnavailable,
    ConfigError,
    PayloadTooLarge,
    PermissionDenied,
    QueueFull,
    ResultConflict,
    StorageFull,
    TetherError,
    VersionConflict,
)

_PERMISSION = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"', re.IGNORECASE)


_STREAM_FULL = 10077
_SERVER_FULL = (10023, 10047)
"""Error codes: insufficient resources; insufficient storage."""

_AWAY = frozenset({10004, 10005, 10007, 10008, 10009, 10118, 10119, 10158, 10163, 10194, 10195})
"""Error codes of a cluster while servers are away or leaders are elected: results are incomplete; no peer for a
stream; not assigned to this server; temporarily unavailable; not the leader; a stream or consumer is offline
(with a reason: 10194, 10195); the same message is being stored; the last sequence of a subject is not yet
known. The same request succeeds later.
"""


class JetStreamError(TetherError):
    """The broker refused a JetStream request for a reason without its own class."""

    code: ClassVar[str] = "jetstream_error"

    def __init__(self, message: str, *, err_code: int = 0, status: int = 0) -> None:
        super().__init__(message)
        self.err_code = err_code
        self.status = status


class ApiError(msgspec.Struct, frozen=True):
    """The ``error`` object of a JetStream answer (NATS ADR-1)."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct, frozen=True, rename={"sequence": "seq"}):
    """The broker's acknowledgement of a stored message; ``duplicate``: it already had one with this message id."""

    sequence: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_ACK = msgspec.json.Decoder(PubAck)


def parse_ack(data: bytes, headers: Mapping[str, str] | None, subject: str) -> PubAck:
    """Decode the answer to a JetStream publish.

    Raises:
        QueueFull, StorageFull, ResultConflict, VersionConflict, PayloadTooLarge, BrokerUnavailable,
    JetStreamError
    """
    status = (headers or {}).get("Status", "")
    if status == "503":
        raise BrokerUnavailable(f"no stream takes '{subject}' at the moment")
    if status == "429":
        raise QueueFull("the broker is taking in more than it can store")
    try:
        ack = _ACK.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise JetStreamError(f"the broker's answer to a publish on '{subject}' cannot be decoded") from error
    if ack.error is not None:
        raise translate(ack.error)
    return ack


def translate(error: ApiError) -> TetherError:
    """Return the most specific error class for an answer of the JetStream API."""
    text = error.description or f"JetStream error {error.err_code}"
    if (full := _full(error, text)) is not None:
        return full
    if error.err_code in (10071, 10164):
        return VersionConflict(text)
    if error.err_code == 10054:
        return PayloadTooLarge(f"the message is larger than its stream allows ({text})")
    if error.code == 503 or error.err_code in _AWAY:
        return BrokerUnavailable(f"JetStream is not available ({text})")
    return JetStreamError(text or "JetStream refused the request", err_code=error.err_code, status=error.code)


def undone(data: bytes, headers: Mapping[str, str] | None) -> bool:
    """Return whether the answer to a publish means that nothing was stored, for a temporary reason."""
    if (headers or {}).get("Status", "") == "503":
        return True
    if b'"error"' not in data:
        return False
    try:
        error = _ACK.decode(data).error
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False
    return error is not None and isinstance(translate(error), BrokerUnavailable)


def _full(error: ApiError, text: str) -> TetherError | None:
    """Return the store that is full, if that is the reason."""
    if error.err_code == _STREAM_FULL and "per subject" in text:
        return ResultConflict("there is already an entry on this subject")
    if error.err_code in _SERVER_FULL:
        return StorageFull(f"the broker has used up its own limits ({text}); raise max_memory_mb or max_file_mb")
    if error.err_code == _STREAM_FULL or error.code == 429:
        return QueueFull(f"the broker is at its limit ({text})")
    return None


def denied_subject(message: str) -> tuple[str, str] | None:
    """Parse an asynchronous ``permissions violation``: 'publish' or 'subscription', and the subject.

    nats-py passes the server's text on in lower case.
    """
    match = _PERMISSION.search(message)
    return None if match is None else (match[1].lower(), match[2].lower())


def permission_denied(verb: str, subject: str) -> PermissionDenied:
    """Build the error. ``verb`` is 'publish' or 'subscription'; ``field`` is the subject."""
    return PermissionDenied(f"this identity has no {verb} permission for '{subject}'", field=subject)


def _tls_failure(error: ssl.SSLError) -> str:
    """Describe a TLS failure: whose certificate was refused, why, and the setting that fixes it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message.rstrip(".")
        return f"the broker's certificate is not accepted ({reason}); set nats_ca to the file of the CA that signed it"
    reason = (error.reason or "handshake failed").replace("_", " ").lower()
    if "certificate" in reason or "unknown ca" in reason:
        return f"the broker requires a certificate that it accepts ({reason}); set nats_cert and nats_key"
    return f"TLS with the broker failed ({reason})"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Translate exceptions of nats-py into errors of the tree; ``what`` names the attempted action."""
    try:
        yield
    except nats.errors.MaxPayloadError as error:
        raise PayloadTooLarge(f"{what}: the message is larger than the broker's max_payload") from error
    except nats.errors.AuthorizationError as error:
        raise ConfigError(f"{what}: the broker refused this identity; run 'tether doctor'") from error
    except TlsMismatchError as error:
        raise BrokerUnavailable(f"{what}: {error}") from error
    except ssl.SSLError as error:
        raise BrokerUnavailable(f"{what}: {_tls_failure(error)}") from error
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise BrokerUnavailable(f"{what}: no answer from the broker ({type(error).__name__})") from error
