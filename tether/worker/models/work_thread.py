"""Threads for what may take long in a worker's own process: loads and runs. They can go after its event loop and its short runs."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from tether.process.os_process import LONG_S, signal_stack, thread_goes_after_others

T = TypeVar("T")


class WorkThread:
    """One thread, which does one thing at a time."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._started)
        self._number = self._ident = 0
        self._since = 0.0
        """What the thread had taken of a processor when its work began, in seconds."""
        self.used_s = 0.0
        """What its last work took of a processor, in seconds."""
        self.behind = False
        """Whether it goes after others. It does so until it ends."""

    def _started(self) -> None:
        signal_stack()
        self._ident, self._number = threading.get_ident(), threading.get_native_id()
        if self.behind:
            thread_goes_after_others(self._number)

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do it in the thread; for the event loop."""
        return asyncio.get_running_loop().run_in_executor(self._pool, partial(self._run, work))

    def _run(self, work: Callable[[], T]) -> T:
        self._since = time.thread_time()
        try:
            return work()
        finally:
            self.used_s = time.thread_time() - self._since

    def look(self) -> None:
        """While its work goes on: has that taken long, the thread goes after others from here on."""
        if not self.behind and self._ident and sys.platform == "linux":
            now = time.clock_gettime(time.pthread_getcpuclockid(self._ident))
            if now - self._since >= LONG_S:
                self.go_after_others()

    def go_after_others(self) -> None:
        """Let other threads of this process have the processors first, from here on."""
        self.behind = True
        if self._number:
            thread_goes_after_others(self._number)

    def end(self) -> None:
        """It ends with the work that it does; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
