"""Isolated tenants and the broker: its memory is lost, and it has no room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.models import models
from support.platform.services import Services, first, new_job, row, services
from support.platform.tenancy import bound_home, isolate, own_worker

from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import ModelNotReady
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process.data_dir import Home

ACME, OTHER, OWN = "acme", "other", "own"


@pytest.fixture
def home() -> Iterator[Home]:
    with bound_home(own=ACME) as made:
        yield made


async def infer(running: Services, tenant: str, served: ResolvedVersion, value: float) -> float:
    inputs = (from_numpy("x", row(value)),)
    answer = await running.gateway.infer(served, tenant, inputs, (), request_id="test", timeout_s=20)
    return float(first(answer)[0, 0])


async def test_a_broker_that_forgot_its_memory_gets_the_lanes_again(embedded_broker: Broker) -> None:
    async with services(embedded_broker) as running:
        bump = await running.push("bump", models.add())
        await isolate(running, ACME, bump)
        (job,) = await running.gateway.jobs.submit(ACME, [new_job(bump, row(1))])
        assert embedded_broker.server is not None
        await embedded_broker.server.kill()
        await embedded_broker.server.start()
        await own_worker(running, OWN, bump, ACME)
        assert await infer(running, ACME, bump, 1) == 2.0
        assert (await running.gateway.jobs.get(ACME, job["id"], 20))["state"] == "succeeded"


async def test_a_tenant_for_whom_the_broker_has_no_room_keeps_nobody_else_waiting(start_broker: StartBroker) -> None:
    async with start_broker(max_memory_mb=64, max_isolated_tenants=1) as broker, services(broker) as running:
        bump = await running.push("bump", models.add())
        await isolate(running, ACME, bump)
        await isolate(running, OTHER)
        assert running.dispatcher is not None
        pools = running.dispatcher._pools
        await wait_until(lambda: OTHER in pools._refused, "the second was refused")
        await own_worker(running, OWN, bump, ACME)
        assert await infer(running, ACME, bump, 1) == 2.0
        assert await infer(running, "third", bump, 1) == 2.0
        with pytest.raises(ModelNotReady, match="tenant 'other', which is isolated"):
            await infer(running, OTHER, bump, 1)
        await running.gateway.tenants.store(Tenant(OTHER))
        assert await infer(running, OTHER, bump, 1) == 2.0
