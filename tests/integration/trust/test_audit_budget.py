"""Nobody fills the audit log: acts of a tenant are counted beyond its part, and inference and jobs leave room for all else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.brokers.audits import WHO, check, entries, everything, writer
from support.brokers.brokers import Broker, wait_until
from support.platform.services import TENANT

from tether.audit import Kind, budget, repeated_attempts
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.process import metrics
from tether.streams.layout import ensure_platform


@pytest.fixture
async def dispatcher(broker: Broker) -> AsyncIterator[Bus]:
    async with connect(broker.settings, broker.home, "dispatcher") as bus:
        await ensure_platform(bus, broker.settings)
        yield bus


async def test_a_tenant_that_repeats_an_act_hides_no_act_of_others(broker: Broker, dispatcher: Bus) -> None:
    """What is more than its part is counted, and says whose it is."""
    more = 500
    async with writer(broker) as (_, log):
        for number in range(budget.ACTS + more):
            log.record(Kind.MODEL, "flood", actor=WHO, action="PUT alias", model="m", detail=str(number))
            if not number % 100:
                log.record(Kind.MODEL, TENANT, actor="key:calm", action="PUT alias", model="m", detail=str(number))
    flood = await entries(dispatcher, broker.home, kind=Kind.MODEL, tenant="flood")
    assert [item.entry.count for item in flood if item.entry.action == "PUT alias"] == [1] * budget.ACTS
    others = [item.entry for item in flood if item.entry.action == repeated_attempts.OTHERS]
    assert len(others) <= 2
    assert sum(entry.count for entry in others) == more
    assert {(entry.actor, entry.outcome) for entry in others} == {(WHO, "ok")}
    calm = await entries(dispatcher, broker.home, kind=Kind.MODEL, tenant=TENANT)
    assert [item.entry.detail for item in calm] == [str(number) for number in range(0, budget.ACTS + more, 100)]


@pytest.mark.parametrize("service", ["modelstore", "dispatcher"])
async def test_a_service_without_inference_asks_for_nothing_that_it_may_not_see(
    broker: Broker, dispatcher: Bus, service: str
) -> None:
    """Each refused question is an error in the log of the service and in the broker's."""
    denied = metrics.PERMISSION_DENIED._value.get()
    async with writer(broker, service) as (bus, log):
        async with asyncio.timeout(10):
            await log.budget.keep()
        await bus.flush()
    assert metrics.PERMISSION_DENIED._value.get() == denied


async def test_inference_and_jobs_leave_room_for_everything_else(broker: Broker, dispatcher: Bus) -> None:
    """When they have filled their part, they are counted by tenant and key."""
    async with writer(broker) as (_, log):
        log.inference(TENANT, WHO, "infer", "ok", "digits", 1, "0" * 32, "r", 256, 40, 900)
        await log.settled()
        await wait_until(lambda: stored(dispatcher), "it is in the stream")
        async with connect(broker.settings, broker.home, "admin") as admin:
            info = await admin.api(f"STREAM.INFO.{dispatcher.names.audit_stream}")
            most = int(info["state"]["bytes"] / budget.BULK_SHARE)
            await admin.api(f"STREAM.UPDATE.{dispatcher.names.audit_stream}", {**info["config"], "max_bytes": most})
            await log.budget.look()
            assert log.budget.bulk_full
            await admin.api(f"STREAM.UPDATE.{dispatcher.names.audit_stream}", info["config"])
        for _ in range(1000):
            log.inference(TENANT, WHO, "infer", "ok", "digits", 1, "0" * 32, "r", 256, 40, 900)
            log.record(Kind.JOB, TENANT, actor=WHO, action="submit", model="digits")
        log.record(Kind.KEY, TENANT, actor=WHO, action="create")
    for kind in (Kind.INFERENCE, Kind.JOB):
        *alone, others = [item.entry for item in await entries(dispatcher, broker.home, kind=kind, tenant=TENANT)]
        assert len(alone) == (kind is Kind.INFERENCE)
        assert (others.actor, others.action, others.count) == (WHO, repeated_attempts.OTHERS, 1000)
    assert len(await entries(dispatcher, broker.home, kind=Kind.KEY, tenant=TENANT)) == 1
    assert check(broker.home, await everything(dispatcher, broker.home)).problems == ()


async def stored(dispatcher: Bus) -> bool:
    return bool((await dispatcher.api(f"STREAM.INFO.{dispatcher.names.audit_stream}"))["state"]["messages"] > 1)
