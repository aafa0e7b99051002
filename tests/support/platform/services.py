"""All services in the test's own event loop, on a real broker: for tests that look inside."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from support.brokers.brokers import Broker, wait_until

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.key_value.leases import ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.dispatcher import service as dispatcher_service
from tether.dispatcher.service import Dispatcher
from tether.domain.job import Priority
from tether.domain.manifest import ChangeRequest, ModelFile, PushAnswer, PushRequest
from tether.domain.tensor import Array, Tensor, from_numpy
from tether.errors import ModelNotFound
from tether.gateway_http import gateway as core
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.jobs.submission import NewJob
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.gateway_http.models.encrypted_models import PushTarget
from tether.model.config import ModelConfig, check_config
from tether.model.ownership import DEFAULT_TENANT, Asker
from tether.modelstore import service as modelstore_service
from tether.modelstore.service import ModelStoreService
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.storage.upload import upload
from tether.wire import codec
from tether.wire.subjects import token
from tether.worker import service as worker_service
from tether.worker.service import WorkerService

TENANT = "acme"

ASKER = Asker(DEFAULT_TENANT)
"""Who pushes and changes models here: what it pushes first, every tenant may use."""


@dataclass
class Services:
    """A running platform. ``stack`` owns what runs; more can be started on it."""

    home: Home
    settings: Settings
    stack: AsyncExitStack
    gateway: Gateway
    dispatcher: Dispatcher | None = None
    modelstore: ModelStoreService | None = None
    workers: list[WorkerService] = field(default_factory=list)
    _configs: SignedBucket | None = None

    @property
    def bus(self) -> Bus:
        return self.gateway.bus

    async def start_worker(self, name: str, **changes: Any) -> WorkerService:
        settings = dataclasses.replace(self.settings, worker_name=name, **changes)
        worker = await self.stack.enter_async_context(worker_service.running(settings, self.home))
        self.workers.append(worker)
        return worker

    async def push(
        self,
        name: str,
        model: bytes,
        *,
        max_batch_size: int = -1,
        workers: int | None = None,
        encrypt: bool | None = None,
    ) -> ResolvedVersion:
        """Push a model and wait until ``workers`` (default: all) answer for it."""
        target = await self.gateway.encrypted_models.target(name, encrypt, ASKER)
        file = await self._upload(target, model)
        files, sealed = target.described(name, (file,))
        return await self._register(PushRequest(name, files, max_batch_size=max_batch_size, sealed=sealed), workers)

    async def push_bundle(self, name: str, folder: Path, *, workers: int | None = None) -> ResolvedVersion:
        """:meth:`push` for a Python model in a folder."""
        target = await self.gateway.encrypted_models.target(name, None, ASKER)
        files = [
            msgspec.structs.replace(await self._upload(target, path.read_bytes()), path=str(path.relative_to(folder)))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        named, sealed = target.described(name, files)
        return await self._register(PushRequest(name, named, platform="python", trusted=True, sealed=sealed), workers)

    async def _upload(self, target: PushTarget, content: bytes) -> ModelFile:
        async def body() -> AsyncIterator[bytes]:
            yield content

        return (await upload(self.bus, target.store, body(), limit=1 << 30, whole=target.key is not None))[0]

    async def _register(self, request: PushRequest, workers: int | None) -> ResolvedVersion:
        name = request.name
        request = msgspec.structs.replace(request, tenant=request.tenant or ASKER.tenant)
        body, partition = codec.encode(request), self.bus.names.partition(name)
        answer = await ask_owner(
            self.bus, "registerModel", partition, MessageType.PUSH, body, answers=MessageType.PUSHED, timeout=60
        )
        version = codec.decode(answer, PushAnswer).manifest.version
        wanted = len(self.workers) if workers is None else workers
        await wait_until(lambda: self._ready(name, version) >= wanted, f"{wanted} workers hold {name}:{version}")
        return self.gateway.catalog.resolve(name, str(version))

    async def change(self, request: ChangeRequest) -> None:
        """Have the model store change a model."""
        request = msgspec.structs.replace(request, tenant=request.tenant or ASKER.tenant)
        body, partition = codec.encode(request), self.bus.names.partition(request.model)
        await ask_owner(
            self.bus, "changeModel", partition, MessageType.CHANGE, body, answers=MessageType.CHANGED, timeout=20
        )

    async def configs(self) -> SignedBucket:
        """The configurations, as the model store may write them."""
        if self._configs is None:
            bus = await self.stack.enter_async_context(connect(self.settings, self.home, "modelstore"))
            self._configs = SignedBucket(bus, "configs", MessageType.CONFIG)
        return self._configs

    async def decide(self, model: str, **changes: Any) -> ModelConfig:
        """Set a model's configuration, all of it, as the model store does."""
        bucket = await self.configs()
        before = await bucket.get(token(model))
        revision = 1 if before is None else codec.decode(before, ModelConfig).revision + 1
        config = msgspec.structs.replace(ModelConfig(model, revision), **changes)
        await bucket.put(token(model), codec.encode(check_config(config)))
        return config

    def _ready(self, name: str, version: int) -> int:
        try:
            self.gateway.catalog.require_lane(served := self.gateway.catalog.resolve(name, str(version)))
        except Exception as error:
            if isinstance(error, ModelNotFound) or getattr(error, "retryable", False):
                return -1
            raise
        return len(self.gateway.catalog.workers(served))

    async def infer(self, served: ResolvedVersion, array: Array, *, timeout_s: float = 20.0) -> Array:
        """One synchronous request with one input; its first output."""
        name = served.manifest.inputs[0].name
        inputs = (from_numpy(name, array),)
        answer = await self.gateway.infer(served, TENANT, inputs, (), request_id="test", timeout_s=timeout_s)
        return first(answer)


def first(tensors: tuple[Tensor, ...]) -> Array:
    return np.frombuffer(tensors[0].data, dtype="<f4").reshape(tensors[0].shape)


def new_job(
    served: ResolvedVersion,
    array: Array,
    *,
    key: str = "",
    deadline_s: float = 60.0,
    priority: Priority | None = Priority.NORMAL,
) -> NewJob:
    name = served.manifest.inputs[0].name
    return NewJob(served, (from_numpy(name, array),), (), priority, deadline_s, key, "test")


def row(value: float) -> Array:
    """One row for the models of :func:`support.models.models.add`."""
    return np.full((1, 4), value, dtype=np.float32)


@asynccontextmanager
async def services(broker: Broker, *, workers: int = 1) -> AsyncIterator[Services]:
    """Dispatcher, model store, workers and a gateway that does not listen."""
    settings = broker.settings
    async with AsyncExitStack() as stack:
        dispatcher = await stack.enter_async_context(dispatcher_service.running(settings, broker.home))
        store = await stack.enter_async_context(modelstore_service.running(settings, broker.home))
        gateway = await stack.enter_async_context(core.running(settings, broker.home))
        running = Services(broker.home, settings, stack, gateway, dispatcher, store)
        for number in range(1, workers + 1):
            await running.start_worker(f"worker-{number}")
        yield running
