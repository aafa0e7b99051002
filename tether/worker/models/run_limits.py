"""Ends runs in the worker's own process: one that takes too long, takes too much memory, or that no caller waits for.

ONNX Runtime looks between two nodes of a graph, those inside of a ``Loop`` included, whether a run should end. A single kernel
cannot be ended. It is waited for no longer than ``GRACE_S``; its copy of the model is free again when it has ended.
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
"""How long a run that was told to end is waited for."""
LOOK_S = 0.05
"""Between two looks at what runs and at the memory of this process."""
_FRESH_S = 0.25
"""How old the last look may be when a run begins."""
_PAGE = resource.getpagesize()


class Cause(StrEnum):
    """Why a run was ended."""

    TIME = "time"
    MEMORY = "memory"
    UNWANTED = "unwanted"
    """All of its jobs are past their deadline, withdrawn or cancelled."""
    UNLOAD = "unload"


def _nothing() -> None:
    """Nobody looks."""


class ActiveRun:
    """One run. It can be ended while it goes on in the worker's own process; elsewhere that is without effect. It ends itself
    after ``run_timeout_s``, and when nobody wants it any more: ``left_s`` from now on."""

    __slots__ = ("_give_up", "_runtime", "_timer", "_until", "alone", "base", "began", "cause", "look", "run_timeout_s")

    def __init__(self, run_timeout_s: float = math.inf, left_s: float = math.inf) -> None:
        self.run_timeout_s = run_timeout_s
        self._until = time.monotonic() + left_s
        self._timer: asyncio.TimerHandle | None = None
        self.cause: Cause | None = None
        self.alone = False
        """No other run went on when it had taken too much memory."""
        self.base = 0
        """Bytes of this process when it began."""
        self.began = 0.0
        self._runtime: Endable | None = None
        self._give_up: Callable[[], None] | None = None
        self.look: Callable[[], None] = _nothing
        """Called now and then while it goes on."""

    def begin(self, runtime: Endable, give_up: Callable[[], None], look: Callable[[], None]) -> None:
        """It runs from here on; ``give_up`` is called when it does not end ``GRACE_S`` after it should."""
        self._runtime, self._give_up, self.look = runtime, give_up, look
        if self.cause is not None:
            self._end()
            return
        left_s = max(0.0, self._until - time.monotonic())
        cause = Cause.TIME if self.run_timeout_s <= left_s else Cause.UNWANTED
        limit_s = min(self.run_timeout_s, left_s)
        if limit_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(limit_s, self.end, cause)

    def ended(self) -> None:
        """Its thread is free."""
        self._runtime = self._give_up = None
        self.look = _nothing
        if self._timer is not None:
            self._timer.cancel()

    def again(self) -> None:
        """It is made once more."""
        self.cause, self.alone = None, False

    def end(self, cause: Cause) -> None:
        """End it; the first cause counts."""
        if self.cause is None:
            self.cause = cause
            self._end()

    def _end(self) -> None:
        if self._runtime is not None and self._give_up is not None:
            self._runtime.end_run()
            asyncio.get_running_loop().call_later(GRACE_S, self._give_up)


class RunWatch:
    """The runs that go on in this process. While there are some, each is looked at, and the memory of the process: when that grows by more than
    ``limit_mb`` since a run began, the run is ended. 0: it may grow without limit."""

    def __init__(self, limit_mb: int) -> None:
        self._limit = limit_mb << 20
        self._going: set[ActiveRun] = set()
        self._memory = 0
        self._looked_at = float("-inf")
        self._next: asyncio.TimerHandle | None = None

    @property
    def limit_mb(self) -> int:
        return self._limit >> 20

    @property
    def busy(self) -> int:
        """Threads that a run still has, also one that is not waited for any more."""
        return len(self._going)

    def begin(self, going: ActiveRun) -> None:
        now = time.monotonic()
        if self._limit and now - self._looked_at > _FRESH_S:
            self._look()
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(LOOK_S, self._compare)
        going.base, going.began = self._memory, now
        self._going.add(going)

    def end(self, model: str, going: ActiveRun) -> None:
        """Its thread is free."""
        self._going.discard(going)
        if going.cause is not None:
            metrics.RUNS_ENDED.labels(model, going.cause.value).inc()

    def _look(self) -> None:
        self._memory, self._looked_at = memory_of(os.getpid()), time.monotonic()

    def _compare(self) -> None:
        self._next = None
        if not self._going:
            return
        for going in self._going:
            going.look()
        self._next = asyncio.get_running_loop().call_later(LOOK_S, self._compare)
        if self._limit:
            self._end_large()

    def _end_large(self) -> None:
        self._look()
        long = [going for going in self._going if self._looked_at - going.began >= LOOK_S / 2]
        over = [going for going in long if self._memory - going.base > self._limit]
        for going in over:
            going.alone = len(long) == 1
            going.end(Cause.MEMORY)


def memory_of(pid: int) -> int:
    """Bytes of memory that a process has now; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def peak_of(pid: int) -> int:
    """The most bytes of memory that a process ever had; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
