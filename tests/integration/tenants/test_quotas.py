"""Quotas of a tenant hold over all gateways."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.domain.manifest import PushAnswer, PushRequest
from tether.domain.tenant import Quotas, Tenant
from tether.errors import QuotaExceeded
from tether.gateway_http import gateway as core
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.wire import codec


async def halted(running: Services, **quotas: int) -> tuple[ResolvedVersion, Gateway]:
    """A model whose only worker takes nothing, the quotas of the tests' tenant, and a second gateway that knows them."""
    served = await running.push("bump", models.add())
    await running.workers[0].holder.stop(1)
    other = await running.stack.enter_async_context(core.running(running.settings, running.home))
    await set_quotas(running, other, **quotas)
    return served, other


async def set_quotas(running: Services, other: Gateway, **quotas: int) -> None:
    tenant = Tenant(TENANT, quotas=Quotas(**quotas))
    await running.gateway.tenants.store(tenant)
    await wait_until(lambda: other.tenants.find(TENANT) == tenant, "the other gateway knows the quotas")


async def submit(gateway: Gateway, served: ResolvedVersion, count: int = 1) -> list[dict[str, Any]]:
    return await gateway.jobs.submit(TENANT, [new_job(served, row(1)) for _ in range(count)])


async def accepts(gateway: Gateway, served: ResolvedVersion) -> bool:
    try:
        await submit(gateway, served)
    except QuotaExceeded:
        return False
    return True


async def test_two_gateways_accept_as_many_jobs_as_the_quota_allows_and_no_more(one: Services) -> None:
    served, other = await halted(one, queued_jobs=20)
    ids = []
    for number in range(20):
        ids += [job["id"] for job in await submit((one.gateway, other)[number % 2], served)]
    for gateway in (one.gateway, other):
        with pytest.raises(QuotaExceeded, match=r"acme.* 20 .*queued_jobs is 20"):
            await submit(gateway, served)
        assert await gateway.jobs.room.open.count(TENANT) == 20
    for job in ids[:3]:
        await one.gateway.jobs.cancel(TENANT, job)
    for _ in range(3):
        await wait_until(lambda: accepts(other, served), "there is room for one more")
    with pytest.raises(QuotaExceeded):
        await submit(one.gateway, served)


async def test_a_flood_through_two_gateways_at_once_passes_the_quota_by_one_at_most(one: Services) -> None:
    served, other = await halted(one, queued_jobs=40)
    asked = [submit(gateway, served) for _ in range(60) for gateway in (one.gateway, other)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert {type(answer) for answer in refused} == {QuotaExceeded}
    assert 40 <= len(answers) - len(refused) <= 41


async def test_a_batch_is_accepted_whole_or_not_at_all(one: Services) -> None:
    served, other = await halted(one, queued_jobs=10)
    await submit(one.gateway, served, 7)
    with pytest.raises(QuotaExceeded, match="has 7 "):
        await submit(other, served, 4)
    assert await other.jobs.room.open.count(TENANT) == 7
    await wait_until(lambda: accepts(other, served), "what was refused took no room")


async def test_jobs_that_end_make_room_and_a_restarted_gateway_counts_those_of_before(one: Services) -> None:
    served = await one.push("bump", models.add())
    await one.gateway.tenants.store(Tenant(TENANT, quotas=Quotas(queued_jobs=4)))
    for _ in range(12):
        await wait_until(lambda: accepts(one.gateway, served), "earlier jobs have ended")
    await wait_until(lambda: drained(one.gateway), "all jobs have ended")
    await one.workers[0].holder.stop(1)
    await submit(one.gateway, served, 4)
    async with core.running(one.settings, one.home) as restarted:
        with pytest.raises(QuotaExceeded, match="has 4 "):
            await submit(restarted, served)


async def drained(gateway: Gateway) -> bool:
    return await gateway.jobs.room.open.count(TENANT) == 0


async def test_jobs_whose_caller_left_count_when_they_were_stored_all_the_same(one: Services) -> None:
    served, _ = await halted(one, queued_jobs=6)
    asked = [asyncio.create_task(submit(one.gateway, served)) for _ in range(4)]
    await wait_until(lambda: one.gateway.jobs.room.open.known(TENANT) > 0, "one is on its way")
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await submit(one.gateway, served)

    async def told() -> bool:
        listed, _ = await one.gateway.jobs.list(TENANT, state="queued", model="", limit=10, cursor="")
        return await one.gateway.jobs.room.open.count(TENANT) == len(listed) > 0

    await wait_until(told, "what is stored is what is counted")


async def test_the_same_job_sent_again_needs_no_room(one: Services) -> None:
    served, other = await halted(one, queued_jobs=1)
    request = new_job(served, row(1), key="once")
    (first,) = await one.gateway.jobs.submit(TENANT, [request])
    (again,) = await other.jobs.submit(TENANT, [request])
    assert again["id"] == first["id"]


async def test_without_a_quota_nothing_is_counted(one: Services) -> None:
    served, other = await halted(one, queued_jobs=1)
    await submit(one.gateway, served)
    await set_quotas(one, other)
    await submit(one.gateway, served, 5)
    assert not one.gateway.jobs.room.open._counts
    assert await one.gateway.jobs.room.open.count(TENANT) == 6
    assert not one.gateway.jobs.room.open._counts


# stored bytes


async def register(running: Services, request: PushRequest) -> PushAnswer:
    body = await ask_owner(
        running.bus,
        "registerModel",
        0,
        MessageType.PUSH,
        codec.encode(request),
        answers=MessageType.PUSHED,
        timeout=60,
    )
    return codec.decode(body, PushAnswer)


async def test_the_model_store_has_the_last_word_on_a_tenants_bytes(one: Services) -> None:
    """Gateways that let two pushes through at the same time cannot make it too much."""
    served = await one.push("bump", models.add())
    size = served.manifest.size
    await one.gateway.tenants.store(Tenant(TENANT, quotas=Quotas(stored_bytes=2 * size)))
    requests = [PushRequest(f"{TENANT}/own-{number}", served.manifest.files, tenant=TENANT) for number in range(4)]
    answers = await asyncio.gather(*[register(one, request) for request in requests], return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, PushAnswer)]
    refused = [answer for answer in answers if isinstance(answer, QuotaExceeded)]
    assert (len(made), len(refused)) == (2, 2)
    assert all("stored_bytes" in str(error) for error in refused)
    assert {answer.manifest.tenant for answer in made} == {TENANT}
    await wait_until(lambda: one.gateway.catalog.stored.of(TENANT) == 2 * size, "the gateway knows both")
    again = await register(one, PushRequest(made[0].manifest.name, served.manifest.files, tenant=TENANT))
    assert not again.created
