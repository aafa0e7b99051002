"""Loads and warms up the configured number of instances of a version."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from tether.bus.bus import Bus
from tether.domain.manifest import NO_FINDING, Isolation, Manifest, ModelRef
from tether.frameworks.runtime import Runtime
from tether.model.config import Loading, ModelConfig
from tether.process.tenant_turns import TenantTurns
from tether.worker import runtimes
from tether.worker.models.instances import InstanceSet
from tether.worker.models.load_spec import LoadSpec, RunSpec, load_spec, run_spec
from tether.worker.models.memory_budget import Memory
from tether.worker.models.run_limits import RunWatch
from tether.worker.models.work_thread import WorkThread
from tether.worker.runtimes import PreparedRuntime, Running
from tether.worker.runtimes.process_runtime import Options
from tether.worker.runtimes.warmup import warm_up

T = TypeVar("T", bound="PreparedRuntime | Runtime")

EACH = min(28, os.cpu_count() or 1)
"""Concurrent loads of one tenant's models in a worker. A load may take minutes and cannot be interrupted."""

LOADS = EACH + 4
"""Concurrent loads of all tenants."""

_STARTED_S = 1.0
"""Seconds after which a load has created its model's own threads."""


class Loads:
    """Threads for loads and warm-ups in one worker; shared fairly between tenants."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._turns = TenantTurns(LOADS, now, each=EACH)

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[WorkThread]:
        """Wait for the tenant's turn and yield a thread for one load."""
        async with self._turns.turn(tenant):
            thread = WorkThread("load")
            try:
                yield thread
            finally:
                thread.end()


class Loader:
    """Loads one version from its files by the configuration at the time of each load."""

    def __init__(
        self,
        bus: Bus,
        manifest: Manifest,
        directory: Path,
        config: ModelConfig,
        memory: Memory,
        *,
        loads: Loads | None = None,
    ) -> None:
        self._loads = loads or Loads(bus.clock.monotonic)
        self._bus = bus
        self.manifest = manifest
        self._ref = ModelRef(manifest.name, manifest.version)
        self._directory = directory
        self._memory = memory
        self.config = config
        self.current: LoadSpec | None = None
        """The last load's specification."""
        self.finding = NO_FINDING
        """Findings on the version in addition to its manifest."""
        self.running: Running = nullcontext
        """Entered while the model is loaded or runs in this process."""
        self.graphs = ""
        """Folder of optimised graphs; empty: not stored."""
        self.watch = RunWatch(bus.settings.run_memory_mb)
        """Watches the runs in this process."""
        self._begun: _LoadingInstance | None = None

    @property
    def lazy(self) -> bool:
        """Return True if the version is loaded on its first job."""
        return self.config.loading is Loading.LAZY and not self.config.pinned

    @property
    def wanted(self) -> LoadSpec:
        return load_spec(self.manifest, self.config, self._bus.settings, self.finding)

    @property
    def serving(self) -> RunSpec:
        return run_spec(self.manifest, self.config, self._bus.settings, self.finding)

    def prepare(self) -> None:
        """Prepare the first instance while files are fetched, if memory allows it without evicting others."""
        wanted = self.wanted
        if self._memory.take(self._ref, self.manifest.size * wanted.copies):
            self._begun = self._prepare_instance(wanted)

    async def abort(self) -> None:
        """Abort a prepared instance that was never loaded."""
        begun, self._begun = self._begun, None
        if begun is not None:
            await begun.give_up()
            self._memory.change(self._ref, 0)

    async def load(self) -> InstanceSet:
        """Reserve memory, then load the instances.

        Raises:
            ModelRejected: the framework refused the files, or a warm-up run failed.
            Unavailable: there is not enough memory.
        """
        begun, self._begun = self._begun, None
        before = 0 if begun else self._memory.taken(self._ref)
        wanted = begun.wanted if begun else self.wanted
        if begun is None:
            await self._memory.reserve(self._ref, self.manifest.size * wanted.copies)
        try:
            made = await self._all(wanted, begun)
        except BaseException:
            self._memory.change(self._ref, before)
            raise
        self.current = wanted
        return self._generation(made)

    async def load_apart(self) -> InstanceSet:
        """Load one more instance in its own process; no memory is reserved for it.

        Raises:
            ModelRejected: it cannot be loaded.
        """
        wanted = self.wanted
        manifest = msgspec.structs.replace(wanted.manifest, isolation=Isolation.PROCESS.value)
        return self._generation([await self._one(wanted._replace(manifest=manifest))])

    def _generation(self, runtimes: list[Runtime]) -> InstanceSet:
        return InstanceSet(runtimes, self._bus.clock, self.watch, self._ref.model)

    async def _all(self, wanted: LoadSpec, begun: _LoadingInstance | None) -> list[Runtime]:
        """Load the first instance alone, so that a broken model fails once; then the others in parallel."""
        made: list[Runtime] = []
        try:
            made.append(await self._one(wanted, begun))
            rest = [self._one(wanted) for _ in range(wanted.copies - 1)]
            found = await asyncio.gather(*rest, return_exceptions=True)
            made += [one for one in found if not isinstance(one, BaseException)]
            for one in found:
                if isinstance(one, BaseException):
                    raise one
        except BaseException:
            for runtime in made:
                runtime.close()
            raise
        return made

    async def _one(self, wanted: LoadSpec, begun: _LoadingInstance | None = None) -> Runtime:
        """Load an instance in the tenant's turn, from ``begun`` if it was prepared."""
        try:
            async with self._loads.turn(self.manifest.tenant) as thread:
                copy, begun = begun or self._prepare_instance(wanted), None
                return await copy.load(thread)
        finally:
            if begun is not None:
                await begun.give_up()

    def _prepare_instance(self, wanted: LoadSpec) -> _LoadingInstance:
        kept_mb = self._bus.settings.cache_graphs_mb
        options = msgspec.structs.replace(
            wanted.options,
            run_timeout_s=self.serving.run_timeout_s,
            graph_cache=self.graphs if kept_mb else "",
            graph_cache_mb=kept_mb,
        )
        return _LoadingInstance(wanted, self._directory, options, self.running)


class _LoadingInstance:
    """An instance being loaded. Its creator must call ``load`` or ``give_up``."""

    def __init__(self, wanted: LoadSpec, directory: Path, options: Options, running: Running) -> None:
        self.wanted = wanted
        self._directory = directory
        self._closed = threading.Event()
        self._limit_s = options.load_timeout_s
        self._beginning = _in_thread(
            partial(runtimes.begin, wanted.manifest, directory, options, self._closed, running)
        )

    async def load(self, thread: WorkThread) -> Runtime:
        """Load the fetched files and warm up in a thread; close the instance if cancelled meanwhile."""
        begun = await self._wanted(self._beginning)
        loading = thread.run(partial(_warm, begun, self.wanted, self._directory, thread))
        loop = asyncio.get_running_loop()
        timers = (loop.call_later(self._limit_s, begun.end), loop.call_later(_STARTED_S, thread.lower_priority))
        try:
            return await self._wanted(loading, begun.end)
        finally:
            for timer in timers:
                timer.cancel()

    async def give_up(self) -> None:
        """Abort the load at any stage."""
        self._closed.set()
        await _close(self._beginning)

    async def _wanted(self, coming: asyncio.Future[T], end: Callable[[], None] = lambda: None) -> T:
        try:
            return await asyncio.shield(coming)
        except asyncio.CancelledError:
            self._closed.set()
            end()
            await _close(coming)
            raise


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    return asyncio.ensure_future(asyncio.to_thread(work))


async def _close(coming: asyncio.Future[T]) -> None:
    await asyncio.wait({coming})
    if coming.exception() is None:
        coming.result().close()


def _warm(begun: PreparedRuntime, wanted: LoadSpec, directory: Path, thread: WorkThread) -> Runtime:
    """Load and warm up; the model's own threads are created before this thread lowers its priority."""
    if wanted.options.threads == 1:
        thread.lower_priority()
    try:
        runtime = begun.load()
        thread.lower_priority()
        warm_up(runtime, wanted.manifest, wanted.warmup, directory)
    except BaseException:
        begun.close()
        raise
    return runtime
