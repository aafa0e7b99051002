"""Cancels the wait of a request whose client has disconnected.

The HTTP server signals a disconnect through an awaitable, and each of those costs as much as a small request.
So only requests that wait longer than most are watched; the others cost a dictionary entry.
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
"""Returns an awaitable that ends when the client of the current request disconnects."""

client_gone: ContextVar[Gone | None] = ContextVar("client_gone", default=None)
"""Of the current request, set by the server's entry point; None if there is no client."""

_WATCH_AFTER_S = 0.1
_TICK_S = 0.05
"""A request is watched after the first, checked in intervals of the second."""


class Disconnects:
    """Pending requests of one gateway that need no answer after their client disconnects."""

    def __init__(self) -> None:
        self._unwatched: dict[asyncio.Task[Any], tuple[Gone, float]] = {}
        """Oldest first, each with the time from which it is watched."""
        self._watches: dict[asyncio.Task[Any], asyncio.Future[None]] = {}
        self._left: set[asyncio.Task[Any]] = set()
        self._ticking = False

    async def wait(self, answer: Awaitable[T]) -> T:
        """Return ``answer``; cancel it if the client of the current request disconnects.

        Raises:
            ClientDisconnected: the client disconnected.
        """
        gone = client_gone.get()
        task = asyncio.current_task()
        if gone is None or task is None:
            return await answer
        loop = asyncio.get_running_loop()
        self._unwatched[task] = (gone, loop.time() + _WATCH_AFTER_S)
        if not self._ticking:
            self._ticking = True
            loop.call_later(_TICK_S, self._tick, loop)
        try:
            return await answer
        except asyncio.CancelledError as error:
            if task not in self._left or task.uncancel():
                raise
            raise ClientDisconnected("the client disconnected before it was answered") from error
        finally:
            self._forget(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        if self._unwatched.pop(task, None) is None:
            watch = self._watches.pop(task, None)
            if watch is not None:
                watch.cancel()
            self._left.discard(task)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._unwatched:
            task, (gone, since) = next(iter(self._unwatched.items()))
            if since > now:
                break
            del self._unwatched[task]
            watch = self._watches[task] = asyncio.ensure_future(gone())
            watch.add_done_callback(partial(self._ended, task))
        self._ticking = bool(self._unwatched)
        if self._ticking:
            loop.call_later(_TICK_S, self._tick, loop)

    def _ended(self, task: asyncio.Task[Any], watch: asyncio.Future[None]) -> None:
        """Cancel the request, unless it finished first and removed the watch."""
        if self._watches.get(task) is watch:
            self._left.add(task)
            task.cancel()
