"""One tenant's waiting jobs leave room for another one's, by bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
from support.brokers.brokers import StartBroker
from support.brokers.operators import reconfigure
from support.models import models
from support.platform.services import Services, new_job, services

from tether.domain.api_key import SCOPES, new_key_text, stored_key
from tether.domain.tenant import Tenant
from tether.errors import QueueFull, QuotaExceeded
from tether.gateway_http import gateway
from tether.gateway_http.models.catalog import ResolvedVersion

ROOM = 1_000_000
WIDTH = 1024
"""Numbers in a row: 4 KiB a job."""


@pytest.fixture
async def short(start_broker: StartBroker) -> AsyncIterator[Services]:
    async with start_broker(max_file_mb=256) as broker, services(broker, workers=1) as running:
        yield running


@pytest.fixture
async def served(short: Services, monkeypatch: pytest.MonkeyPatch) -> ResolvedVersion:
    """A model that no worker takes jobs of, in a lane stream of :data:`ROOM` bytes."""
    monkeypatch.setattr("tether.streams.usage._LOOK_S", 0.0)
    monkeypatch.setattr("tether.streams.usage._AGAIN_S", 0.0)
    monkeypatch.setattr("tether.gateway_http.jobs.queue_shares.FRESH_S", 0.0)
    found = await short.push("wide", models.add(width=WIDTH))
    await short.workers[0].holder.stop(1)
    await reconfigure(short.home, short.settings, short.bus.names.jobs_stream(0), max_bytes=ROOM)
    return found


async def used(running: Services) -> float:
    assert running.dispatcher is not None
    found = await running.dispatcher._bus.api(f"STREAM.INFO.{running.bus.names.jobs_stream(0)}")
    return int(found["state"]["bytes"]) / ROOM


async def submit(running: Services, served: ResolvedVersion, tenant: str, count: int = 4) -> list[str]:
    one = np.full((1, WIDTH), 1.0, np.float32)
    jobs = await running.gateway.jobs.submit(tenant, [new_job(served, one, deadline_s=600) for _ in range(count)])
    return [job["id"] for job in jobs]


async def fill(running: Services, served: ResolvedVersion, tenant: str) -> None:
    for _ in range(200):
        await submit(running, served, tenant)


async def test_a_tenant_that_fills_a_queue_leaves_room_for_those_who_come_later(
    short: Services, served: ResolvedVersion
) -> None:
    """Without a quota, and without a record of its own."""
    await short.gateway.tenants.store(Tenant("modest"))
    with pytest.raises(QuotaExceeded, match=r"tenant 'greedy' has \d+ bytes .* raise max_file_mb"):
        await fill(short, served, "greedy")
    assert 0.7 < await used(short) < 0.85
    for _ in range(4):
        await submit(short, served, "modest")
    with pytest.raises(QuotaExceeded, match="greedy"):
        await submit(short, served, "greedy")
    await submit(short, served, "third")


async def test_many_small_jobs_of_a_tenant_leave_room_for_records_of_others(
    short: Services, served: ResolvedVersion
) -> None:
    """Records fill before the queue does."""
    await short.gateway.tenants.store(Tenant("modest"))
    await reconfigure(short.home, short.settings, short.bus.names.jobs_stream(0), max_bytes=50 * ROOM)
    await reconfigure(short.home, short.settings, short.bus.names.bucket_stream("jobs"), max_bytes=ROOM // 5)
    with pytest.raises(QuotaExceeded, match=r"tenant 'greedy' has \d+ bytes of records .* raise max_file_mb"):
        await fill(short, served, "greedy")
    for _ in range(4):
        await submit(short, served, "modest")
    with pytest.raises(QuotaExceeded, match="greedy"):
        await submit(short, served, "greedy")


async def test_what_has_ended_counts_no_more(short: Services, served: ResolvedVersion) -> None:
    await short.gateway.tenants.store(Tenant("modest"))
    ids = [job for _ in range(30) for job in await submit(short, served, "greedy")]
    with pytest.raises(QuotaExceeded):
        await fill(short, served, "greedy")
    await short.start_worker("worker-2")
    await short.gateway.jobs.get_many("greedy", ids, 60)
    await submit(short, served, "greedy")


async def test_a_gateway_that_starts_counts_what_waits(short: Services, served: ResolvedVersion) -> None:
    await short.gateway.tenants.store(Tenant("modest"))
    with pytest.raises(QuotaExceeded):
        await fill(short, served, "greedy")
    other = await short.stack.enter_async_context(gateway.running(short.settings, short.home))
    one = np.full((1, WIDTH), 1.0, np.float32)
    with pytest.raises(QuotaExceeded):
        await other.jobs.submit("greedy", [new_job(served, one, deadline_s=600)] * 4)
    assert await other.jobs.submit("modest", [new_job(served, one, deadline_s=600)])


async def test_a_tenant_with_more_weight_has_a_larger_share(short: Services, served: ResolvedVersion) -> None:
    await short.gateway.tenants.store(Tenant("modest"))
    await short.gateway.tenants.store(Tenant("greedy", weight=3.0))
    with pytest.raises(QuotaExceeded):
        await fill(short, served, "greedy")
    assert 0.88 < await used(short) < 0.96


async def test_a_queue_is_all_of_the_only_tenants(short: Services, served: ResolvedVersion) -> None:
    keys = short.gateway.keys
    await keys.store(stored_key(new_key_text(), tenant="default", scopes=SCOPES, name="admin", created_at=1.0))
    assert not keys.others("greedy")
    with pytest.raises(QueueFull, match="the queue of durable jobs is full"):
        await fill(short, served, "greedy")
    assert await used(short) > 0.95
    key = stored_key(new_key_text(), tenant="modest", scopes=("jobs",), name="m", created_at=1.0)
    await keys.store(key)
    assert keys.others("greedy")
    await keys.revoke(key)
    assert not keys.others("greedy")
