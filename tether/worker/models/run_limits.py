"""Ends runs in the worker's own process that exceed their time or memory, or whose callers left.

ONNX Runtime checks between two nodes of a graph, also inside a ``Loop``, whether to stop. A single kernel
cannot be stopped: the worker waits up to ``GRACE_S`` for it, and its instance is free when the kernel
returns.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from tether.frameworks.runtime import Endable
from tether.process import metrics

GRACE_S = 2.0
"""Seconds to wait for a run that was asked to end."""
CHECK_S = 0.05
"""Seconds between two checks of active runs and of this process's memory."""
_FRESH_S = 0.25
"""Maximum age in seconds of the memory measurement when a run begins."""
_PAGE = resource.getpagesize()


class Cause(StrEnum):
    """Reason why a run was ended."""

    TIME = "time"
    MEMORY = "memory"
    UNWANTED = "unwanted"
    """All of its jobs are past their deadline, withdrawn or cancelled."""
    UNLOAD = "unload"


def _nothing() -> None:
    """Do nothing: the run is not watched."""


class ActiveRun:
    """One run that can be ended in the worker's own process; elsewhere ending has no effect.

    It ends itself after ``run_timeout_s``, and after ``left_s``, when no caller needs it any longer.
    """

    __slots__ = (
        "_give_up",
        "_runtime",
        "_timer",
        "_until",
        "alone",
        "base",
        "began",
        "cause",
        "on_check",
        "run_timeout_s",
    )

    def __init__(self, run_timeout_s: float = math.inf, left_s: float = math.inf) -> None:
        self.run_timeout_s = run_timeout_s
        self._until = time.monotonic() + left_s
        self._timer: asyncio.TimerHandle | None = None
        self.cause: Cause | None = None
        self.alone = False
        """Whether no other run was active when it exceeded its memory."""
        self.base = 0
        """Memory of this process in bytes when the run began."""
        self.began = 0.0
        self._runtime: Endable | None = None
        self._give_up: Callable[[], None] | None = None
        self.on_check: Callable[[], None] = _nothing
        """Called periodically while the run is active."""

    def begin(self, runtime: Endable, give_up: Callable[[], None], look: Callable[[], None]) -> None:
        """Start the run's timers; call ``give_up`` if it is still active ``GRACE_S`` after it was ended."""
        self._runtime, self._give_up, self.on_check = runtime, give_up, look
        if self.cause is not None:
            self._end()
            return
        left_s = max(0.0, self._until - time.monotonic())
        cause = Cause.TIME if self.run_timeout_s <= left_s else Cause.UNWANTED
        limit_s = min(self.run_timeout_s, left_s)
        if limit_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(limit_s, self.end, cause)

    def ended(self) -> None:
        """Mark the run as finished: its thread is free."""
        self._runtime = self._give_up = None
        self.on_check = _nothing
        if self._timer is not None:
            self._timer.cancel()

    def reset(self) -> None:
        """Reset the cause before the run is repeated."""
        self.cause, self.alone = None, False

    def end(self, cause: Cause) -> None:
        """End the run; the first cause counts."""
        if self.cause is None:
            self.cause = cause
            self._end()

    def _end(self) -> None:
        if self._runtime is not None and self._give_up is not None:
            self._runtime.end_run()
            asyncio.get_running_loop().call_later(GRACE_S, self._give_up)


class RunWatch:
    """Watches active runs and this process's memory.

    A run is ended if memory grows by more than ``limit_mb`` since it began; 0 is unlimited.
    """

    def __init__(self, limit_mb: int) -> None:
        self._limit = limit_mb << 20
        self._active: set[ActiveRun] = set()
        self._memory = 0
        self._measured_at = float("-inf")
        self._next: asyncio.TimerHandle | None = None

    @property
    def limit_mb(self) -> int:
        return self._limit >> 20

    @property
    def busy(self) -> int:
        """Return the number of threads in use by runs, including runs that were given up."""
        return len(self._active)

    def begin(self, active_run: ActiveRun) -> None:
        now = time.monotonic()
        if self._limit and now - self._measured_at > _FRESH_S:
            self._measure()
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(CHECK_S, self._check)
        active_run.base, active_run.began = self._memory, now
        self._active.add(active_run)

    def end(self, model: str, active_run: ActiveRun) -> None:
        """Stop watching a run: its thread is free."""
        self._active.discard(active_run)
        if active_run.cause is not None:
            metrics.RUNS_ENDED.labels(model, active_run.cause.value).inc()

    def _measure(self) -> None:
        self._memory, self._measured_at = memory_of(os.getpid()), time.monotonic()

    def _check(self) -> None:
        self._next = None
        if not self._active:
            return
        for active_run in self._active:
            active_run.on_check()
        self._next = asyncio.get_running_loop().call_later(CHECK_S, self._check)
        if self._limit:
            self._end_large()

    def _end_large(self) -> None:
        self._measure()
        long = [active_run for active_run in self._active if self._measured_at - active_run.began >= CHECK_S / 2]
        over = [active_run for active_run in long if self._memory - active_run.base > self._limit]
        for active_run in over:
            active_run.alone = len(long) == 1
            active_run.end(Cause.MEMORY)


def memory_of(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 if it does not exist."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def peak_of(pid: int) -> int:
    """Return the peak resident memory of a process in bytes; 0 if it does not exist."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
