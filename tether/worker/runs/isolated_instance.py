"""A copy of a version in a process of its own, for jobs that may have ended the worker that had them before.

Such a job runs here instead of in the worker's own process: if it ends a process again, it is this one, and everybody knows of
which version. The same goes for a run that was ended because the worker's process took too much memory.
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
"""How long the copy stays after its last run: jobs of a bundle come one after the other."""
SEATS = 2
"""Such copies in one worker at a time. When a worker with many versions is killed, each of them has jobs that come again."""


class Seats:
    """How many more such copies a worker may have."""

    def __init__(self) -> None:
        self.left = SEATS


class CrashListeners(NamedTuple):
    """Who hears what only such a run shows."""

    crashed: Callable[[str], None]
    """How it ended its process."""
    over: Callable[[str], None]
    """That it took more than it may in the worker's own process."""


class IsolatedInstance:
    """``load`` makes the copy, which is not needed while all others are in processes anyway. ``limit_mb``: what a run in the
    worker's own process may take; 0: as much as there is."""

    def __init__(
        self,
        copies: InstancePool,
        load: Callable[[], Awaitable[InstanceSet]],
        hearing: CrashListeners,
        seats: Seats,
        limit_mb: int = 0,
    ) -> None:
        self.copies = copies
        self._load = load
        self._hearing = hearing
        self._seats = seats
        self._limit_mb = limit_mb
        self._made: InstanceSet | None = None
        self._one = asyncio.Lock()
        self._closing: asyncio.TimerHandle | None = None

    async def run(self, wanted: batching.Run, going: ActiveRun) -> RunResult:
        """One run at a time. Where the copy cannot be made, or there is no seat, it runs on the others."""
        async with self._one:
            # by what runs now, not by what is wanted: copies that are about to move into processes are not there yet
            now = self.copies.runtimes
            moved = bool(now) and all(isinstance(runtime, ProcessRuntime) for runtime in now)
            made = None if moved else await self._ensured()
            if made is None:
                return await self.copies.run(wanted, going)
            before = self._memory(made)
            try:
                ran = await made.run(wanted, going)
            finally:
                self._closing = asyncio.get_running_loop().call_later(IDLE_S, self.close)
            self._look(made, before)
            return ran

    def close(self) -> None:
        """End the process; a run that goes on in it fails."""
        if self._closing is not None:
            self._closing.cancel()
        made, self._made, self._closing = self._made, None, None
        if made is not None:
            self._seats.left += 1
            made.close()

    async def _ensured(self) -> InstanceSet | None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._made is None and self._seats.left:
            self._seats.left -= 1
            try:
                self._made = await self._load()
            except ModelRejected as error:
                log.warning("no process for a job that came again: %s", error, extra={"action": "apart_failed"})
            finally:
                self._seats.left += self._made is None
        return self._made

    def _memory(self, made: InstanceSet) -> int:
        return sum(memory_of(runtime.pid) for runtime in made.runtimes if isinstance(runtime, ProcessRuntime))

    def _look(self, made: InstanceSet, before: int) -> None:
        """What the run shows of the version: it ended its process, or took more memory than one in the worker's own may."""
        for runtime in made.runtimes:
            if not isinstance(runtime, ProcessRuntime):
                continue
            if runtime.crash:
                self._hearing.crashed(runtime.crash)
                self.close()
            elif self._limit_mb and peak_of(runtime.pid) - before > self._limit_mb << 20:
                self._hearing.over(f"took more than {self._limit_mb} MiB of memory")
