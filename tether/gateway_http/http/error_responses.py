"""Error bodies, and the HTTP status of each error class."""

from __future__ import annotations

import math

import msgspec

from tether import errors

STATUSES: dict[type[errors.TetherError], int] = {
    errors.TetherError: 500,
    errors.InvalidRequest: 400,
    errors.PayloadTooLarge: 413,
    errors.RequestTimeout: 408,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Unavailable: 503,
    errors.QueueFull: 429,
    errors.RateLimited: 429,
    errors.QuotaExceeded: 429,
    errors.DeadlineExceeded: 504,
    errors.JobCancelled: 409,
    errors.ClientDisconnected: 499,
    errors.InferenceFailed: 422,
    errors.AttemptsExhausted: 500,
    errors.JobLost: 500,
    errors.ModelRejected: 422,
    errors.CorruptChunk: 503,
}
"""Status by class; an unlisted class has the status of its nearest base."""


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error."""

    error: str
    code: str
    request_id: str


def limit_headers(limit: int, remaining: int, reset_s: float) -> list[tuple[str, str]]:
    """Return headers with a limit's burst, its remainder, and the seconds until it is full again."""
    return [
        ("x-ratelimit-limit", str(limit)),
        ("x-ratelimit-remaining", str(remaining)),
        ("x-ratelimit-reset", str(math.ceil(reset_s))),
    ]


def status_of(error: errors.TetherError) -> int:
    for cls in type(error).__mro__:
        if cls in STATUSES:
            return STATUSES[cls]
    return 500


def error_response(
    error: errors.TetherError, request_id: str, message: str | None = None
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return status, extra headers and body of an error, with ``message`` in place of its own.

    Internal errors (500) carry no details.
    """
    status = status_of(error)
    headers: list[tuple[str, str]] = []
    if isinstance(error, errors.Unavailable):
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
    if isinstance(error, errors.RateLimited):
        headers += limit_headers(error.limit, error.remaining, error.reset)
    if status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return status, headers, msgspec.json.encode(ErrorBody(message or error.message, error.code, request_id))
