"""nats-py's client, without a fault that leaves a connection deaf."""

from __future__ import annotations

import asyncio

import nats.aio.client


class Client(nats.aio.client.Client):  # type: ignore[misc]
    """A pong whose waiter gave up, or was cancelled, ends nats-py's reading for good: it sets a future that is done."""

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()
