"""Whether outputs of durable jobs may still be stored: a part of the results is kept for ends without outputs.

A broker has one bound for a stream. So a worker looks how full the results are before it stores outputs there, and again when a
second is over or it has stored an eighth of what was free: up to eight workers then stay below the part that is kept.
"""

from __future__ import annotations

import asyncio
import logging

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.errors import BrokerUnavailable, PermissionDenied, QueueFull
from tether.streams.layout import ENDS
from tether.streams.usage import StreamUse, stream_use

log = logging.getLogger(__name__)

_FRESH_S = 1.0
_FRESH_WHEN_FULL_S = 0.1
"""How long a refusal counts."""

_PART = 8
_ANSWER_S = 1.0


class ResultsRoom:
    """The results of one worker's pool, as it sees them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._stream = bus.names.pool_results_stream(bus.pool)
        self._turn = asyncio.Lock()
        self._fresh_until = 0.0
        self._may_look = True
        self._free = 0.0
        """Bytes of outputs that may still be stored."""
        self._before_look = 0.0
        """Bytes of outputs that this worker may store before it looks again."""

    async def take(self, size: int) -> None:
        """Count ``size`` bytes of outputs that are about to be stored.

        Raises:
            QueueFull: there is no room for them.
        """
        async with self._turn:
            if self._may_look and (size > self._before_look or self._bus.clock.monotonic() >= self._fresh_until):
                await self._look()
            if self._may_look and size > self._free:
                self._fresh_until = min(self._fresh_until, self._bus.clock.monotonic() + _FRESH_WHEN_FULL_S)
                raise QueueFull("results of durable jobs are full, but for the part that ends without outputs may use")
            self._free -= size
            self._before_look -= size

    async def _look(self) -> None:
        """A broker that does not answer has as much room as before: what is stored then waits for it."""
        try:
            use = await stream_use(self._bus, self._stream, timeout=_ANSWER_S)
        except (BrokerUnavailable, JetStreamError):
            return
        except PermissionDenied as error:
            self._may_look = False
            log.warning("no room is kept for ends without outputs: %s; write the broker's configuration again", error)
            return
        self._free = _free(use)
        self._before_look = self._free / _PART
        self._fresh_until = self._bus.clock.monotonic() + _FRESH_S


def _free(use: StreamUse | None) -> float:
    if use is None or use.most <= 0:
        return float("inf")
    return max(0.0, use.most * (1 - ENDS) - use.bytes)
