"""Checks for space before outputs of durable jobs are stored; some is reserved for other outcomes.

The broker has one limit for a stream, so the worker reads the stream's size before it stores outputs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tether.bus.bus import Bus
from tether.errors import QueueFull
from tether.streams.layout import ENDS
from tether.streams.usage import StreamUses


class ResultsRoom:
    """Usage of the results stream of one worker's pool, as this worker knows it."""

    def __init__(self, bus: Bus) -> None:
        self._stream = bus.names.pool_results_stream(bus.pool)
        self._uses = StreamUses(bus)
        self._on_their_way = 0

    @asynccontextmanager
    async def storing(self, size: int) -> AsyncIterator[None]:
        """Reserve ``size`` bytes for outputs that the block stores.

        Raises:
            QueueFull: there is no space for them; the block does not run.
        """
        use = await self._uses.of(self._stream)
        if use is not None and use.most > 0 and use.bytes + self._on_their_way + size > use.most * (1 - ENDS):
            raise QueueFull("results of durable jobs are full; the rest is reserved for outcomes without outputs")
        self._on_their_way += size
        try:
            yield
            self._uses.took(self._stream, size)
        finally:
            self._on_their_way -= size
