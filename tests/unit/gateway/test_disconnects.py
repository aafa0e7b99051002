"""Waits that end when their client leaves: who is watched, and what a wait that ended first costs."""

from __future__ import annotations

import asyncio

import pytest

from tether.errors import ClientDisconnected
from tether.gateway_http.http.disconnects import Disconnects, client_gone


class Client:
    """A client whose leaving the test decides; ``watches`` is how often somebody began to look at it."""

    def __init__(self) -> None:
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.watches: list[asyncio.Future[None]] = []

    def __call__(self) -> asyncio.Future[None]:
        watch = asyncio.get_running_loop().create_future()
        self.gone.add_done_callback(lambda _: None if watch.done() else watch.set_result(None))
        self.watches.append(watch)
        return watch


async def asked(disconnects: Disconnects, client: Client | None, answer: asyncio.Future[int]) -> int:
    client_gone.set(client)
    return await disconnects.wait(answer)


async def watched(client: Client) -> None:
    async with asyncio.timeout(5):
        while not client.watches:
            await asyncio.sleep(0.01)


async def test_a_client_that_leaves_ends_its_wait() -> None:
    disconnects, client = Disconnects(), Client()
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(asked(disconnects, client, answer))
    await watched(client)
    client.gone.set_result(None)
    with pytest.raises(ClientDisconnected):
        await task
    assert answer.cancelled()
    assert not disconnects._watches
    assert not disconnects._left


async def test_an_answer_ends_the_watch_and_who_leaves_then_is_nobody() -> None:
    disconnects, client = Disconnects(), Client()
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(asked(disconnects, client, answer))
    await watched(client)
    answer.set_result(7)
    assert await task == 7
    assert client.watches[0].cancelled()
    client.gone.set_result(None)
    assert not disconnects._watches


async def test_an_answer_and_a_departure_at_the_same_time_leave_nothing_behind() -> None:
    disconnects, client = Disconnects(), Client()
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(asked(disconnects, client, answer))
    await watched(client)
    client.gone.set_result(None)
    answer.set_result(7)
    (end,) = await asyncio.gather(task, return_exceptions=True)
    assert end == 7 or isinstance(end, ClientDisconnected)
    assert not disconnects._watches
    assert not disconnects._left
    assert not task.cancelled()


async def test_a_wait_that_somebody_else_cancels_is_cancelled() -> None:
    disconnects, client = Disconnects(), Client()
    task = asyncio.create_task(asked(disconnects, client, asyncio.get_running_loop().create_future()))
    await watched(client)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not disconnects._watches


async def test_a_quick_answer_watches_nobody() -> None:
    disconnects, client = Disconnects(), Client()
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    tasks = [asyncio.create_task(asked(disconnects, one, answer)) for one in (client, None)]
    await asyncio.sleep(0)
    answer.set_result(7)
    assert await asyncio.gather(*tasks) == [7, 7]
    async with asyncio.timeout(5):
        while disconnects._ticking:
            await asyncio.sleep(0.01)
    assert not client.watches
    assert not disconnects._unwatched
