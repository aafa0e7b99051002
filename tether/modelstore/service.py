"""The model store service: answers ``registerModel`` and makes versions of pushed files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import msgspec

from tether.audit import Kind, clean
from tether.audit.writer import AuditLog, writing
from tether.bus import rpc
from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.session import connect
from tether.crypto import Envelope, MessageType
from tether.domain.manifest import LATEST, Manifest, PushAnswer, PushRequest
from tether.domain.partition import Lease
from tether.errors import (
    BadEncoding,
    BrokerUnavailable,
    ConfigError,
    CorruptChunk,
    InvalidRequest,
    ModelRejected,
    TetherError,
    Unavailable,
)
from tether.model import config_patch, version_metadata
from tether.modelstore.inspection.inspector import Inspection
from tether.modelstore.records.model_configs import ModelConfigStore
from tether.modelstore.records.model_owners import Owners
from tether.modelstore.records.registry import Registry
from tether.modelstore.records.version_metadata import VersionMetadataStore
from tether.modelstore.registration import manifest_builder, model_changes
from tether.modelstore.registration.model_changes import ModelChangeHandler
from tether.modelstore.registration.storage_quota import StorageQuota
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.modelstore.upkeep.key_rotation import ModelKeyRotation
from tether.modelstore.upkeep.partitions import Partitions, StoreInstance
from tether.process import daemon, lifecycle, metrics
from tether.process.data_dir import Home
from tether.process.os_process import KEEP_MB
from tether.process.tenant_turns import TenantTurns
from tether.process.tmpfs_folder import MemoryFolder
from tether.settings import Settings
from tether.storage.chunk_lifecycle import ChunkLifecycle
from tether.storage.chunk_repair import ChunkLenders
from tether.wire import codec

log = logging.getLogger(__name__)

ENDPOINT = "registerModel"
DEFAULT_PORT = 8004
INSPECTIONS = 2
"""Concurrent inspections; each may use one processor and a few times the memory of its weights."""

MOST_WAITING = 8
"""Pending pushes per tenant; further ones get a retryable error."""

WAITING = 32
"""Pending pushes in all; further ones get a retryable error."""


class PartitionContext(NamedTuple):
    """State of one owned partition: all its writes are bound to the lease."""

    lease: Lease
    registry: Registry
    configs: ModelConfigStore
    notes: VersionMetadataStore
    owners: Owners


class ModelStoreService:
    """Handles pushes of models in the partitions it owns. ``memory`` is a private folder of this process,
    cleared at the next start.
    """

    def __init__(
        self, bus: Bus, instance: StoreInstance, audit: AuditLog, keyring: ModelKeyring, memory: MemoryFolder
    ) -> None:
        self._bus = bus
        self._audit = audit
        self._scratch = instance.folder
        self._inspections = TenantTurns(INSPECTIONS, bus.clock.monotonic, most_waiting=MOST_WAITING)
        self.partitions = Partitions(bus, instance.name, self._serve_partition, instance.dead)
        reading = Registry(bus)
        self._lenders = ChunkLenders(bus)
        self._keyring = keyring
        self._memory = memory
        self.keys = ModelKeyRotation(bus, keyring, reading)
        self.keeper = ChunkCollector(
            bus, reading, keyring, owned=self.partitions.owned, lenders=self._lenders, note=self._note_damage
        )
        self._quota = StorageQuota(bus)

    @property
    def closed(self) -> lifecycle.Termination:
        """Set when the connection is lost for good."""
        return self._bus.closed

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer pushes until the block ends; waits for the buckets, which the dispatcher creates.

        Raises:
            ConfigError: versions exist in partitions that the settings lack.
        """
        await self._buckets_ready()
        await asyncio.to_thread(self._memory.sweep)
        async with (
            self._keyring.watching(),
            self.keys.assigned.following(),
            lifecycle.tasks() as tasks,
            self.partitions.working(),
            self._lenders.listening(),
            self.keeper.working(),
        ):
            tasks.spawn(self.keys.keep(), "model-keys")
            yield

    @asynccontextmanager
    async def _serve_partition(self, lease: Lease) -> AsyncIterator[None]:
        """Answer requests about models of one partition."""
        registry = Registry(self._bus, lambda: self.partitions.check(lease))
        notes = VersionMetadataStore(self._bus, registry, self._audit)
        owners = Owners(self._bus, registry, self._audit)
        configs = ModelConfigStore(self._bus, registry, self._audit, notes, owners)
        desk = PartitionContext(lease, registry, configs, notes, owners)
        await self._patiently(lambda: registry.repair(lease.partition))
        await self._patiently(lambda: owners.migrate(lease.partition))
        subject = partial(self._bus.names.store_service, partition=lease.partition, epoch=lease.epoch)
        async with (
            rpc.serve(
                self._bus,
                ENDPOINT,
                accepts=MessageType.PUSH,
                answers=MessageType.PUSHED,
                handler=partial(self.register, desk),
                side_by_side=WAITING,
                subject=subject(ENDPOINT),
            ),
            rpc.serve(
                self._bus,
                model_changes.ENDPOINT,
                accepts=MessageType.CHANGE,
                answers=MessageType.CHANGED,
                handler=ModelChangeHandler(registry, owners, self.keeper, notes, self.keys).handle,
                subject=subject(model_changes.ENDPOINT),
            ),
            rpc.serve(
                self._bus,
                config_patch.ENDPOINT,
                accepts=MessageType.CHANGE,
                answers=MessageType.CHANGED,
                handler=desk.configs.handle,
                subject=subject(config_patch.ENDPOINT),
            ),
        ):
            yield

    async def _buckets_ready(self) -> None:
        while True:
            try:
                return await Registry(self._bus).check_partitions()
            except BrokerUnavailable as error:
                log.info("waiting for the buckets: %s", error, extra={"action": "waiting"})
            await asyncio.sleep(0.25)

    async def _patiently(self, work: Callable[[], Awaitable[None]]) -> None:
        """Retry while the broker is away; the lease expires if that takes long."""
        while True:
            try:
                return await work()
            except BrokerUnavailable as error:
                log.info("waiting for the broker: %s", error, extra={"action": "waiting"})
            await asyncio.sleep(0.25)

    async def register(self, desk: PartitionContext, envelope: Envelope) -> bytes:
        """Make a version of a push; its manifest is stored last, then ``latest`` moves.

        Raises:
            InvalidRequest, PayloadTooLarge: the push itself is invalid.
            Conflict, Forbidden: the model belongs to another tenant.
            ModelRejected: the file cannot be served.
            CorruptChunk: the stored chunks do not match the file; push again.
            ConfigError: the gateway has another number of partitions.
            QuotaExceeded: the tenant's quota is used up.
            Unavailable: no room, too many writers, or no broker.
        """
        request = _decode(envelope)
        if self._bus.names.partition(request.name) != desk.lease.partition:
            raise ConfigError("setting 'partitions' of gateway and model store differ", field="partitions")
        try:
            answer = await self._register(desk, request, request.publisher or envelope.sender)
        except TetherError as error:
            if isinstance(error, ModelRejected):
                metrics.MODELS_REJECTED.inc()
            fields = {"action": "model_refused", "model": request.name[:64], "code": error.code}
            log.warning("push refused: %s", error, extra=fields)
            self._note(request, envelope, outcome=error.code)
            raise
        made = "a new version" if answer.created else "identical to the newest version"
        self._note(request, envelope, version=answer.manifest.version, detail=f"{made}; aliases {answer.aliases}")
        await self._audit.settled()
        return codec.encode(answer)

    def _note(
        self, request: PushRequest, envelope: Envelope, *, version: int = 0, outcome: str = "ok", detail: str = ""
    ) -> None:
        self._audit.record(
            Kind.MODEL,
            "",
            actor=clean(request.publisher or envelope.sender),
            action="register",
            outcome=outcome,
            model=request.name,
            version=version,
            bytes_in=sum(file.size for file in request.files),
            detail=detail,
        )

    def _note_damage(self, digest: str, versions: tuple[str, ...], worker: str) -> None:
        for version in versions:
            model, _, number = version.rpartition(":")
            self._audit.record(
                Kind.MODEL,
                "",
                actor=self._bus.signer.name,
                action="repair chunk",
                outcome="ok" if worker else CorruptChunk.code,
                model=model,
                version=int(number),
                detail=f"{digest} from {worker}" if worker else f"{digest} is damaged, and no worker has it",
            )

    async def _register(self, desk: PartitionContext, request: PushRequest, publisher: str) -> PushAnswer:
        manifest_builder.check_request(request, max_bytes=self._bus.settings.max_upload_bytes)
        owner = await desk.owners.may_push(request)
        version_metadata.noted(version_metadata.VersionNote(request.name, 0), version_metadata.patch_of(request.about))
        if request.config:
            config_patch.patched(await desk.configs.get(request.name), request.config)
        if request.sealed is None and not request.open and request.name in self._keyring.owners():
            raise Unavailable("the model was encrypted meanwhile; push it again", retry_after=1)
        request, found = await self._look(request)
        build = manifest_builder.manifest_builder(
            request,
            found,
            created_at=self._bus.clock.utc(),
            publisher=publisher,
            partition=desk.lease.partition,
            owner=owner,
        )
        async with self._quota.turn(request.tenant):
            manifest, created = await desk.registry.add(
                request.name, build, partial(self._admit, desk, request, publisher), request.version
            )
        if request.config and not created:
            await desk.configs.given(manifest, request.config, publisher)
        await desk.registry.move(request.name, LATEST, manifest.version, forward_only=True)
        if request.about:
            await desk.notes.change(manifest.name, manifest.version, request.about, publisher)
        if created:
            metrics.MODELS_REGISTERED.inc()
        fields = {"action": "model_registered", "model": manifest.name, "version": manifest.version}
        log.info("%s", "version ready" if created else "identical to the newest version", extra=fields)
        return PushAnswer(manifest, created, await desk.registry.aliases(request.name))

    async def _admit(self, desk: PartitionContext, request: PushRequest, publisher: str, manifest: Manifest) -> None:
        """Check the quota, record the owner and apply the configuration before a version becomes visible."""
        await self._quota.check(manifest)
        await desk.owners.claim(request)
        if request.config:
            await desk.configs.given(manifest, request.config, publisher)

    async def _look(self, request: PushRequest) -> tuple[PushRequest, Inspection]:
        """Inspect the files, whose chunks are claimed for that time and as long again; return the request
        with their digests.
        """
        store, settings = ChunkLifecycle(self._bus, self._bus.names.chunk_bucket(request.name)), self._bus.settings
        confined = manifest_builder.confined(request.platform, settings)
        async with self._inspections.turn(request.tenant):
            began = self._bus.clock.monotonic()
            source = manifest_builder.Source(request.files, store, self._scratch)
            if request.sealed is not None:
                source = await manifest_builder.sealed_source(request, self._bus, self._keyring, self._memory)
            files, found = await manifest_builder.examine(
                store, request, source, confined, fresh_s=settings.unreferenced_ttl_s / 2
            )
        if self._bus.clock.monotonic() - began > settings.gc_grace_s:
            raise Unavailable("the inspection took too long; push the model again", retry_after=2)
        return (request if request.sealed is not None else msgspec.structs.replace(request, files=files)), found

    def checks(self) -> dict[str, str]:
        """Return the readiness checks."""
        return {"broker": "ok" if self._bus.connected else "not connected", **self.partitions.checks()}


def _decode(envelope: Envelope) -> PushRequest:
    try:
        return codec.decode(envelope.body, PushRequest)
    except BadEncoding as error:
        raise InvalidRequest(f"cannot decode the push: {error.message}") from error


@asynccontextmanager
async def running(settings: Settings, home: Home) -> AsyncIterator[ModelStoreService]:
    """Run a model store until the block ends."""
    name = settings.modelstore_name
    async with (
        connect(settings, home, name) as bus,
        lifecycle.tasks() as tasks,
        writing(bus, home, tasks) as audit,
    ):
        memory = MemoryFolder(settings.decrypted_model_dir, home.root, bus.signer.name)
        instance = await asyncio.to_thread(StoreInstance, home.cache(name))
        try:
            service = ModelStoreService(bus, instance, audit, ModelKeyring(bus, home, every=True), memory)
            async with service.serving():
                yield service
        finally:
            await asyncio.to_thread(memory.close)
            await asyncio.to_thread(instance.close)


async def main(settings: Settings) -> None:
    """Run the model store until SIGTERM or SIGINT."""
    await daemon.run(settings, settings.modelstore_name, DEFAULT_PORT, running, keep_mb=KEEP_MB)
