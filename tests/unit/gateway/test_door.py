"""Turns by tenant on the way into a gateway."""

from __future__ import annotations

import asyncio

import pytest

from tether.gateway_http.http.request_turns import IN_A_PASS, SHARED_PASS, RequestTurns

FLOOD = 40 * IN_A_PASS


async def test_a_flood_waits_behind_itself() -> None:
    door, order = RequestTurns(lambda _: 1.0), list[str]()

    async def request(tenant: str) -> None:
        await door.enter(tenant)
        order.append(tenant)

    flood = [asyncio.create_task(request("flood")) for _ in range(FLOOD)]
    await asyncio.sleep(0)
    calm = [asyncio.create_task(request("calm")) for _ in range(3)]
    await asyncio.gather(*flood, *calm)
    assert len(order) == FLOOD + 3
    last = max(place for place, tenant in enumerate(order) if tenant == "calm")
    assert last < 4 * IN_A_PASS


async def test_tenants_have_turns_by_their_weights() -> None:
    door, order = RequestTurns(lambda tenant: 3.0 if tenant == "heavy" else 1.0), list[str]()

    async def request(tenant: str) -> None:
        await door.enter(tenant)
        order.append(tenant)

    tasks = [asyncio.create_task(request(tenant)) for _ in range(FLOOD) for tenant in ("heavy", "light")]
    await asyncio.gather(*tasks)
    first = order[IN_A_PASS : IN_A_PASS + FLOOD]
    assert 0.7 < first.count("heavy") / len(first) < 0.8


async def test_who_comes_alone_waits_for_nothing_and_leaves_nothing() -> None:
    door = RequestTurns(lambda _: 1.0)
    coroutine = door.enter("a")
    with pytest.raises(StopIteration):
        coroutine.send(None)
    for _ in range(3):
        await asyncio.sleep(0)
    assert door._starting._started == 0


async def test_who_leaves_while_waiting_takes_no_turn() -> None:
    door = RequestTurns(lambda _: 1.0)
    tasks = [asyncio.create_task(door.enter("a")) for _ in range(3 * IN_A_PASS)]
    await asyncio.sleep(0)
    for task in tasks[IN_A_PASS:-1]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks].count(False) == IN_A_PASS + 1
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert door._starting._started == 0


async def test_answers_to_a_flood_wait_behind_each_other_once_somebody_else_is_there() -> None:
    door, order = RequestTurns(lambda _: 1.0), list[str]()

    async def answered(tenant: str) -> None:
        await door.answered(tenant)
        order.append(tenant)

    await door.enter("flood")
    alone = [asyncio.create_task(answered("flood")) for _ in range(FLOOD)]
    await asyncio.sleep(0)
    assert len(order) == FLOOD  # in one pass
    await door.enter("calm")
    order.clear()
    flood = [asyncio.create_task(answered("flood")) for _ in range(FLOOD)]
    await asyncio.sleep(0)
    assert len(order) == SHARED_PASS
    calm = asyncio.create_task(answered("calm"))
    await asyncio.gather(*alone, *flood, calm)
    assert len(order) == FLOOD + 1
    assert order.index("calm") < 4 * SHARED_PASS
