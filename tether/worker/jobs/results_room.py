"""Whether outputs of durable jobs may still be stored: a part of the results is kept for ends without outputs.

A broker has one bound for a stream. So a worker looks how full the results are before it stores outputs there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tether.bus.bus import Bus
from tether.errors import QueueFull
from tether.streams.layout import ENDS
from tether.streams.usage import StreamUses


class ResultsRoom:
    """The results of one worker's pool, as it sees them."""

    def __init__(self, bus: Bus) -> None:
        self._stream = bus.names.pool_results_stream(bus.pool)
        self._uses = StreamUses(bus)
        self._on_their_way = 0

    @asynccontextmanager
    async def storing(self, size: int) -> AsyncIterator[None]:
        """Count ``size`` bytes of outputs, which the block stores.

        Raises:
            QueueFull: there is no room for them; the block does not run.
        """
        use = await self._uses.of(self._stream)
        if use is not None and use.most > 0 and use.bytes + self._on_their_way + size > use.most * (1 - ENDS):
            raise QueueFull("results of durable jobs are full, but for the part that ends without outputs may use")
        self._on_their_way += size
        try:
            yield
            self._uses.took(self._stream, size)
        finally:
            self._on_their_way -= size
