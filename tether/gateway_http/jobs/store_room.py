"""Whether what keeps durable jobs has room for more of them: asked before anything of a job is stored.

A job passes three bounded stores: the queue of its lane, the records, and the results. A queue that is full refuses at once. Records
and results are mostly of jobs that have ended, and the dispatcher lets the oldest of these make room; so a submit waits for it a
moment, and is refused when none was made: then the records are those of open jobs, or no dispatcher runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from tether.bus.bus import Bus
from tether.errors import QueueFull
from tether.streams.layout import ENDS
from tether.streams.usage import StreamUses

ROOM_S = 3.0
"""How long a submit waits for ended jobs to make room."""

_LOOK_S = 1.0
_AGAIN_S = 0.1
_NEARLY = 0.97
"""Share of its bound at which a store takes no more jobs: others are on their way, and ends must find room."""

T = TypeVar("T")


class JobStores:
    """What one gateway knows of them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.uses = StreamUses(bus)
        self._refused_until = 0.0

    async def require(self, pool: str, lanes: Collection[str]) -> None:
        """Wait until there is room for jobs of a pool in these lane streams, records and results.

        Raises:
            QueueFull: there is none; the message names the bound.
        """
        for stream in lanes:
            if (await self._share(stream)) >= _NEARLY:
                raise self.queue_full()
        await self.until_room(lambda: self._require_kept(pool))

    async def _require_kept(self, pool: str) -> None:
        if await self._share(self._bus.names.bucket_stream("jobs")) >= _NEARLY:
            raise self.records_full()
        if await self._share(self._bus.names.pool_results_stream(pool)) >= 1 - ENDS:
            raise _full(
                "results of durable jobs have no room for outputs: they fill their share of max_file_mb; ended jobs make room while a "
                "dispatcher runs: see that one does, or raise max_file_mb"
            )

    async def until_room(self, action: Callable[[], Awaitable[T]]) -> T:
        """What ``action`` returns, tried again for a moment while it finds no room. It must be safe to repeat.

        Raises:
            QueueFull: it found none.
        """
        clock = self._bus.clock
        end = clock.monotonic() + ROOM_S
        while True:
            try:
                return await action()
            except QueueFull:
                now = clock.monotonic()
                if now >= end or now < self._refused_until:
                    self._refused_until = max(self._refused_until, now + _LOOK_S)
                    raise
                await asyncio.sleep(_AGAIN_S)

    def queue_full(self) -> QueueFull:
        """The error of a lane stream that takes no more bundles."""
        return _full(
            "the queue of durable jobs is full: waiting jobs fill its share of max_file_mb "
            f"({self._bus.settings.max_file_mb}); wait, add workers, or raise max_file_mb"
        )

    def records_full(self) -> QueueFull:
        """The error of the records when ended jobs make no more room."""
        return _full(
            "records of durable jobs have no room: those of open jobs fill their share of max_file_mb "
            f"({self._bus.settings.max_file_mb}); wait for jobs to end, or raise max_file_mb"
        )

    async def _share(self, stream: str) -> float:
        use = await self.uses.of(stream)
        return 0.0 if use is None else use.share


def _full(message: str) -> QueueFull:
    return QueueFull(message, field="max_file_mb", retry_after=5.0)
