"""How every service starts and stops: signals, connection, readiness, and the file that says where it listens."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from tether.home import Home, write_secret

log = logging.getLogger(__name__)


def write_endpoint(home: Home, name: str, port: int) -> None:
    """Say in ``run/<name>.json`` that this process is ``name`` and listens on ``port``."""
    write_secret(home.run / f"{name}.json", json.dumps({"pid": os.getpid(), "port": port}).encode())


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


class Tasks:
    """Owns background tasks: their errors are logged, and all of them have ended when the block ends."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=error, extra={"action": "task_failed"})

    def __len__(self) -> int:
        return len(self._tasks)

    async def finish(self, within_s: float) -> bool:
        """Wait for the tasks to end by themselves; False when some did not in time."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=within_s)
        return not self._tasks

    async def cancel(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def tasks() -> AsyncIterator[Tasks]:
    """A :class:`Tasks` that is cancelled and awaited at the end of the block."""
    owner = Tasks()
    try:
        yield owner
    finally:
        await owner.cancel()


async def first_of(*events: asyncio.Event) -> None:
    """Return as soon as one of ``events`` is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
