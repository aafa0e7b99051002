"""Starts and stops services: signals, connection, readiness, endpoint file."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeVar

from tether.errors import BrokerUnavailable, TetherError
from tether.process.data_dir import Home, write_secret

log = logging.getLogger(__name__)


_waits: dict[str, str] = {}


def wait_for(what: str, why: str) -> None:
    """Set why this process's service waits to start, for its health; an empty ``why`` clears it."""
    if why:
        _waits[what] = why
    else:
        _waits.pop(what, None)


def waits() -> dict[str, str]:
    """Return the health checks of a service that has not started yet."""
    return dict(_waits) or {"start": "not connected yet"}


def write_endpoint(home: Home, name: str, port: int) -> None:
    """Write the endpoint file ``run/<name>.json``: ``name`` listens on ``port`` in this process.

    Errors are logged only: on a full disk the supervisor that restarts a service has given it its port.
    """
    try:
        write_secret(home.run / f"{name}.json", json.dumps({"pid": os.getpid(), "port": port}).encode())
    except OSError as error:
        log.warning("could not write the endpoint of %s: %s", name, error, extra={"action": "endpoint_unwritten"})


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


class Termination(asyncio.Event):
    """Event for a service that cannot go on. ``reason`` is None if the broker closed the connection."""

    reason: TetherError | None = None

    def end(self, reason: TetherError) -> None:
        """Set the event and its reason, unless it is set already."""
        if not self.is_set():
            self.reason = reason
            self.set()


class Tasks:
    """Owns background tasks: logs their errors, and waits for all of them when the block ends."""

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

    def named(self, prefix: str) -> list[asyncio.Task[Any]]:
        """Return the running tasks whose name begins with ``prefix``."""
        return [task for task in self._tasks if task.get_name().startswith(prefix)]

    async def finish(self, within_s: float) -> bool:
        """Wait for the tasks to finish; return False if some did not in time."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=within_s)
        return not self._tasks

    async def cancel(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def tasks() -> AsyncIterator[Tasks]:
    """Yield a :class:`Tasks` that is cancelled and awaited at the end of the block."""
    owner = Tasks()
    try:
        yield owner
    finally:
        await owner.cancel()


async def first_of(*events: asyncio.Event) -> None:
    """Wait until one of ``events`` is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def freeze_gc() -> None:
    """Exempt objects created at startup from garbage collection, for shorter pauses in requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


class Service(Protocol):
    """Interface of a running service for :func:`serve`."""

    @property
    def closed(self) -> Termination: ...


S = TypeVar("S", bound=Service)


async def serve(stop: asyncio.Event, service: AbstractAsyncContextManager[S], on_ready: Callable[[S], None]) -> None:
    """Run ``service`` until ``stop`` is set, also during its start; call ``on_ready`` when it has started.

    Raises:
        BrokerUnavailable: the connection was closed permanently; the supervisor restarts the process.
        KeyRevoked, KeyExpired, UnknownKey: this identity is no longer valid.
    """
    started = asyncio.Event()

    async def live() -> None:
        async with service as running:
            started.set()
            on_ready(running)
            freeze_gc()
            await first_of(stop, running.closed)
            if running.closed.is_set():
                raise running.closed.reason or BrokerUnavailable("the broker closed the connection permanently")

    task = asyncio.ensure_future(live())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not started.is_set() and not task.done():
        task.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    try:
        await task
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
