"""The one error tree.

::

    TetherError
    ├── InvalidRequest        the caller sent something wrong; nothing was queued
    │   ├── BadJson           the body is not the JSON it should be
    │   ├── BadTensor         a tensor's name, datatype, shape or bytes do not fit
    │   ├── BadName           a name a client chose is not allowed
    │   ├── RequestTimeout    the body did not arrive in time
    │   └── PayloadTooLarge   more bytes than a limit allows
    ├── Unauthenticated       no valid API key
    ├── Forbidden             the key is valid, the action is not its to do
    ├── NotFound
    │   ├── ModelNotFound
    │   └── JobNotFound
    ├── Conflict
    │   ├── IdempotencyConflict   the key was used for another request
    │   ├── ResultConflict        the job has already ended
    │   └── VersionConflict       two writers wanted the same version
    ├── Unavailable           try again later
    │   ├── ModelNotReady
    │   ├── QueueFull
    │   ├── RateLimited       the key or its tenant asks more often than it may
    │   ├── QuotaExceeded     the tenant has as much as it may have
    │   ├── StorageFull       there is no room to store anything more: a disk, or a store's own bound
    │   ├── TmpfsUnavailable    there is no place in memory for an encrypted model
    │   └── BrokerUnavailable ├── DeadlineExceeded ├── JobCancelled
    ├── InferenceFailed       the model raised
    │   ├── OutputMisfit          its output is not what it declares
    │   ├── AttemptsExhausted     every attempt ended without an answer
    │   └── ResultTooLarge
    ├── ModelRejected         a pushed model cannot be served
    │   ├── FormatNotAllowed  it is of a format that is not served
    │   ├── UnsafeModel       it reaches outside of itself
    │   └── InspectionLimitExceeded       looking at it took more than it may
    ├── CorruptChunk          stored bytes do not match their digest
    ├── EnvelopeError         a message that must not be acted on
    │   ├── Unsigned, BadEncoding, BadSignature, SubjectMismatch, Replayed
    │   ├── EnvelopeExpired, ClockSkew
    │   ├── UnknownKey, KeyExpired, KeyRevoked, RoleNotAllowed
    │   ├── StaleEntry         an entry of another key, or one that was replaced
    │   └── NoDecryptionKey, DecryptionFailed  a sealed payload cannot be opened here
    ├── KeysetError           the set of identities cannot be trusted
    ├── ConfigError           a setting, a file or the machine is not as it must be
    └── PermissionDenied      the broker refused a subject to this identity

Every class has a stable ``code`` (an interface: clients match on it), and says whether the same request
may succeed when it is sent again (``retryable``). HTTP statuses live in ``gateway_http``, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


def one_line(text: str) -> str:
    """Escape control and format characters of ``text``: text from others ends no line and moves no cursor."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


class TetherError(Exception):
    """Base of every error that Tether raises on purpose.

    ``message`` is one line for a person; ``field`` names the invalid input, if there is one.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    hidden = False
    """The object exists, but the caller may not know of it: reported as missing, and audited as a refusal."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        message = one_line(message)
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidRequest(TetherError):
    code = "invalid_request"


class BadJson(InvalidRequest):
    code = "bad_json"


class BadTensor(InvalidRequest):
    code = "bad_tensor"


class BadName(InvalidRequest):
    code = "bad_name"


class PayloadTooLarge(InvalidRequest):
    code = "payload_too_large"


class RequestTimeout(InvalidRequest):
    code = "request_timeout"
    retryable = True


class Unauthenticated(TetherError):
    code = "unauthenticated"


class Forbidden(TetherError):
    code = "forbidden"


class NotFound(TetherError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class ModelUnloaded(ModelNotFound):
    code = "model_unloaded"


class JobNotFound(NotFound):
    code = "job_not_found"


class Conflict(TetherError):
    code = "conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class ResultConflict(Conflict):
    code = "result_conflict"


class VersionConflict(Conflict):
    code = "version_conflict"
    retryable = True


class Unavailable(TetherError):
    """``retry_after``: seconds that a caller should wait before the next attempt."""

    code = "unavailable"
    retryable = True

    def __init__(self, message: str, *, field: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, field=field)
        self.retry_after = retry_after


class ModelNotReady(Unavailable):
    code = "model_not_ready"


class QueueFull(Unavailable):
    code = "queue_full"


class RateLimited(Unavailable):
    """``limit`` requests are allowed in the window that ends in ``reset`` seconds; ``remaining`` of them are left."""

    code = "rate_limited"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after: float = 1.0,
        limit: int = 0,
        remaining: int = 0,
        reset: float = 1.0,
    ) -> None:
        super().__init__(message, field=field, retry_after=retry_after)
        self.limit = limit
        self.remaining = remaining
        self.reset = reset


class QuotaExceeded(Unavailable):
    code = "quota_exceeded"


class StorageFull(Unavailable):
    """Nothing was stored. The message names the full store, and how to free space in it."""

    code = "storage_full"

    def __init__(self, message: str, *, field: str | None = None, retry_after: float = 10.0) -> None:
        super().__init__(message, field=field, retry_after=retry_after)


class TmpfsUnavailable(Unavailable):
    code = "tmpfs_unavailable"


class BrokerUnavailable(Unavailable):
    code = "broker_unavailable"


class DeadlineExceeded(TetherError):
    code = "deadline_exceeded"
    retryable = True


class JobCancelled(TetherError):
    code = "job_cancelled"


class ClientDisconnected(TetherError):
    """Appears in metrics, logs and the audit log only: there is no connection left to answer on."""

    code = "client_disconnected"


class InferenceFailed(TetherError):
    code = "inference_failed"


class OutputMisfit(InferenceFailed):
    """The model's output does not match its signature, whatever the input was."""

    code = "output_misfit"


class AttemptsExhausted(InferenceFailed):
    code = "attempts_exhausted"


class JobLost(InferenceFailed):
    code = "job_lost"


class ResultTooLarge(InferenceFailed):
    code = "result_too_large"


class ModelRejected(TetherError):
    code = "model_rejected"


class FormatNotAllowed(ModelRejected):
    code = "format_not_allowed"


class UnsafeModel(ModelRejected):
    code = "unsafe_model"


class InspectionLimitExceeded(ModelRejected):
    code = "inspection_limit_exceeded"


class CorruptChunk(TetherError):
    code = "corrupt_chunk"
    retryable = True


class EnvelopeError(TetherError):
    """For a verified message with an invalid time: its signer, the signer's role and reply subject, and its
    age in seconds (negative: from the future).
    """

    code = "bad_envelope"
    sender = ""
    role = ""
    reply = ""
    age_s = 0.0


class Unsigned(EnvelopeError):
    code = "unsigned"


class BadEncoding(EnvelopeError):
    """``raw`` keeps the bytes that could not be decoded."""

    code = "bad_encoding"

    def __init__(self, message: str, *, field: str | None = None, raw: bytes = b"") -> None:
        super().__init__(message, field=field)
        self.raw = raw


class BadSignature(EnvelopeError):
    code = "bad_signature"


class SubjectMismatch(EnvelopeError):
    code = "subject_mismatch"


class Replayed(EnvelopeError):
    code = "replay"


class EnvelopeExpired(EnvelopeError):
    code = "expired"


class ClockSkew(EnvelopeError):
    code = "clock_skew"


class UnknownKey(EnvelopeError):
    code = "unknown_key"


class KeyExpired(EnvelopeError):
    code = "key_expired"


class KeyRevoked(EnvelopeError):
    code = "key_revoked"


class RoleNotAllowed(EnvelopeError):
    code = "role_not_allowed"


class StaleEntry(EnvelopeError):
    code = "stale_entry"


class NoDecryptionKey(EnvelopeError):
    code = "no_decryption_key"


class DecryptionFailed(EnvelopeError):
    code = "decryption_failed"


class KeysetError(TetherError):
    """``reason`` is one word for metrics: unsigned, undecodable, older, conflict or not_in_force."""

    code = "keyset_invalid"

    def __init__(self, message: str, *, field: str | None = None, reason: str = "unsigned") -> None:
        super().__init__(message, field=field)
        self.reason = reason


class ConfigError(TetherError):
    code = "config_invalid"


class PermissionDenied(TetherError):
    code = "permission_denied"


def all_errors(base: type[TetherError] = TetherError) -> Iterator[type[TetherError]]:
    """Return every class of the tree, the base first, for the docs test and the HTTP map."""
    yield base
    for child in base.__subclasses__():
        yield from all_errors(child)


def by_code(code: str, message: str) -> TetherError:
    """Rebuild an error received over the wire from its code; an unknown code becomes the base class."""
    for cls in all_errors():
        if cls.code == code:
            return cls(message)
    return TetherError(message)
