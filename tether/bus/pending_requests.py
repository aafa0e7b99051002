"""Requests of a connection without an answer yet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

from tether.errors import BrokerUnavailable

_AGAIN_S = 0.05
_AGAIN_MOST_S = 0.25
_LOSSY = ContextVar("lossy", default=False)


class Message(Protocol):
    """A message received on a subscription."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


class PendingReply:
    """One outstanding request: a future for a single answer, or a list for a batch."""

    __slots__ = ("collected", "future", "lossy", "subject")

    def __init__(self, future: asyncio.Future[Message], subject: str) -> None:
        self.future = future
        self.subject = subject
        self.collected: list[Message] | None = None
        self.lossy = _LOSSY.get()

    def fail(self, why: str) -> None:
        """Fail the request, unless it has its answer."""
        if not self.future.done():
            self.future.set_exception(BrokerUnavailable(why))

    def expire(self) -> None:
        self.fail(f"no answer on '{self.subject}' in time")

    def lose(self) -> None:
        """Fail the request because the connection was lost."""
        if self.lossy:
            self.fail("the connection to the broker was lost during the request")


@contextlib.contextmanager
def fail_on_disconnect() -> Iterator[None]:
    """Fail pending requests of this task on disconnect instead of on timeout. Use only for idempotent requests."""
    token = _LOSSY.set(True)
    try:
        yield
    finally:
        _LOSSY.reset(token)


def status_of(message: Message) -> str:
    """Return the status in an answer of the server or a stream; empty for an answer without one."""
    return (message.headers or {}).get("Status", "")


def untaken(answer: Message) -> bool:
    """Return whether no service received the request."""
    return status_of(answer) == "503"


async def patiently(
    ask: Callable[[float], Awaitable[Message]], timeout: float, undone: Callable[[Message], bool] = untaken
) -> Message:
    """Retry an unreceived request for ``timeout`` seconds in all: a cluster that elects a stream's leader has
    no receiver.
    ``undone`` tells from an answer that nothing was done; a request without an answer may have been executed.
    """
    now = asyncio.get_running_loop().time
    end, pause = now() + timeout, _AGAIN_S
    while True:
        answer = await ask(max(0.0, end - now()))
        if not undone(answer) or now() + pause >= end:
            return answer
        await asyncio.sleep(pause)
        pause = min(_AGAIN_MOST_S, 2 * pause)
