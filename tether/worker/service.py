"""The worker service: registers, serves assigned versions, sends heartbeats, shuts down in order."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.key_value.keyrings import Keyring, ModelKeyring
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.manifest import Assignment, Heartbeat, Registration
from tether.errors import TetherError
from tether.process import daemon, lifecycle, metrics
from tether.process.data_dir import Home, check_folder, private_folder
from tether.process.tmpfs_folder import MemoryFolder
from tether.settings import Settings, labels_of
from tether.storage.chunk_repair import lending
from tether.wire import codec
from tether.worker.crash_notes import CrashNotes
from tether.worker.files.version_files import WorkerFiles
from tether.worker.jobs.ack_keepalive import KeepAlive
from tether.worker.jobs.deleted_versions import DeletedVersionDrain
from tether.worker.models.machine import Machine
from tether.worker.registration import Registrar
from tether.worker.runtimes import ONNX_PLATFORM
from tether.worker.version_manager import VersionManager

log = logging.getLogger(__name__)

DEFAULT_PORT = 8001
_FORGOTTEN_S = 3.0
"""Seconds without an assignment for its epoch after which a worker registers again."""


class WorkerService:
    """One worker on one connection. Use :func:`running`."""

    def __init__(self, bus: Bus, home: Home, keepalive: KeepAlive, notes: CrashNotes) -> None:
        self._bus = bus
        self._settings = bus.settings
        self.name = bus.signer.name
        self.keyring = Keyring(bus, home, every=False)
        self.model_keyring = ModelKeyring(bus, home, every=False)
        memory = MemoryFolder(bus.settings.decrypted_model_dir, home.root, self.name)
        files = WorkerFiles(bus, home.cache(self.name), self.model_keyring, memory)
        self.holder = VersionManager(bus, files, keepalive, self.keyring, notes)
        self.ended = DeletedVersionDrain(bus, keepalive, self.keyring)
        self._liveness = KvBucket(bus, "liveness")
        self._assign = SignedBucket(bus, "assign", MessageType.ASSIGN)
        self._labels = labels_of(bus.settings)
        self._memory = bus.settings.worker_memory_mb << 20
        self._machine = Machine()
        self._notes = notes
        self.registrar = Registrar(bus, self._describe)
        self._assignment: Assignment | None = None
        self._streams = ""
        """Creation times of the infer streams, as last reported by the dispatcher."""
        self._acknowledged_at = float("-inf")

    @property
    def _epoch(self) -> int:
        return self.registrar.epoch

    def _describe(self, epoch: int) -> Registration:
        settings = self._settings
        return Registration(
            self.name, settings.region, settings.worker_prefetch, (ONNX_PLATFORM,), self._labels, self._memory, epoch
        )

    async def register(self) -> None:
        """Ask dispatchers for an epoch until one answers."""
        await self.registrar.register()
        self._acknowledged_at = self._bus.clock.monotonic()
        self._follow()

    def assigned(self, key: str, body: bytes | None) -> None:
        """Apply an assignment from the dispatcher; ignore those of other workers and of older epochs."""
        if key != self.name or body is None:
            return
        self._assignment = codec.decode(body, Assignment)
        self._follow()

    def _follow(self) -> None:
        """Apply the latest assignment; it may arrive before the registration reply with its epoch.

        When its pool changes, a worker releases all versions before it takes new ones.
        """
        if self._assignment is None or self._assignment.epoch != self._epoch:
            return
        self._acknowledged_at = self._bus.clock.monotonic()
        if self._assignment.streams not in ("", self._streams):
            before, self._streams = self._streams, self._assignment.streams
            if before:
                log.warning("an infer stream was recreated; restarted its pulls", extra={"action": "streams_renewed"})
                self._bus.begin_again()
        if self._assignment.pool != self._bus.pool and not self.holder.holding:
            self._bus.pool = self._bus.bound_pool()
        ours = self._assignment.pool == self._bus.pool
        self.holder.want(
            self._assignment.models if ours else (),
            self._assignment.revisions,
            self._assignment.levels,
            self._assignment.findings if ours else (),
        )
        self.ended.want(self._assignment.ended if ours else ())

    async def beat(self) -> None:
        """Send heartbeats; register again if the dispatcher no longer knows this worker."""
        while True:
            await self.heartbeat()
            if self._assignment is not None and self._assignment.pool != self._bus.pool:
                self._follow()
            if not self.holder.has_orders and self._bus.clock.monotonic() - self._acknowledged_at > _FORGOTTEN_S:
                await self.register()
            await asyncio.sleep(self._settings.heartbeat_s)

    async def heartbeat(self, *, leaving: bool = False) -> None:
        self._notes.beat()
        subject = self._liveness.subject(self.name)
        ready = () if leaving else self.holder.ready()
        metrics.MODELS_LOADED.set(len(ready))
        metrics.MODELS_IN_MEMORY.set(len(self.holder.in_memory()))
        levels = (
            self.holder.update_capacity(await asyncio.to_thread(self._machine.measure))
            if self.holder.shares_by_capacity
            else ()
        )
        body = codec.encode(
            Heartbeat(
                worker=self.name,
                epoch=self._epoch,
                region=self._settings.region,
                ready=ready,
                failed=self.holder.failed(),
                running=self.holder.running(),
                slots=self._settings.worker_prefetch,
                sent_at=self._bus.clock.utc(),
                pool=self._bus.pool,
                labels=self._labels,
                memory=self._memory,
                levels=levels,
                findings=self.holder.findings.unreported(),
                paces=self.holder.paces(),
            )
        )
        try:
            frame = self._bus.signer.sign_envelope(MessageType.HEARTBEAT, subject, body)
            await self._bus.publish(subject, frame)
        except TetherError as error:
            log.debug("could not send a heartbeat: %s", error, extra={"action": "heartbeat_lost"})

    def checks(self) -> dict[str, str]:
        """Return the dependencies of ``/readyz``."""
        return {
            "broker": "ok" if self._bus.connected else "not connected",
            "registration": self.registrar.refused or "ok",
            "results": self.holder.waiting_results() or "ok",
        }

    @property
    def closed(self) -> lifecycle.Termination:
        return self._bus.closed


@asynccontextmanager
async def running(settings: Settings, home: Home, *, alone: bool = False) -> AsyncIterator[WorkerService]:
    """Run a worker until the block ends, then finish its jobs. ``alone``: it is the only service here."""
    private_folder(home.cache(settings.worker_name))
    check_folder(home.cache(settings.worker_name))
    async with AsyncExitStack() as stuck, AsyncExitStack() as stack:
        notes = CrashNotes(home.run, settings.worker_name)
        stack.callback(notes.close)
        if alone:
            notes.watch()
        bus = await stack.enter_async_context(connect(settings, home, settings.worker_name))
        keepalive = KeepAlive(settings, home, settings.worker_name)
        keepalive.start()
        stack.push_async_callback(keepalive.stop)
        worker = WorkerService(bus, home, keepalive, notes)
        if alone:
            stuck.push(lambda kind, *_: _leave(worker, 0 if kind is None else 1))
        tasks = await stack.enter_async_context(lifecycle.tasks())
        stack.push_async_callback(worker.holder.stop, settings.shutdown_timeout_s)
        stack.push_async_callback(worker.ended.stop)
        stack.push_async_callback(worker.heartbeat, leaving=True)
        await stack.enter_async_context(worker.keyring.watching())
        await stack.enter_async_context(worker.model_keyring.watching())
        await worker.register()
        own = worker._assign.watch(worker.assigned, key=worker.name)  # noqa: SLF001 - same module
        await stack.enter_async_context(own)
        await stack.enter_async_context(lending(bus, worker.holder.files.lend))
        tasks.spawn(worker.beat(), "heartbeat")
        tasks.spawn(worker.registrar.confirm(worker._follow), "registration")  # noqa: SLF001 - same module
        tasks.spawn(worker.holder.run(), "holder")
        yield worker


def _leave(worker: WorkerService, status: int) -> None:
    """Exit although a run cannot be ended: Python would wait for its thread."""
    if worker.holder.watch.busy:
        log.warning("exiting with a run that cannot be ended", extra={"action": "run_left"})
        logging.shutdown()
        os._exit(status)


async def main(settings: Settings) -> None:
    """Run the worker until SIGTERM or SIGINT, or until the connection is closed permanently."""
    await daemon.run(settings, settings.worker_name, DEFAULT_PORT, partial(running, alone=True))
