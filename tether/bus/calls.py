"""What a connection has asked and got no answer to yet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from tether.errors import BrokerUnavailable

_LOSSY = ContextVar("lossy", default=False)


class Message(Protocol):
    """What arrives on a subscription."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


class Call:
    """One outstanding request: a future for a single answer, or a list for a batch."""

    __slots__ = ("collected", "future", "lossy", "subject")

    def __init__(self, future: asyncio.Future[Message], subject: str) -> None:
        self.future = future
        self.subject = subject
        self.collected: list[Message] | None = None
        self.lossy = _LOSSY.get()

    def fail(self, why: str) -> None:
        """Without effect on one that has its answer."""
        if not self.future.done():
            self.future.set_exception(BrokerUnavailable(why))

    def expire(self) -> None:
        self.fail(f"no answer on '{self.subject}' in time")

    def lose(self) -> None:
        """The connection was lost."""
        if self.lossy:
            self.fail("the connection to the broker was lost on the way")


@contextlib.contextmanager
def lossy() -> Iterator[None]:
    """What this task asks in the block fails when the connection is lost, not when its time is up: an answer may never come, and
    asking again does no harm."""
    token = _LOSSY.set(True)
    try:
        yield
    finally:
        _LOSSY.reset(token)
