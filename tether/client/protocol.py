"""Requests, replies and retries of a client, without sockets.

Every operation is a *flow*: a generator that yields :class:`Request`, :class:`Sleep` or
:class:`Concurrently`, receives a :class:`Response` or :class:`NoResponse` per ``Request`` and the results of
a ``Concurrently``, and returns its result. :mod:`tether.client.driver` drives the same flows with blocking
and with asynchronous HTTP.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from tether.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    ModelRejected,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    QuotaExceeded,
    StorageFull,
    TetherError,
    Unauthenticated,
    Unavailable,
    by_code,
)
from tether.wire.oip import bad_json

T = TypeVar("T")
TIMEOUT_HEADER = "x-tether-timeout-s"
"""Request header: remaining seconds of the client's timeout."""
Progress = Callable[[int], None]

_BY_STATUS: dict[int, type[TetherError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    414: InvalidRequest,
    422: ModelRejected,
    429: QueueFull,
    431: InvalidRequest,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}

_PHRASES = {
    400: "the server cannot parse the request",
    414: "the path or the query is too long",
    431: "the headers are too large or too many",
}
"""Texts for statuses without a body, as sent by an HTTP server before it calls its application."""


@dataclass(frozen=True)
class Request:
    """One HTTP request. ``timeout`` is in seconds; ``repeatable`` marks an idempotent request."""

    method: str
    path: str
    content: bytes = b""
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    timeout: float = 30.0


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Response:
    """An HTTP response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class NoResponse:
    """A missing response. ``sent``: the server may have acted on the request; ``late``: it timed out."""

    reason: str
    sent: bool
    late: bool = False


@dataclass(frozen=True)
class Concurrently:
    """Several flows, at most ``width`` at a time. Results keep their order; ``done`` is called with each, one
    at a time.

    The first error cancels the rest.
    """

    flows: Iterable[Flow[Any]]
    width: int
    done: Callable[[Any], None]


Flow = Generator[Request | Sleep | Concurrently, Any, T]


Waiting = Callable[[str], None]
"""Called with the reason of a wait, and with an empty text when it is over."""


def unwatched(_: str) -> None:
    """Ignore the reason of a wait."""


@dataclass
class OperationDeadline:
    """Deadline shared by all requests of one operation: ``until``, on the clock of the client's policy."""

    until: float
    waiting: Waiting = unwatched
    answered: bool = False
    """True once a server has answered: then retries go on until the deadline."""


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy: timeout of one operation in seconds, tries in a row without a response, clock and
    randomness.

    With ``patience``, all requests share its deadline, and each sends the remaining time to the gateway.
    """

    timeout: float = 30.0
    tries: int = 8
    patience: OperationDeadline | None = None
    monotonic: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random

    def pause(self, tried: int, at_least: float = 0.0) -> float:
        """Return the seconds before the next try: doubling up to two seconds, half of it jitter, at least
        ``at_least``."""
        return max(at_least, float(min(2.0, 0.1 * 2 ** (tried - 1)) * (0.5 + self.chance() / 2)))


def failure(got: Response | NoResponse | None) -> TetherError | None:
    """Return the error that a response stands for; None if it is a success."""
    if not isinstance(got, Response):
        reason = got.reason if got else "no answer"
        late = isinstance(got, NoResponse) and got.late
        return DeadlineExceeded(f"no response in time: {reason}") if late else Unavailable(f"no response: {reason}")
    if got.status < 400:
        return None
    try:
        body = msgspec.json.decode(got.body)
        error = by_code(str(body["code"]), str(body["error"]))
    except (msgspec.MsgspecError, KeyError, TypeError):
        text = got.body[:200].decode("utf-8", "replace").strip() or _PHRASES.get(got.status, "no body")
        error = _BY_STATUS.get(got.status, TetherError)(f"the server responded with HTTP {got.status}: {text}")
    if isinstance(error, Unavailable):
        error.retry_after = _seconds(got.headers.get("retry-after", ""))
    return error


def _seconds(text: str) -> float:
    try:
        return min(max(0.0, float(text)), 3600.0)
    except ValueError:
        return 1.0


def exchange(policy: RetryPolicy, ask: Request, *, longer: float = 0.0) -> Flow[Response]:
    """Send until there is a response, within ``policy.timeout`` plus ``longer`` seconds, or until its
    deadline.

    Refused connections are retried, 429 and 503 after their ``Retry-After``, lost replies only if
    ``ask.repeatable``.

    Raises:
        TetherError: the server's error, or Unavailable or DeadlineExceeded without a response.
    """
    patience = policy.patience
    end = policy.monotonic() + policy.timeout + longer if patience is None else patience.until
    tried = lost = 0
    while True:
        got = yield _timed(ask, end - policy.monotonic(), tell=patience is not None)
        error = failure(got)
        if patience is not None:
            patience.answered = patience.answered or isinstance(got, Response)
            patience.waiting("" if error is None else error.message)
        if error is None and isinstance(got, Response):
            return got
        tried += 1
        lost = lost + 1 if isinstance(got, NoResponse) else 0
        may = ask.repeatable or (not got.sent if isinstance(got, NoResponse) else isinstance(error, QueueFull))
        if error is None or not may or not isinstance(error, Unavailable) or _given_up(policy, error, lost):
            raise error or Unavailable("no answer")
        pause = policy.pause(tried, 0.0 if isinstance(got, NoResponse) else error.retry_after)
        if policy.monotonic() + pause >= end:
            raise error
        yield Sleep(pause)


def _timed(ask: Request, left_s: float, *, tell: bool) -> Request:
    left_s = max(0.05, left_s)
    headers = {**ask.headers, TIMEOUT_HEADER: f"{left_s:.2f}"} if tell else ask.headers
    return replace(ask, timeout=left_s, headers=headers)


def _given_up(policy: RetryPolicy, error: TetherError, lost: int) -> bool:
    """Return True if retrying stops before the deadline."""
    if policy.patience is None or not policy.patience.answered:
        return lost >= policy.tries
    # waiting does not free quota or disk
    return isinstance(error, StorageFull | QuotaExceeded)


def exchange_json(policy: RetryPolicy, ask: Request, kind: type[T], *, longer: float = 0.0) -> Flow[T]:
    """Exchange a request as :func:`exchange` does; decode the response as ``kind``."""
    reply = yield from exchange(policy, ask, longer=longer)
    try:
        return msgspec.json.decode(reply.body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise bad_json(error, where=f"the response to {ask.method} {ask.path}") from error
