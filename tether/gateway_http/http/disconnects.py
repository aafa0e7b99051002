"""Ends the wait of a request whose client has disconnected.

The HTTP server tells of a client that left through an awaitable of its own, and each of those costs as much as a small
request. So only requests that have waited longer than most are watched; the others cost an entry in a dictionary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from tether.errors import ClientDisconnected

T = TypeVar("T")

Gone = Callable[[], Awaitable[None]]
"""Makes an awaitable that ends when the client of the current request has left."""

client_gone: ContextVar[Gone | None] = ContextVar("client_gone", default=None)
"""Of the current request, set by the server's entry; None where there is no client."""

_WATCH_AFTER_S = 0.1
_LOOK_S = 0.05
"""A request is watched once it has waited for the first, as seen by looks the second apart."""


class Disconnects:
    """The requests of one gateway that wait and would not be answered after their client has left."""

    def __init__(self) -> None:
        self._unwatched: dict[asyncio.Task[Any], tuple[Gone, float]] = {}
        """Oldest first, each with the time from which it is watched."""
        self._watches: dict[asyncio.Task[Any], asyncio.Future[None]] = {}
        self._left: set[asyncio.Task[Any]] = set()
        self._looking = False

    async def wait(self, answer: Awaitable[T]) -> T:
        """Wait for ``answer``; it is cancelled when the client of the current request leaves.

        Raises:
            ClientDisconnected: it left.
        """
        gone = client_gone.get()
        task = asyncio.current_task()
        if gone is None or task is None:
            return await answer
        loop = asyncio.get_running_loop()
        self._unwatched[task] = (gone, loop.time() + _WATCH_AFTER_S)
        if not self._looking:
            self._looking = True
            loop.call_later(_LOOK_S, self._look, loop)
        try:
            return await answer
        except asyncio.CancelledError as error:
            if task not in self._left or task.uncancel():
                raise
            raise ClientDisconnected("the client left before its answer was there") from error
        finally:
            self._forget(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        if self._unwatched.pop(task, None) is None:
            watch = self._watches.pop(task, None)
            if watch is not None:
                watch.cancel()
            self._left.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._unwatched:
            task, (gone, since) = next(iter(self._unwatched.items()))
            if since > now:
                break
            del self._unwatched[task]
            watch = self._watches[task] = asyncio.ensure_future(gone())
            watch.add_done_callback(partial(self._ended, task))
        self._looking = bool(self._unwatched)
        if self._looking:
            loop.call_later(_LOOK_S, self._look, loop)

    def _ended(self, task: asyncio.Task[Any], watch: asyncio.Future[None]) -> None:
        """The client left, unless the wait ended first and took the watch away."""
        if self._watches.get(task) is watch:
            self._left.add(task)
            task.cancel()
