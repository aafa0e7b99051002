"""An instance in its own process, for jobs that may have killed the worker that had them before.

If such a job kills a process again, it kills this one, and the version is known. A run that was ended because
the worker's process used too much memory is repeated here too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from tether.errors import ModelRejected
from tether.worker.models.instances import InstancePool, InstanceSet, RunResult
from tether.worker.models.run_limits import ActiveRun, memory_of, peak_of
from tether.worker.runtimes.process_runtime import ProcessRuntime
from tether.worker.scheduling import batching

log = logging.getLogger(__name__)

IDLE_S = 5.0
"""Seconds that the process stays after its last run: a bundle's jobs follow one another."""
SEATS = 2
"""Isolated instances in a worker; after a crash each of its versions may have redelivered jobs."""


class Seats:
    """Counts how many more isolated instances a worker may start."""

    def __init__(self) -> None:
        self.left = SEATS


class CrashListeners(NamedTuple):
    """Callbacks for events that only an isolated run shows."""

    crashed: Callable[[str], None]
    """Called with how the process ended."""
    over: Callable[[str], None]
    """Called if the run used more memory than one in the worker's own process may."""


class IsolatedInstance:
    """Runs jobs in a process of their own.

    ``load`` starts it; it is not used while all instances run in processes already. ``limit_mb`` is the
    memory that a run in the worker's own process may use; 0 is unlimited.
    """

    def __init__(
        self,
        copies: InstancePool,
        load: Callable[[], Awaitable[InstanceSet]],
        listeners: CrashListeners,
        seats: Seats,
        limit_mb: int = 0,
    ) -> None:
        self.instances = copies
        self._load = load
        self._listeners = listeners
        self._seats = seats
        self._limit_mb = limit_mb
        self._isolated_set: InstanceSet | None = None
        self._run_lock = asyncio.Lock()
        self._closing: asyncio.TimerHandle | None = None

    async def run(self, wanted: batching.Run, active_run: ActiveRun) -> RunResult:
        """Run in the isolated process, one run at a time; use the other instances if it cannot be started."""
        async with self._run_lock:
            # check the current instances: those that will move into processes have not moved yet
            now = self.instances.runtimes
            moved = bool(now) and all(isinstance(runtime, ProcessRuntime) for runtime in now)
            made = None if moved else await self._ensure_started()
            if made is None:
                return await self.instances.run(wanted, active_run)
            before = self._memory(made)
            try:
                ran = await made.run(wanted, active_run)
            finally:
                self._closing = asyncio.get_running_loop().call_later(IDLE_S, self.close)
            self._report(made, before)
            return ran

    def close(self) -> None:
        """Stop the process; an active run in it fails."""
        if self._closing is not None:
            self._closing.cancel()
        made, self._isolated_set, self._closing = self._isolated_set, None, None
        if made is not None:
            self._seats.left += 1
            made.close()

    async def _ensure_started(self) -> InstanceSet | None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._isolated_set is None and self._seats.left:
            self._seats.left -= 1
            try:
                self._isolated_set = await self._load()
            except ModelRejected as error:
                log.warning(
                    "could not start a process for a redelivered job: %s", error, extra={"action": "apart_failed"}
                )
            finally:
                self._seats.left += self._isolated_set is None
        return self._isolated_set

    def _memory(self, made: InstanceSet) -> int:
        return sum(memory_of(runtime.pid) for runtime in made.runtimes if isinstance(runtime, ProcessRuntime))

    def _report(self, made: InstanceSet, before: int) -> None:
        """Report a run that ended its process, or used more memory than one in the worker's own process may."""
        for runtime in made.runtimes:
            if not isinstance(runtime, ProcessRuntime):
                continue
            if runtime.crash:
                self._listeners.crashed(runtime.crash)
                self.close()
            elif self._limit_mb and peak_of(runtime.pid) - before > self._limit_mb << 20:
                self._listeners.over(f"took more than {self._limit_mb} MiB of memory")
