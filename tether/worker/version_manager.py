"""Hosts the assigned versions: downloads, loads, serves and releases them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.bus.key_value.keyrings import Keyring
from tether.domain.manifest import Finding, Manifest, ModelRef
from tether.domain.worker_protocol import BUNDLE_S
from tether.errors import ModelNotFound, TetherError
from tether.model.config import InstanceKind, LoadBalancing
from tether.process.lifecycle import Tasks
from tether.storage.model_files import open_manifest
from tether.worker.crash_notes import CrashNotes
from tether.worker.files.version_files import WorkerFiles
from tether.worker.jobs.ack_keepalive import KeepAlive
from tether.worker.jobs.version_server import VersionServer
from tether.worker.model_configs import ModelConfigReader
from tether.worker.models.instances import InstancePool, InstanceSet
from tether.worker.models.loader import Loader, Loads
from tether.worker.models.memory_budget import Memory
from tether.worker.models.run_limits import RunWatch
from tether.worker.models.version_findings import Findings
from tether.worker.runs import row_judgement
from tether.worker.runs.isolated_instance import CrashListeners as ApartHearing
from tether.worker.runs.isolated_instance import IsolatedInstance, Seats
from tether.worker.runs.job_runs import RunListeners
from tether.worker.scheduling.pull_balance import Headroom

log = logging.getLogger(__name__)

Change = Callable[[ModelRef], Awaitable[None]]

_REST_S = 0.5
"""Seconds between two searches for idle versions."""
_RETRY_S = (0.5, 1.0, 2.0, 5.0, 15.0)
_AHEAD = 4
"""Concurrent processes that wait for files, so that hundreds of assignments do not start as many."""


@dataclass(frozen=True)
class HostedVersion:
    """A version that is served."""

    instance: VersionServer
    loader: Loader

    @property
    def copies(self) -> int:
        """Return the number of instances, now or after the next load."""
        current = self.loader.current if self.instance.instances.loaded else None
        return (current or self.loader.wanted).copies

    @property
    def outdated(self) -> bool:
        """Return True if the loaded instances differ from the wanted load specification."""
        return self.instance.instances.loaded and self.loader.current != self.loader.wanted


class VersionManager:
    """Reconciles hosted versions with assigned ones; changes of one version run one at a time."""

    def __init__(self, bus: Bus, files: WorkerFiles, keepalive: KeepAlive, keyring: Keyring, notes: CrashNotes) -> None:
        self._bus = bus
        self._keyring = keyring
        self._notes = notes
        self.files = files
        self.configs = ModelConfigReader(bus, self._on_config_changed)
        self._keepalive = keepalive
        self._manifests = KvBucket(bus, "models")
        self._wanted: frozenset[ModelRef] = frozenset()
        self._held: dict[ModelRef, HostedVersion] = {}
        self._failed: dict[ModelRef, str] = {}
        self._busy: set[ModelRef] = set()
        self._changed = asyncio.Event()
        self._baseline_capacity: dict[ModelRef, float] = {}
        """Capacity of the least able worker by version, from the dispatcher."""
        self._unloadable: set[ModelRef] = set()
        """Hosted versions that could not be loaded for a job."""
        self.watch = RunWatch(bus.settings.run_memory_mb)
        self.memory = Memory(bus.settings.worker_memory_mb << 20, self._evictable)
        self._tasks = Tasks()
        self._news: dict[str, asyncio.Event] = {}
        """Set when a model's configuration changes, to cut waits before a retry short."""
        self._ahead = asyncio.Semaphore(_AHEAD)
        self._judging = asyncio.Semaphore(1)
        self._seats = Seats()
        self._loads = Loads(bus.clock.monotonic)
        self._stopping = False
        self.has_orders = False
        self.findings = Findings(lambda ref: self._apply_config(ref.model))
        for ref, how in notes.crashed.items():
            self.findings.record(ref, Finding(crashed=how))

    def want(
        self,
        models: Sequence[ModelRef],
        revisions: Sequence[tuple[str, int]] = (),
        levels: Sequence[tuple[ModelRef, float]] = (),
        findings: Sequence[tuple[ModelRef, Finding]] = (),
    ) -> None:
        self.has_orders = True
        self.findings.set_known(findings)
        self._wanted = frozenset(models)
        self._baseline_capacity = dict(levels)
        self.configs.set_revisions(revisions)
        self._changed.set()

    @property
    def holding(self) -> bool:
        """Return True if a version is hosted, or being loaded or released."""
        return bool(self._held or self._busy)

    def ready(self) -> tuple[ModelRef, ...]:
        return tuple(sorted(self._held, key=lambda ref: (ref.model, ref.version)))

    def failed(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"{ref.model}:{ref.version}", reason) for ref, reason in self._failed.items())

    def in_memory(self) -> tuple[ModelRef, ...]:
        """Return the hosted versions that are loaded."""
        return tuple(ref for ref in self.ready() if self._held[ref].instance.instances.loaded)

    def waiting_results(self) -> str:
        """Return why outcomes of durable jobs are not stored; empty while they are."""
        found = [held.instance.reader.answers.waiting for held in self._held.values()]
        return next(filter(None, found), "")

    def running(self) -> int:
        return sum(held.instance.running for held in self._held.values())

    @property
    def shares_by_capacity(self) -> bool:
        """Return True if a hosted version is balanced by capacity."""
        return any(held.loader.config.load_balancing is LoadBalancing.CAPACITY for held in self._held.values())

    def update_capacity(self, headroom: Headroom) -> tuple[tuple[ModelRef, float], ...]:
        """Update pulls by the machine's free capacity; return the levels of versions balanced by it."""
        found = []
        for ref in self.ready():
            held = self._held[ref]
            factor = headroom.factor(on_gpu=held.loader.wanted.options.device != InstanceKind.CPU)
            if level := held.instance.update_capacity(factor, self._baseline_capacity.get(ref, 0.0)):
                found.append((ref, level))
        return tuple(found)

    def paces(self) -> tuple[tuple[ModelRef, float], ...]:
        """Return seconds for each job, of versions whose full bundles take long enough to be split."""
        found = [(ref, held.instance.runs.pace.job_s) for ref, held in self._held.items()]
        return tuple((ref, job_s) for ref, job_s in found if job_s * self._bus.settings.bundle_max_jobs > BUNDLE_S)

    async def run(self) -> None:
        await self.files.sweep()
        self._tasks.spawn(self._unload_idle_loop(), "rest")
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._stopping:
                return
            for ref in self._wanted - self._held.keys() - self._busy:
                self._start_change(ref, self._load, "load")
            for ref in self._held.keys() - self._wanted - self._busy:
                self._start_change(ref, self._unload, "unload")
            for ref in (self._unloadable & self._held.keys()) - self._busy:
                self._start_change(ref, self._reload_after_failure, "load")
            for ref in [ref for ref, held in self._held.items() if held.outdated and ref not in self._busy]:
                self._start_change(ref, self._renew, "renew")

    def _start_change(self, ref: ModelRef, change: Change, what: str) -> None:
        self._busy.add(ref)
        self._tasks.spawn(self._to_its_end(ref, change), f"{what}-{ref.model}")

    async def _to_its_end(self, ref: ModelRef, change: Change) -> None:
        try:
            await change(ref)
        finally:
            self._busy.discard(ref)
            if ref not in self._held:
                self._unloadable.discard(ref)
            if ref not in self._wanted:
                self._failed.pop(ref, None)
            if not any(other.model == ref.model for other in (*self._held, *self._busy)):
                self.configs.forget(ref.model)
                self._news.pop(ref.model, None)
            self._changed.set()

    async def stop(self, shutdown_timeout_s: float) -> None:
        """Release all versions after they have finished their pending jobs."""
        self._stopping = True
        await self.configs.stop()
        await self._tasks.cancel()
        held = [self._held.pop(ref) for ref in list(self._held)]
        await asyncio.gather(*[one.instance.stop(shutdown_timeout_s) for one in held])
        await self.memory.close()
        await self.files.close()

    async def _load(self, ref: ModelRef, *, lazily: bool = True) -> None:
        """Retry until the version is hosted or not assigned. ``lazily``: it may load on its first job."""
        tries = 0
        while ref in self._wanted:
            try:
                self._held[ref] = await self._loaded(ref, lazily=lazily, ahead=not tries)
            except Exception as error:  # noqa: BLE001 - reported and retried
                self._report_failure(ref, error)
            else:
                self._failed.pop(ref, None)
                self._unloadable.discard(ref)
                self._apply_config(ref.model)
                log.info(
                    "loaded a version", extra={"action": "model_loaded", "model": ref.model, "version": ref.version}
                )
                return
            await self._wait_before_retry(ref, tries)
            tries += 1

    def _report_failure(self, ref: ModelRef, error: Exception) -> None:
        """Record why a version is not loaded as wanted; every heartbeat carries it."""
        fields = {"action": "load_failed", "model": ref.model, "version": ref.version}
        if isinstance(error, TetherError):
            self._failed[ref] = f"{error.code}: {error.message}"
            log.warning("could not load a version: %s", error, extra=fields)
        else:
            self._failed[ref] = f"{TetherError.code}: {type(error).__name__}; see the worker's log"
            log.error("could not load a version", exc_info=error, extra=fields)

    async def _wait_before_retry(self, ref: ModelRef, tries: int) -> None:
        """Wait before the next try, unless the model's configuration changes."""
        news = self._news.setdefault(ref.model, asyncio.Event())
        news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S[min(tries, len(_RETRY_S) - 1)]):
                await news.wait()

    async def _loaded(self, ref: ModelRef, *, lazily: bool, ahead: bool) -> HostedVersion:
        manifest = await self._manifest(ref)
        config = await self.configs.read(ref.model)
        directory = await self.files.place(ref, manifest)
        loader = Loader(self._bus, manifest, directory, config, self.memory, loads=self._loads)
        loader.graphs, loader.finding = str(self.files.graphs), self.findings.get(ref)
        loader.running = partial(self._notes.running, ref)
        loader.watch = self.watch
        at_once = not (lazily and loader.lazy)
        try:
            await self._fetch(ref, loader, ahead=ahead and at_once)
            copies = InstancePool(partial(self._load_now, loader), self._bus.clock, self.memory.wake_waiters)
            if at_once:
                await copies.ensure()
            over = partial(self.findings.record_over_limit, ref)
            listeners = RunListeners(
                partial(self._mark_unloadable, ref), partial(self.findings.record_mixed, ref), over
            )
            alone = ApartHearing(partial(self.findings.record_crash, ref), over)
            isolated = IsolatedInstance(copies, loader.load_apart, alone, self._seats, self.watch.limit_mb)
            instance = VersionServer(self._bus, manifest, isolated, self._keepalive, self._keyring, listeners=listeners)
            instance.configure(loader.serving, loader.wanted.copies)
            try:
                await instance.start()
            except BaseException:
                await instance.stop(0)
                raise
        except BaseException:
            await loader.abort()
            self._release_files_and_memory(ref)
            raise
        self._tasks.spawn(self.files.remember(manifest, directory), "remember-chunks")
        if row_judgement.unjudged(manifest):
            self._tasks.spawn(self._judge(ref, manifest, directory), f"judge-{ref.model}")
        return HostedVersion(instance, loader)

    async def _judge(self, ref: ModelRef, manifest: Manifest, directory: Path) -> None:
        """Prove whether rows are independent, if unknown, one version at a time; batch only after that."""
        async with self._judging:
            known = self.findings.get(ref)
            if known.proven or known.unproven:
                return
            finding = await row_judgement.judge(manifest, directory)
        if ref in self._held:  # otherwise the files may be gone
            self.findings.record(ref, finding)
            words = finding.unproven or "proved that its rows are independent"
            fields = {"action": "batching_judged", "model": ref.model, "version": ref.version}
            log.info("%s:%d: %s", ref.model, ref.version, words, extra=fields)

    async def _fetch(self, ref: ModelRef, loader: Loader, *, ahead: bool) -> None:
        """Download the files. ``ahead``: prepare the runtime meanwhile; not after a failed try."""
        if not ahead or self._ahead.locked():
            await self.files.fetch(ref, loader.manifest)
            return
        async with self._ahead:
            loader.prepare()
            await self.files.fetch(ref, loader.manifest)

    async def _load_now(self, loader: Loader) -> InstanceSet:
        """Load instances, and again if the configuration changed meanwhile."""
        generation = await loader.load()
        asyncio.get_running_loop().call_soon(self._apply_config, loader.manifest.name)
        return generation

    def _release_files_and_memory(self, ref: ModelRef) -> None:
        self.files.release(ref)
        self.memory.change(ref, 0)

    def _mark_unloadable(self, ref: ModelRef, error: Exception) -> None:
        """Record that a version could not be loaded for a job: the worker is not ready for it."""
        self._report_failure(ref, error)
        self._unloadable.add(ref)
        self._changed.set()

    async def _reload_after_failure(self, ref: ModelRef) -> None:
        held = self._held.pop(ref)
        await held.instance.stop(self._bus.settings.shutdown_timeout_s)
        self._unloadable.discard(ref)
        self._release_files_and_memory(ref)
        await self._load(ref, lazily=False)

    def _evictable(self) -> list[tuple[ModelRef, InstancePool]]:
        """Return the versions that may be unloaded; their next job loads them again."""
        found = [(ref, held.instance.instances, held.loader.config) for ref, held in self._held.items()]
        return [(ref, copies) for ref, copies, config in found if copies.loaded and copies.idle and not config.pinned]

    async def _unload_idle_loop(self) -> None:
        """Unload versions that were idle for their configured time."""
        while True:
            now = self._bus.clock.monotonic()
            for ref, copies in self._evictable():
                limit = self._held[ref].loader.config.idle_unload_s
                if limit and now - copies.used_at >= limit:
                    self.memory.evict(ref, copies, "idle")
            await asyncio.sleep(_REST_S)

    def _on_config_changed(self, model: str) -> None:
        if model in self._news:
            self._news[model].set()
        self._apply_config(model)

    def _apply_config(self, model: str) -> None:
        """Apply a changed configuration: update in place if possible, otherwise reload."""
        config = self.configs.get(model)
        for ref, held in self._held.items():
            if ref.model == model:
                before, held.loader.config = held.loader.lazy, config
                held.loader.finding = self.findings.get(ref)
                held.instance.configure(held.loader.serving, held.copies)
                if before and not held.loader.lazy:
                    self._tasks.spawn(held.instance.wake(), f"wake-{ref.model}")
        self._changed.set()

    async def _renew(self, ref: ModelRef) -> None:
        """Reload until the load matches; the old instances serve meanwhile, and if the load fails."""
        held, tries = self._held[ref], 0
        while held.outdated and ref in self._wanted:
            try:
                await held.instance.instances.renew(self._last_run_s(held.loader))
            except Exception as error:  # noqa: BLE001 - reported and retried
                self._report_failure(ref, error)
                await self._wait_before_retry(ref, tries)
                tries += 1
            else:
                self._failed.pop(ref, None)
                log.info(
                    "reloaded a version", extra={"action": "model_renewed", "model": ref.model, "version": ref.version}
                )
            self._apply_config(ref.model)

    def _last_run_s(self, loader: Loader) -> float:
        """Return the seconds for active runs to finish on unload: their full timeout."""
        return max(self._bus.settings.shutdown_timeout_s, loader.serving.run_timeout_s)

    async def _manifest(self, ref: ModelRef) -> Manifest:
        key = self._bus.names.version_key(ref.model, ref.version)
        frame = await self._manifests.get(key)
        if frame is None:
            raise ModelNotFound(f"model '{ref.model}' has no version {ref.version}")
        return open_manifest(self._bus.verifier, self._bus.names, key, frame)

    async def _unload(self, ref: ModelRef) -> None:
        held = self._held.pop(ref)
        await held.instance.stop(self._last_run_s(held.loader))
        self._release_files_and_memory(ref)
        log.info("unloaded a version", extra={"action": "model_unloaded", "model": ref.model, "version": ref.version})
