"""A broker with streams and model stores on it, and a gateway's connection that pushes to them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from support.brokers.brokers import Broker

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.leases import ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType, Role
from tether.domain.manifest import Alias, Manifest, ModelFile, PushAnswer, PushRequest
from tether.model.ownership import DEFAULT_TENANT
from tether.modelstore import service
from tether.modelstore.service import ENDPOINT
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.model_files import open_manifest
from tether.storage.upload import upload
from tether.streams.layout import ensure_platform
from tether.streams.updates import update_streams
from tether.wire import codec

MB = 1 << 20


@dataclass
class Platform:
    """A broker with streams, a model store on it, and a gateway's connection."""

    broker: Broker
    bus: Bus
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def store(self, model: str = "m") -> ObjectChunkStore:
        return ObjectChunkStore(self.bus, self.bus.names.chunk_bucket(model), patience_s=20)

    async def upload(self, content: bytes, *, model: str = "m", limit: int = 1 << 30) -> tuple[ModelFile, int]:
        return await upload(self.bus, self.store(model), parts(content), limit=limit)

    async def register(self, request: PushRequest) -> PushAnswer:
        body = codec.encode(msgspec.structs.replace(request, tenant=request.tenant or DEFAULT_TENANT))
        partition = self.bus.names.partition(request.name)
        answer = await ask_owner(
            self.bus, ENDPOINT, partition, MessageType.PUSH, body, answers=MessageType.PUSHED, timeout=60
        )
        return codec.decode(answer, PushAnswer)

    async def push(self, content: bytes, *, model: str = "m", max_batch_size: int = -1) -> PushAnswer:
        file, _ = await self.upload(content, model=model)
        return await self.register(PushRequest(model, (file,), max_batch_size))

    async def manifest(self, model: str, version: int) -> Manifest | None:
        key = self.bus.names.version_key(model, version)
        frame = await KvBucket(self.bus, "models").get(key)
        return None if frame is None else open_manifest(self.bus.verifier, self.bus.names, key, frame)

    async def latest(self, model: str) -> Alias:
        found = await self.bus.direct_get(
            self.bus.names.bucket_stream("aliases"), self.bus.names.bucket_key("aliases", f"{model}.latest")
        )
        assert found is not None
        envelope = self.bus.verifier.verify_envelope(found.data, subject=found.subject, types=(MessageType.ALIAS,))
        assert envelope.header.role is Role.MODELSTORE
        return codec.decode(envelope.body, Alias)


async def parts(content: bytes, size: int = 300_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@asynccontextmanager
async def platform_on(broker: Broker, *, modelstores: int = 1) -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        dispatcher = await stack.enter_async_context(connect(broker.settings, broker.home, "dispatcher"))
        async with connect(broker.settings, broker.home, "admin") as admin:
            await update_streams(admin, broker.settings)
        await ensure_platform(dispatcher, broker.settings)
        bus = await stack.enter_async_context(connect(broker.settings, broker.home, "gateway"))
        for _ in range(modelstores):
            await stack.enter_async_context(service.running(broker.settings, broker.home))
        yield Platform(broker, bus)


async def alter(platform: Platform, digest: str, content: bytes) -> None:
    """Write other bytes where a chunk lies."""
    subject = platform.bus.names.object_chunk(platform.bus.names.chunk_bucket("m"), digest)
    await platform.bus.publish_acked(subject, content)
