"""Checks that the stores of durable jobs have room, before anything of a job is stored.

A job passes three bounded stores: its lane's queue, the records and the results. A full queue rejects at
once. Records and results are mostly of finished jobs, and the dispatcher deletes the oldest of these to make
room; so a submission waits a moment for it and is then rejected: either all records are of open jobs, or no
dispatcher runs.
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
"""Seconds that a submission waits for room."""

_LOOK_S = 1.0
_AGAIN_S = 0.1
_NEARLY = 0.97
"""Fraction of its bound at which a store is closed to new jobs: others are in flight, and outcomes need room."""

T = TypeVar("T")


class JobStores:
    """The stores of durable jobs, as one gateway sees them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.uses = StreamUses(bus)
        self._refused_until = 0.0

    async def require(self, pool: str, lanes: Collection[str]) -> None:
        """Wait until these lane streams, the records and the results have room for jobs of a pool.

        Raises:
            QueueFull: there is no room; the message names the bound.
        """
        for stream in lanes:
            if (await self._share(stream)) >= _NEARLY:
                raise self.queue_full()
        await self.until_room(lambda: self._require_records_and_results(pool))

    async def _require_records_and_results(self, pool: str) -> None:
        if await self._share(self._bus.names.bucket_stream("jobs")) >= _NEARLY:
            raise self.records_full()
        if await self._share(self._bus.names.pool_results_stream(pool)) >= 1 - ENDS:
            raise _full(
                "the results of durable jobs fill their share of max_file_mb; "
                "the dispatcher deletes the oldest finished ones: "
                "check that one is running, or raise max_file_mb"
            )

    async def until_room(self, action: Callable[[], Awaitable[T]]) -> T:
        """Return the result of ``action``; retry it for a moment on :class:`QueueFull`. It must be
        idempotent.

        Raises:
            QueueFull: there was no room.
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
        """Return the error of a full lane stream."""
        return _full(
            "the queue of durable jobs is full: waiting jobs fill its share of max_file_mb "
            f"({self._bus.settings.max_file_mb}); wait, add workers, or raise max_file_mb"
        )

    def records_full(self) -> QueueFull:
        """Return the error of full records."""
        return _full(
            "the records of open durable jobs fill their share of max_file_mb "
            f"({self._bus.settings.max_file_mb}); wait for jobs to finish, or raise max_file_mb"
        )

    async def _share(self, stream: str) -> float:
        use = await self.uses.of(stream)
        return 0.0 if use is None else use.share


def _full(message: str) -> QueueFull:
    return QueueFull(message, field="max_file_mb", retry_after=5.0)
