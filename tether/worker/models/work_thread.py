"""Threads for loads and runs in a worker's own process, with lower priority for long work."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from tether.process.os_process import LONG_S, lower_thread_priority, signal_stack

T = TypeVar("T")


class WorkThread:
    """One thread that does one unit of work at a time."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._started)
        self._number = self._ident = 0
        self._since = 0.0
        """CPU seconds of the thread when its current work began."""
        self.used_s = 0.0
        """CPU seconds that its last work took."""
        self.low_priority = False
        """Whether the thread has low priority; it keeps it until it ends."""

    def _started(self) -> None:
        signal_stack()
        self._ident, self._number = threading.get_ident(), threading.get_native_id()
        if self.low_priority:
            lower_thread_priority(self._number)

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do work in the thread; call it from the event loop."""
        return asyncio.get_running_loop().run_in_executor(self._pool, partial(self._run, work))

    def _run(self, work: Callable[[], T]) -> T:
        self._since = time.thread_time()
        try:
            return work()
        finally:
            self.used_s = time.thread_time() - self._since

    def check_priority(self) -> None:
        """Lower the thread's priority if its current work has used CPU for long."""
        if not self.low_priority and self._ident and sys.platform == "linux":
            now = time.clock_gettime(time.pthread_getcpuclockid(self._ident))
            if now - self._since >= LONG_S:
                self.lower_priority()

    def lower_priority(self) -> None:
        """Give other threads of this process priority from now on."""
        self.low_priority = True
        if self._number:
            lower_thread_priority(self._number)

    def end(self) -> None:
        """End the thread after its current work; drop queued work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
