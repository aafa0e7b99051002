"""Turns at the inspection of pushed models."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from tether.errors import Unavailable
from tether.modelstore.service import MOST_WAITING
from tether.process.tenant_turns import SLOW_FOR_S, SLOW_S, TenantTurns


class Desk:
    """Pushes that hold their seat until they are told to leave it."""

    def __init__(self) -> None:
        self.time = 0.0
        self.turns = TenantTurns(2, lambda: self.time, most_waiting=MOST_WAITING)
        self.inside: list[str] = []
        self.tasks: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}

    async def push(self, name: str) -> None:
        """``name`` is a tenant, and what else makes it the only one."""
        leave = asyncio.Event()

        async def look() -> None:
            async with self.turns.turn(name.partition("-")[0]):
                self.inside.append(name)
                await leave.wait()
                self.inside.remove(name)

        self.tasks[name] = asyncio.create_task(look()), leave
        await settled()

    async def leave(self, name: str) -> None:
        task, leave = self.tasks.pop(name)
        leave.set()
        await task
        await settled()

    async def close(self) -> None:
        for task, _ in self.tasks.values():
            task.cancel()
        await asyncio.gather(*[task for task, _ in self.tasks.values()], return_exceptions=True)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_tenant_has_one_seat_and_another_one_the_next() -> None:
    desk = Desk()
    for name in ("a-1", "a-2", "a-3", "b-1"):
        await desk.push(name)
    assert desk.inside == ["a-1", "b-1"]
    await desk.push("c-1")
    await desk.leave("a-1")
    assert desk.inside == ["b-1", "a-2"]  # it waited for longer than c
    await desk.leave("a-2")
    assert desk.inside == ["b-1", "c-1"]
    await desk.leave("b-1")
    assert desk.inside == ["c-1", "a-3"]
    await desk.close()


async def test_slow_tenants_leave_a_seat_to_the_others() -> None:
    desk = Desk()
    await desk.push("slow-1")
    await desk.push("late-1")
    desk.time += SLOW_S
    await desk.leave("slow-1")
    await desk.leave("late-1")
    await desk.push("slow-2")
    await desk.push("late-2")
    assert desk.inside == ["slow-2"]
    await desk.push("quick-1")
    assert desk.inside == ["slow-2", "quick-1"]
    await desk.leave("slow-2")
    assert desk.inside == ["quick-1", "late-2"]
    await desk.leave("quick-1")
    await desk.leave("late-2")
    desk.time += SLOW_FOR_S
    await desk.push("slow-3")
    await desk.push("late-3")
    assert desk.inside == ["slow-3", "late-3"]
    await desk.close()


async def test_one_that_is_slow_just_now_counts_as_slow() -> None:
    desk = Desk()
    await desk.push("slow-1")
    desk.time += SLOW_S
    await desk.leave("slow-1")
    await desk.push("new-1")
    desk.time += SLOW_S
    await desk.push("slow-2")
    assert desk.inside == ["new-1"]
    await desk.push("quick-1")
    assert desk.inside == ["new-1", "quick-1"]
    await desk.close()


async def test_a_push_that_is_given_up_takes_no_seat() -> None:
    desk = Desk()
    for name in ("a-1", "b-1", "c-1", "d-1"):
        await desk.push(name)
    waiting = desk.tasks.pop("c-1")[0]
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    running = desk.tasks.pop("a-1")[0]
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await settled()
    desk.inside.remove("a-1")
    assert desk.inside == ["b-1", "d-1"]
    await desk.close()
    assert not desk.turns._began
    assert not desk.turns._waiting


async def test_so_many_pushes_of_one_tenant_wait_and_no_more() -> None:
    desk = Desk()
    for number in range(1 + MOST_WAITING):
        await desk.push(f"a-{number}")
    with pytest.raises(Unavailable, match="push again later"):
        async with desk.turns.turn("a"):
            pass
    await desk.push("b-1")
    assert desk.inside == ["a-0", "b-1"]
    await desk.close()
