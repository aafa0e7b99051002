"""Creates streams and buckets at the start, and keeps their configuration, for isolated tenants too."""

from __future__ import annotations

import asyncio

from tether.bus.bus import Bus
from tether.dispatcher.lanes.tenant_pools import Pools
from tether.dispatcher.retried_steps import Steps
from tether.errors import BrokerUnavailable, TetherError
from tether.streams.layout import ensure_streams, streams

_AGAIN_S = 0.2
_ENSURE_S = 10.0


class Streams:
    """Streams of the platform. ``ok``: all were correct at the last check."""

    def __init__(self, bus: Bus, pools: Pools, steps: Steps) -> None:
        self._bus = bus
        self._pools = pools
        self._steps = steps
        self._lost = asyncio.Event()
        self._as_they_are: set[str] = set()
        self.ok = False

    def reset(self) -> None:
        """Check now: the broker may have lost streams."""
        self.ok = False
        self._lost.set()

    async def prepare(self) -> None:
        """Create missing streams; go on if a server of a cluster is down.

        Raises:
            TetherError: the broker refuses a stream.
        """
        failed = await self._ensured()
        for error in failed.values():
            if not isinstance(error, BrokerUnavailable):
                raise error
        self.ok = not failed

    async def _ensured(self) -> dict[str, TetherError]:
        return await ensure_streams(self._bus, streams(self._bus.names, self._bus.settings), self._as_they_are)

    async def _ensure(self) -> None:
        for error in (await self._ensured()).values():
            raise error

    async def keep(self) -> None:
        """Check until cancelled: after every reconnect, every ten seconds, and until it succeeds."""
        while True:
            self._lost.clear()
            made = await self._steps.succeeded("streams", self._ensure())
            self.ok = await self._steps.succeeded("tenants' streams", self._pools.update()) and made
            try:
                async with asyncio.timeout(_ENSURE_S if self.ok else _AGAIN_S):
                    await self._lost.wait()
            except TimeoutError:
                continue
