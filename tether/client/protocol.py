"""What a client asks and how it reads the answers, without a socket.

Every operation is a *flow*: a generator that yields :class:`Request`, :class:`Sleep` or :class:`Concurrently`, is sent a
:class:`Response` or :class:`NoResponse` for each ``Request`` and the results for a ``Concurrently``, and returns its result.
:mod:`tether.client.driver` drives the same flows with blocking and with asynchronous HTTP.
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
"""Request header: seconds that the client still waits for the answer."""
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
    400: "the request is not one that it can read",
    414: "the path or the query is too long",
    431: "the headers are too large or too many",
}
"""What a status says that comes without a body, as from an HTTP server that has not asked its application."""


@dataclass(frozen=True)
class Request:
    """One HTTP request. ``timeout`` is in seconds; ``repeatable``: sending it twice does what sending it once does."""

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
    """An HTTP answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class NoResponse:
    """No answer came. ``sent``: the server may have acted on the request; ``late``: its time was up."""

    reason: str
    sent: bool
    late: bool = False


@dataclass(frozen=True)
class Concurrently:
    """Several flows, ``width`` of them at a time, each taken when its turn comes. Their results come back in order; ``done`` is told of
    each as it ends, one at a time. The first error ends them."""

    flows: Iterable[Flow[Any]]
    width: int
    done: Callable[[Any], None]


Flow = Generator[Request | Sleep | Concurrently, Any, T]


Waiting = Callable[[str], None]
"""Told what is waited for, in words; empty when it goes on."""


def unwatched(_: str) -> None:
    """Nobody wants to know what is waited for."""


@dataclass
class OperationDeadline:
    """The time that all requests of one operation share; it ends at ``until``, by the clock of the client's policy."""

    until: float
    waiting: Waiting = unwatched
    answered: bool = False
    """Whether a server was heard of yet: one that was is waited for until the time is over, whatever it does meanwhile."""


@dataclass(frozen=True)
class RetryPolicy:
    """How a client waits: seconds for one operation, tries in a row without an answer, its clock and its chance.

    With ``patience`` all requests together have its time, and each tells the gateway how much of it is left.
    """

    timeout: float = 30.0
    tries: int = 8
    patience: OperationDeadline | None = None
    monotonic: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random

    def pause(self, tried: int, at_least: float = 0.0) -> float:
        """Seconds before the next try: doubling up to two seconds, half of it by chance, never under ``at_least``."""
        return max(at_least, float(min(2.0, 0.1 * 2 ** (tried - 1)) * (0.5 + self.chance() / 2)))


def failure(got: Response | NoResponse | None) -> TetherError | None:
    """The error an answer stands for, None when it is a good one."""
    if not isinstance(got, Response):
        reason = got.reason if got else "no answer"
        late = isinstance(got, NoResponse) and got.late
        return DeadlineExceeded(f"no answer in time: {reason}") if late else Unavailable(f"no answer: {reason}")
    if got.status < 400:
        return None
    try:
        told = msgspec.json.decode(got.body)
        error = by_code(str(told["code"]), str(told["error"]))
    except (msgspec.MsgspecError, KeyError, TypeError):
        text = got.body[:200].decode("utf-8", "replace").strip() or _PHRASES.get(got.status, "no body")
        error = _BY_STATUS.get(got.status, TetherError)(f"the server answered HTTP {got.status}: {text}")
    if isinstance(error, Unavailable):
        error.retry_after = _seconds(got.headers.get("retry-after", ""))
    return error


def _seconds(text: str) -> float:
    try:
        return min(max(0.0, float(text)), 3600.0)
    except ValueError:
        return 1.0


def exchange(policy: RetryPolicy, ask: Request, *, longer: float = 0.0) -> Flow[Response]:
    """Send until there is an answer, within ``policy.timeout`` and ``longer`` seconds in all, or within its patience.

    Connections that were refused are tried again, and 429 and 503 after their ``Retry-After``; an answer that got
    lost only where ``ask.repeatable``.

    Raises:
        TetherError: what the server answered, or Unavailable or DeadlineExceeded when it did not.
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
    """Whether no more is tried although there is time."""
    if policy.patience is None or not policy.patience.answered:
        return lost >= policy.tries
    # room comes when somebody makes some, not by waiting
    return isinstance(error, StorageFull | QuotaExceeded)


def exchange_json(policy: RetryPolicy, ask: Request, kind: type[T], *, longer: float = 0.0) -> Flow[T]:
    """The same, the answer decoded as ``kind``."""
    reply = yield from exchange(policy, ask, longer=longer)
    try:
        return msgspec.json.decode(reply.body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise bad_json(error, where=f"the answer to {ask.method} {ask.path}") from error
