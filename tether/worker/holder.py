"""The versions a worker holds: fetched, loaded, served, and let go again, as the dispatcher assigns."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tether.bus.connection import Bus
from tether.bus.kv import KvBucket
from tether.bus.model_files import open_manifest
from tether.bus.tenant_keys import Keyring
from tether.errors import ModelNotFound, TetherError
from tether.lifecycle import Tasks
from tether.model import Manifest, ModelRef
from tether.ports import Runtime
from tether.worker import runtimes
from tether.worker.files import WorkerFiles
from tether.worker.instance import ModelInstance
from tether.worker.keepalive import KeepAlive
from tether.worker.runtimes.process import Options

log = logging.getLogger(__name__)

_RETRY_S = (0.5, 1.0, 2.0, 5.0, 15.0)


class Holder:
    """Brings what is held in line with what is wanted. One change at a time for each version."""

    def __init__(self, bus: Bus, cache: Path, keepalive: KeepAlive, keyring: Keyring) -> None:
        self._bus = bus
        self._keyring = keyring
        self.files = WorkerFiles(bus, cache)
        self._keepalive = keepalive
        self._manifests = KvBucket(bus, "models")
        self._wanted: frozenset[ModelRef] = frozenset()
        self._instances: dict[ModelRef, ModelInstance] = {}
        self._failed: dict[ModelRef, str] = {}
        self._busy: set[ModelRef] = set()
        self._changed = asyncio.Event()
        self._tasks = Tasks()
        self._stopping = False
        self.has_orders = False

    def want(self, models: Sequence[ModelRef]) -> None:
        self.has_orders = True
        self._wanted = frozenset(models)
        self._changed.set()

    @property
    def holding(self) -> bool:
        """Whether a version is loaded, or on its way in or out."""
        return bool(self._instances or self._busy)

    def ready(self) -> tuple[ModelRef, ...]:
        return tuple(sorted(self._instances, key=lambda ref: (ref.model, ref.version)))

    def failed(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"{ref.model}:{ref.version}", reason) for ref, reason in self._failed.items())

    def running(self) -> int:
        return sum(instance.running for instance in self._instances.values())

    async def run(self) -> None:
        await self.files.sweep()
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._stopping:
                return
            for ref in self._wanted - self._instances.keys() - self._busy:
                self._busy.add(ref)
                self._tasks.spawn(self._load(ref), f"load-{ref.model}")
            for ref in self._instances.keys() - self._wanted - self._busy:
                self._busy.add(ref)
                self._tasks.spawn(self._unload(ref), f"unload-{ref.model}")

    async def stop(self, drain_s: float) -> None:
        """Let every version go, each finishing what it holds."""
        self._stopping = True
        await self._tasks.cancel()
        instances = [self._instances.pop(ref) for ref in list(self._instances)]
        await asyncio.gather(*[instance.stop(drain_s) for instance in instances])
        await self.files.close()

    async def _load(self, ref: ModelRef) -> None:
        """Try until it is loaded or no longer wanted."""
        tries = 0
        try:
            while ref in self._wanted:
                try:
                    self._instances[ref] = await self._loaded(ref)
                    self._failed.pop(ref, None)
                    log.info("loaded", extra={"action": "model_loaded", "model": ref.model, "version": ref.version})
                    return
                except TetherError as error:
                    self._failed[ref] = f"{error.code}: {error.message}"
                    log.warning("not loaded: %s", error, extra={"action": "load_failed", "model": ref.model})
                except Exception as error:
                    self._failed[ref] = f"{TetherError.code}: {type(error).__name__}; the worker's log has the reason"
                    log.exception("not loaded", extra={"action": "load_failed", "model": ref.model})
                await asyncio.sleep(_RETRY_S[min(tries, len(_RETRY_S) - 1)])
                tries += 1
            self._failed.pop(ref, None)
        finally:
            self._busy.discard(ref)
            self._changed.set()

    async def _loaded(self, ref: ModelRef) -> ModelInstance:
        manifest = await self._manifest(ref)
        directory = await self.files.fetch(ref, manifest)
        try:
            runtime = await self._runtime(manifest, directory)
            instance = ModelInstance(self._bus, manifest, runtime, self._keepalive, self._keyring)
            try:
                await instance.start()
            except BaseException:
                await instance.stop(0)
                raise
        except BaseException:
            self.files.release(ref)
            raise
        self._tasks.spawn(self.files.remember(manifest, directory), "remember-pieces")
        return instance

    async def _runtime(self, manifest: Manifest, directory: Path) -> Runtime:
        """Load in a thread; what nobody wants any more when it is ready is closed."""
        closed = threading.Event()
        load = partial(runtimes.load, manifest, directory, self._options(manifest), closed)
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            closed.set()
            await asyncio.wait({loading})
            if loading.exception() is None:
                loading.result().close()
            raise

    def _last_run_s(self, manifest: Manifest) -> float:
        """What has begun may end, however long a run may take: the worker itself goes on."""
        settings = self._bus.settings
        return max(settings.drain_s, manifest.run_timeout_s or settings.run_timeout_s)

    def _options(self, manifest: Manifest) -> Options:
        settings = self._bus.settings
        timeout_s = manifest.run_timeout_s or settings.run_timeout_s
        return Options(settings.onnx_threads, settings.model_memory_mb, timeout_s, device=settings.model_device)

    async def _manifest(self, ref: ModelRef) -> Manifest:
        key = self._bus.names.version_key(ref.model, ref.version)
        frame = await self._manifests.get(key)
        if frame is None:
            raise ModelNotFound(f"model '{ref.model}' has no version {ref.version}")
        return open_manifest(self._bus.verifier, self._bus.names, key, frame)

    async def _unload(self, ref: ModelRef) -> None:
        try:
            instance = self._instances.pop(ref)
            await instance.stop(self._last_run_s(instance.manifest))
            self.files.release(ref)
            log.info("unloaded", extra={"action": "model_unloaded", "model": ref.model, "version": ref.version})
        finally:
            self._busy.discard(ref)
            self._changed.set()
