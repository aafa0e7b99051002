"""Body read timeout that uses one shared timer instead of one per request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from tether.gateway_http.http.request import too_slow

_TICKS = 8
"""Timer ticks per timeout: a read is cancelled at most an eighth of the timeout late."""


class BodyTimeouts:
    """Cancels reads that take longer than ``limit_s`` seconds.

    A timer per request would cost several microseconds; a shared one costs a dictionary entry.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._until: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._ticking = False

    async def read(self, body: Awaitable[bytes]) -> bytes:
        """Return a body.

        Raises:
            RequestTimeout: it took too long.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that is awaited runs in a task
        loop = asyncio.get_running_loop()
        self._until[task] = loop.time() + self.limit_s
        if not self._ticking:
            self._ticking = True
            loop.call_later(self.limit_s / _TICKS, self._tick, loop)
        try:
            return await body
        except asyncio.CancelledError as error:
            if task not in self._late or task.uncancel():
                raise
            raise too_slow(self.limit_s) from error
        finally:
            del self._until[task]
            self._late.discard(task)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for task, until in self._until.items():
            if until <= now and task not in self._late:
                self._late.add(task)
                task.cancel()
        self._ticking = bool(self._until)
        if self._ticking:
            loop.call_later(self.limit_s / _TICKS, self._tick, loop)
