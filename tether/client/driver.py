"""Drives flows over a transport, one step after another, and several flows concurrently on request."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from contextlib import closing
from typing import Any, TypeVar

from tether.client.protocol import Concurrently, Flow, NoResponse, Response, Sleep
from tether.client.transport import AsyncWire, Transport

T = TypeVar("T")


def drive(wire: Transport, flow: Flow[T]) -> T:
    """Run a flow to its result, blocking."""
    answer: Response | NoResponse | list[Any] | None = None
    with closing(flow) as steps:
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Sleep):
                    threading.Event().wait(step.seconds)
                    answer = None
                elif isinstance(step, Concurrently):
                    answer = _run_concurrently(wire, step)
                else:
                    answer = wire.send(step)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def _run_concurrently(wire: Transport, step: Concurrently) -> list[Any]:
    """Run flows in threads. After an error, started flows are awaited; after an interrupt they are not."""
    results: dict[int, Any] = {}
    running: dict[concurrent.futures.Future[Any], int] = {}
    pool = concurrent.futures.ThreadPoolExecutor(step.width, "tether-client")

    def settle(*, least: int) -> None:
        while len(running) > least:
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                number = running.pop(future)
                results[number] = future.result()
                step.done(results[number])

    try:
        for number, flow in enumerate(step.flows):
            running[pool.submit(drive, wire, flow)] = number
            settle(least=step.width - 1)
        settle(least=0)
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [results[number] for number in sorted(results)]


async def drive_async(wire: AsyncWire, flow: Flow[T]) -> T:
    """Run a flow to its result."""
    answer: Response | NoResponse | list[Any] | None = None
    with closing(flow) as steps:
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Sleep):
                    await asyncio.sleep(step.seconds)
                    answer = None
                elif isinstance(step, Concurrently):
                    answer = await _run_concurrently_async(wire, step)
                else:
                    answer = await wire.send(step)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


async def _run_concurrently_async(wire: AsyncWire, step: Concurrently) -> list[Any]:
    results: dict[int, Any] = {}
    running: dict[asyncio.Task[Any], int] = {}

    async def settle(*, least: int) -> None:
        while len(running) > least:
            for task in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                number = running.pop(task)
                results[number] = task.result()
                step.done(results[number])

    try:
        for number, flow in enumerate(step.flows):
            running[asyncio.create_task(drive_async(wire, flow), name="client-flow")] = number
            await settle(least=step.width - 1)
        await settle(least=0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [results[number] for number in sorted(results)]
