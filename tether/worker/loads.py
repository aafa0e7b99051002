"""How the copies of a version come into memory: as many as its configuration says, warmed up."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path

import msgspec

from tether.bus.connection import Bus
from tether.model import Manifest, ModelRef
from tether.model_config import Loading, ModelConfig
from tether.ports import Runtime
from tether.worker import runtimes
from tether.worker.copies import Generation
from tether.worker.loadout import Loadout, Serving, loadout, serving
from tether.worker.memory import Memory
from tether.worker.runtimes.process import Options
from tether.worker.warmup import warm_up


class Loader:
    """Loads one version from its files, each time as its configuration says at that moment."""

    def __init__(self, bus: Bus, manifest: Manifest, directory: Path, config: ModelConfig, memory: Memory) -> None:
        self._bus = bus
        self.manifest = manifest
        self._ref = ModelRef(manifest.name, manifest.version)
        self._directory = directory
        self._memory = memory
        self.config = config
        self.current: Loadout | None = None
        """What was loaded last."""
        self.graphs = ""
        """Where optimised graphs are kept; empty: nowhere."""

    @property
    def lazy(self) -> bool:
        """Whether it waits for its first job."""
        return self.config.loading is Loading.LAZY and not self.config.pinned

    @property
    def wanted(self) -> Loadout:
        return loadout(self.manifest, self.config, self._bus.settings)

    @property
    def serving(self) -> Serving:
        return serving(self.manifest, self.config, self._bus.settings)

    async def load(self) -> Generation:
        """Load once there is room.

        Raises:
            ModelRejected: the framework refuses the files, or a warm-up run failed.
            Unavailable: there is no room in memory.
        """
        wanted, before = self.wanted, self._memory.taken(self._ref)
        await self._memory.reserve(self._ref, self.manifest.size * wanted.copies)
        try:
            made = await self._all(wanted, self.serving.run_timeout_s)
        except BaseException:
            self._memory.change(self._ref, before)
            raise
        self.current = wanted
        return Generation(made, self._bus.clock)

    async def _all(self, wanted: Loadout, timeout_s: float) -> list[Runtime]:
        """The first copy alone, so that one that fails does so once; then the others side by side."""
        made: list[Runtime] = []
        try:
            made.append(await self._one(wanted, timeout_s))
            rest = [self._one(wanted, timeout_s) for _ in range(wanted.copies - 1)]
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

    async def _one(self, wanted: Loadout, timeout_s: float) -> Runtime:
        """Load in a thread; what nobody wants any more when it is ready is closed."""
        closed = threading.Event()
        kept_mb = self._bus.settings.cache_graphs_mb
        graphs = self.graphs if kept_mb else ""
        options = msgspec.structs.replace(
            wanted.options, run_timeout_s=timeout_s, graph_cache=graphs, graph_cache_mb=kept_mb
        )
        loading = asyncio.ensure_future(asyncio.to_thread(partial(_warm, wanted, self._directory, options, closed)))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            closed.set()
            await asyncio.wait({loading})
            if loading.exception() is None:
                loading.result().close()
            raise


def _warm(wanted: Loadout, directory: Path, options: Options, closed: threading.Event) -> Runtime:
    runtime = runtimes.load(wanted.manifest, directory, options, closed)
    try:
        warm_up(runtime, wanted.manifest, wanted.warmup)
    except BaseException:
        runtime.close()
        raise
    return runtime
