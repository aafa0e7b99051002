"""What a connection has asked and got no answer to yet."""

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
    """What arrives on a subscription."""

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
def fail_on_disconnect() -> Iterator[None]:
    """What this task asks in the block fails when the connection is lost, not when its time is up: an answer may never come, and
    asking again does no harm."""
    token = _LOSSY.set(True)
    try:
        yield
    finally:
        _LOSSY.reset(token)


def status_of(message: Message) -> str:
    """The status that the server, or a stream, answered with; empty when it is an answer without one."""
    return (message.headers or {}).get("Status", "")


def untaken(answer: Message) -> bool:
    """Whether nobody was there who takes such requests."""
    return status_of(answer) == "503"


async def patiently(
    ask: Callable[[float], Awaitable[Message]], timeout: float, undone: Callable[[Message], bool] = untaken
) -> Message:
    """Ask again while nobody takes it, for ``timeout`` seconds in all: while the servers of a cluster elect the leader of a
    stream, nobody does. ``undone`` says of an answer that nothing was done; what got no answer at all may have been."""
    now = asyncio.get_running_loop().time
    end, pause = now() + timeout, _AGAIN_S
    while True:
        answer = await ask(max(0.0, end - now()))
        if not undone(answer) or now() + pause >= end:
            return answer
        await asyncio.sleep(pause)
        pause = min(_AGAIN_MOST_S, 2 * pause)
