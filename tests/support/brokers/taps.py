"""A tap on the way to a broker: it hears every byte that a platform sends and gets, as one who owns the network does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import cast
from urllib.parse import urlsplit

from support.brokers.brokers import Broker


class Tap:
    """Everything that crossed, a buffer for each direction of each connection."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)
        self.sides: list[_Side] = []
        self.dials: set[asyncio.Task[object]] = set()

    def heard(self, pattern: bytes) -> bool:
        return any(pattern in side.buffer for side in self.sides)

    async def close(self) -> None:
        for dial in self.dials:
            dial.cancel()
        await asyncio.gather(*self.dials, return_exceptions=True)
        for side in self.sides:
            side.transport.abort()
        for side in self.sides:
            await side.lost.wait()


class _Side(asyncio.Protocol):
    """One end of a connection through the tap."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.peer: _Side | None = None
        self.buffer = bytearray()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.tap.sides.append(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.peer is not None:
            self.peer.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio passes it
        self.lost.set()
        if self.peer is not None:
            self.peer.transport.close()


class _Client(_Side):
    """The end that called: nothing is read from it before the broker has answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self.tap.dials.add(asyncio.create_task(self._dial()))

    async def _dial(self) -> None:
        def answered() -> _Side:
            side = _Side(self.tap)
            side.peer = self
            return side

        try:
            _, self.peer = await asyncio.get_running_loop().create_connection(answered, *self.tap.address)
        except OSError:
            self.transport.close()
        else:
            self.transport.resume_reading()


@contextlib.contextmanager
def tapped(broker: Broker) -> Iterator[tuple[Broker, Tap]]:
    """The broker as it is reached through the tap, which has a thread of its own: a platform may block its loop."""
    address = urlsplit(broker.url)
    tap = Tap(address.hostname or "", address.port or 0)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(tap, started)), name="tap")
    thread.start()
    loop, stop, port = started.result(10)
    settings = dataclasses.replace(broker.settings, nats_url=f"nats://127.0.0.1:{port}")
    try:
        yield dataclasses.replace(broker, settings=settings), tap
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


async def _serve(tap: Tap, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(lambda: _Client(tap), "127.0.0.1", 0)
    started.set_result((loop, stop, server.sockets[0].getsockname()[1]))
    await stop.wait()
    server.close()
    await tap.close()
