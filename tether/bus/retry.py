"""One patience with a broker that is away: what fails for want of it is tried again until the time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from tether.errors import BrokerUnavailable

if TYPE_CHECKING:
    from tether.bus.connection import NatsConnection

PATIENCE_S = 10.0
"""How long a request about durable jobs waits for a broker that is away, before it is answered with 503."""

_PAUSE_S = 0.05

T = TypeVar("T")


class RetryDeadline:
    """The time that one request has for all that it asks of the broker."""

    def __init__(self, bus: NatsConnection, limit_s: float = PATIENCE_S) -> None:
        self._bus = bus
        self._end = bus.clock.monotonic() + limit_s

    async def until_done(self, action: Callable[[], Awaitable[T]]) -> T:
        """What ``action`` returns; it must be safe to repeat.

        Raises:
            BrokerUnavailable: the broker was away, or did not answer, until the time was over.
        """
        while True:
            try:
                return await action()
            except BrokerUnavailable:
                left = self._end - self._bus.clock.monotonic()
                if left <= 0:
                    raise
                await self._bus.wait_connected(left)
                await asyncio.sleep(_PAUSE_S)
