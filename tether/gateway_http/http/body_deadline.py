"""A limit of time for reading bodies that costs the requests in time next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from tether.gateway_http.http.request import too_slow

_LOOKS = 8
"""Looks within one limit: a read is given up at most an eighth of it late."""


class BodyTimeouts:
    """Gives up reads that take longer than ``limit_s`` seconds.

    A timer of its own for each request would cost several microseconds; one that looks at all of them now and then
    costs a dictionary entry.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._until: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._looking = False

    async def read(self, body: Awaitable[bytes]) -> bytes:
        """Wait for a body.

        Raises:
            RequestTimeout: it took too long.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that is awaited runs in a task
        loop = asyncio.get_running_loop()
        self._until[task] = loop.time() + self.limit_s
        if not self._looking:
            self._looking = True
            loop.call_later(self.limit_s / _LOOKS, self._look, loop)
        try:
            return await body
        except asyncio.CancelledError as error:
            if task not in self._late or task.uncancel():
                raise
            raise too_slow(self.limit_s) from error
        finally:
            del self._until[task]
            self._late.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for task, until in self._until.items():
            if until <= now and task not in self._late:
                self._late.add(task)
                task.cancel()
        self._looking = bool(self._until)
        if self._looking:
            loop.call_later(self.limit_s / _LOOKS, self._look, loop)
