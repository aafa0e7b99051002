"""A gateway that was cut off while others moved things: what it goes by is right soon after it is connected again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, first, row, services

from tether.bus.key_value.bucket import SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.manifest import Alias
from tether.domain.tensor import from_numpy
from tether.gateway_http import gateway as core
from tether.gateway_http.gateway import Gateway
from tether.model.config import ModelConfig
from tether.wire import codec
from tether.wire.subjects import token

RIGHT_S = 3.0
"""How long after its reconnection a gateway may be wrong."""


class Line:
    """A way to a broker that can be cut; while it is, whoever calls is hung up on."""

    def __init__(self, broker: Broker) -> None:
        address = urlsplit(broker.url)
        self._host, self._port = address.hostname or "", address.port or 0
        self._open = True
        self._pipes: set[asyncio.Task[None]] = set()
        self.port = 0

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._called, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"nats://127.0.0.1:{self.port}"
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        self._open = False
        for pipe in self._pipes:
            pipe.cancel()

    def mend(self) -> None:
        self._open = True

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            if self._open:
                there, back = await asyncio.open_connection(self._host, self._port)
                with contextlib.closing(back):
                    pipes = [asyncio.create_task(_pipe(reader, back)), asyncio.create_task(_pipe(there, writer))]
                    self._pipes.update(pipes)
                    await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
                    for pipe in pipes:
                        pipe.cancel()
                    await asyncio.gather(*pipes, return_exceptions=True)
                    self._pipes.difference_update(pipes)


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()


@dataclass
class CutOff:
    """A platform, and one more gateway that reaches the broker through a line."""

    platform: Services
    line: Line
    gateway: Gateway

    async def write(self, identity: str, bucket: str, kind: MessageType, key: str, body: bytes | None) -> None:
        """As another service would, which is connected."""
        async with connect(self.platform.settings, self.platform.home, identity) as bus:
            entries = SignedBucket(bus, bucket, kind)
            await (entries.delete(key) if body is None else entries.put(key, body))

    async def move_everything(self) -> None:
        """An alias moves and another goes; a worker joins; a configuration changes; a version goes."""
        names = self.platform.bus.names
        for alias in ("production", "canary"):
            body = codec.encode(Alias("m", alias, 2, revision=9)) if alias == "production" else None
            await self.write("modelstore", "aliases", MessageType.ALIAS, f"{token('m')}.{token(alias)}", body)
        config = codec.encode(ModelConfig("m", revision=9))
        await self.write("modelstore", "configs", MessageType.CONFIG, token("m"), config)
        await self.write("modelstore", "models", MessageType.MANIFEST, names.version_key("m", 3), None)
        await self.platform.start_worker("worker-2")
        known = self.platform.gateway
        await wait_until(lambda: self.right(known), "a gateway that is connected goes by it", 30)

    @staticmethod
    def right(gateway: Gateway) -> bool:
        catalog = gateway.catalog
        served = catalog.find("m", 2)
        return (
            served is not None
            and catalog.workers(served) == ("worker-1", "worker-2")
            and catalog.aliases("m").get("production") == 2
            and "canary" not in catalog.aliases("m")
            and catalog.config("m").revision == 9
            and catalog.find("m", 3) is None
        )

    async def until_right(self) -> float:
        """Mend the line; seconds from the gateway's reconnection until everything that it goes by is right."""
        back = asyncio.Event()
        forget = self.gateway.bus.on_reconnect(back.set)
        self.line.mend()
        await asyncio.wait_for(back.wait(), 30)
        forget()
        began = asyncio.get_running_loop().time()
        await wait_until(lambda: self.right(self.gateway), "the gateway that was cut off goes by it", 30)
        return asyncio.get_running_loop().time() - began


@contextlib.asynccontextmanager
async def cut_off(broker: Broker) -> AsyncIterator[CutOff]:
    """A platform with three versions, and a gateway that knows them and is then cut off."""
    line = Line(broker)
    async with services(broker) as platform, line() as url:
        settings = dataclasses.replace(platform.settings, nats_url=url)
        async with core.running(settings, platform.home) as gateway:
            made = CutOff(platform, line, gateway)
            for number in (1.0, 2.0, 3.0):
                await platform.push("m", models.add(number))
            for alias in ("production", "canary"):
                body = codec.encode(Alias("m", alias, 1))
                await made.write("modelstore", "aliases", MessageType.ALIAS, f"{token('m')}.{token(alias)}", body)
            known = gateway.catalog
            await wait_until(lambda: known.aliases("m") == {"canary": 1, "latest": 3, "production": 1}, "it knows all")
            line.cut()
            await wait_until(lambda: not gateway.bus.connected, "it is cut off")
            yield made


async def answered(made: CutOff) -> tuple[int, float]:
    """What the gateway says for ``production``."""
    served = made.gateway.catalog.resolve("m", "production")
    inputs = (from_numpy("x", row(0.0)),)
    answer = await made.gateway.infer(served, TENANT, inputs, (), request_id="r", timeout_s=20)
    return served.manifest.version, float(first(answer)[0, 0])


async def test_what_moved_while_a_gateway_was_cut_off_is_right_soon_after(embedded_broker: Broker) -> None:
    async with cut_off(embedded_broker) as made:
        await made.move_everything()
        assert not made.right(made.gateway)
        assert made.gateway.catalog.aliases("m")["production"] == 1
        assert await made.until_right() < RIGHT_S
        assert await answered(made) == (2, 2.0)


async def test_what_moved_before_a_gateway_was_back_at_a_broker_that_restarted_is_right_soon_after(
    embedded_broker: Broker,
) -> None:
    async with cut_off(embedded_broker) as made:
        assert embedded_broker.server is not None
        await embedded_broker.server.kill()
        await embedded_broker.server.start()
        assert await made.platform.bus.wait_connected(20)
        await made.move_everything()
        assert not made.right(made.gateway)
        assert await made.until_right() < RIGHT_S
        assert await answered(made) == (2, 2.0)
