"""Instances of a version in a worker's memory: assigned one run at a time, replaced without failing a run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

from tether.errors import Unavailable
from tether.frameworks.runtime import Endable, Runtime
from tether.process.clock import Clock
from tether.process.os_process import LONG_S
from tether.worker.models.run_limits import ActiveRun, RunWatch
from tether.worker.models.work_thread import WorkThread
from tether.worker.runtimes.process_runtime import ProcessRuntime
from tether.worker.scheduling import batching

log = logging.getLogger(__name__)


class RunResult(NamedTuple):
    """Results of a run and its duration."""

    done: batching.Done
    seconds: float


class _Instance:
    """A loaded model and its one thread; a run that was given up keeps the thread until it returns."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.endable = runtime if isinstance(runtime, Endable) else None
        self.thread = WorkThread("run")

    def ran(self) -> None:
        """Lower the thread's priority for the run after a long one; restore it with a short one."""
        if self.endable is None:
            return
        if self.thread.used_s >= LONG_S:
            self.thread.lower_priority()
        elif self.thread.low_priority:
            self.thread.end()
            self.thread = WorkThread("run")


class InstanceSet:
    """Instances that were loaded together."""

    def __init__(self, runtimes: Sequence[Runtime], clock: Clock, watch: RunWatch, model: str) -> None:
        self._clock = clock
        self._watch, self._model = watch, model
        self._copies = [_Instance(runtime) for runtime in runtimes]
        self._free: asyncio.Queue[_Instance | None] = asyncio.Queue()
        """None: no more instances will be free."""
        for copy in self._copies:
            self._free.put_nowait(copy)
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def runtimes(self) -> list[Runtime]:
        return [copy.runtime for copy in self._copies]

    async def run(self, wanted: batching.Run, active_run: ActiveRun) -> RunResult:
        """Run on the next free instance.

        Raises:
            Unavailable: the set was closed before this run began.
        """
        self._users += 1
        self._unused.clear()
        try:
            copy = await self._free.get()
            if copy is None:
                raise Unavailable("the model is being unloaded")
            began = self._clock.monotonic()
            done = await self._run(copy, wanted, active_run)
            return RunResult(done, self._clock.monotonic() - began)
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    def _run(self, copy: _Instance, wanted: batching.Run, active_run: ActiveRun) -> asyncio.Future[batching.Done]:
        """Start the run. Its thread, and so the instance, may become free after the returned future."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[batching.Done] = loop.create_future()

        def ended(thread: asyncio.Future[batching.Done]) -> None:
            copy.ran()
            self._free.put_nowait(copy)
            if copy.endable is not None:
                active_run.ended()
                self._watch.end(self._model, active_run)
            error = None if thread.cancelled() else thread.exception()
            if result.done():
                return
            if thread.cancelled():
                result.set_exception(Unavailable("the model is being unloaded"))
            elif error is not None:
                result.set_exception(error)
            else:
                result.set_result(thread.result())

        def give_up() -> None:
            if not result.done():
                result.set_result(batching.Done([None] * len(wanted.segments)))

        if copy.endable is not None:
            copy.endable.allow_runs()
            self._watch.begin(active_run)
            active_run.begin(copy.endable, give_up, copy.thread.check_priority)
        copy.thread.run(partial(batching.run, copy.runtime, wanted)).add_done_callback(ended)
        return result

    def limit(self, run_timeout_s: float) -> None:
        """Set the timeout of later runs in models that have their own processes."""
        for runtime in self.runtimes:
            if isinstance(runtime, ProcessRuntime):
                runtime.run_timeout_s = run_timeout_s

    async def end(self, within_s: float) -> None:
        """Free the memory when nothing runs, or after ``within_s``."""
        try:
            async with asyncio.timeout(within_s):
                await self._unused.wait()
        except TimeoutError:
            log.warning("a run did not finish in time", extra={"action": "drain_timeout"})
        finally:
            self.close()

    def close(self) -> None:
        for _ in range(self._users):
            self._free.put_nowait(None)
        for copy in self._copies:
            if copy.endable is not None:
                copy.endable.end_run()
            copy.thread.end()
            copy.runtime.close()


Load = Callable[[], Awaitable[InstanceSet]]


class InstancePool:
    """Instances of a version, loaded by ``load`` on first use."""

    def __init__(self, load: Load, clock: Clock, on_idle: Callable[[], None] = lambda: None) -> None:
        self._load = load
        self._on_idle = on_idle
        self._clock = clock
        self._now: InstanceSet | None = None
        self._changing = asyncio.Lock()
        self._users = 0
        self.used_at = clock.monotonic()

    @property
    def loaded(self) -> bool:
        return self._now is not None

    @property
    def idle(self) -> bool:
        """Return True if no caller uses or changes the instances."""
        return not self._users and not self._changing.locked()

    @property
    def runtimes(self) -> list[Runtime]:
        return [] if self._now is None else self._now.runtimes

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[None]:
        """Keep the instances in memory, once loaded, until the block ends."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self.used_at = self._clock.monotonic()
            if not self._users:
                self._on_idle()

    async def ensure(self) -> None:
        """Load the instances if needed; concurrent callers share one load.

        Raises:
            TetherError: as ``load`` does.
        """
        if self._now is None:
            async with self._changing:
                if self._now is None:
                    self._now = await self._load()

    async def renew(self, shutdown_timeout_s: float) -> None:
        """Load new instances beside the current ones and switch to them; active runs finish on the old ones.

        If the load fails, the current ones stay.

        Raises:
            TetherError: as ``load`` does.
        """
        async with self._changing:
            if self._now is None:
                return
            new = await self._load()
            old, self._now = self._now, new
        await old.end(shutdown_timeout_s)

    async def run(self, wanted: batching.Run, active_run: ActiveRun) -> RunResult:
        """Run as :meth:`InstanceSet.run` does; only while pinned and loaded."""
        assert self._now is not None  # noqa: S101 - the caller has pinned and loaded them
        return await self._now.run(wanted, active_run)

    def limit(self, run_timeout_s: float) -> None:
        if self._now is not None:
            self._now.limit(run_timeout_s)

    def detach(self) -> InstanceSet | None:
        """Return the loaded instances for the caller to close; the next use loads again. Only while idle."""
        now, self._now = self._now, None
        return now
