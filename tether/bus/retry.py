"""Retries operations while the broker is away, until one shared deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from tether.errors import BrokerUnavailable

if TYPE_CHECKING:
    from tether.bus.connection import NatsConnection

PATIENCE_S = 10.0
"""Seconds that a request about durable jobs waits for an absent broker before it is answered with 503."""

_PAUSE_S = 0.05

T = TypeVar("T")


class RetryDeadline:
    """The time that one request has for all its broker operations."""

    def __init__(self, bus: NatsConnection, limit_s: float = PATIENCE_S) -> None:
        self._bus = bus
        self._end = bus.clock.monotonic() + limit_s

    async def until_done(self, action: Callable[[], Awaitable[T]]) -> T:
        """Return the result of ``action``, which must be safe to repeat.

        Raises:
            BrokerUnavailable: the broker was away, or did not answer, until the deadline.
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
