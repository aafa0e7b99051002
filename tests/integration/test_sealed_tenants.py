"""Sealed tenants on a real broker: what they send and get is nobody's to read between gateway and worker."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import models
import msgspec
import numpy as np
import pytest
from brokers import Broker, wait_until
from services import Services, first, new_job, row, services
from taps import tapped

from tether.errors import IdempotencyConflict, InferenceFailed
from tether.gateway_http.catalog import Served
from tether.tenant import Tenant
from tether.tensor import from_numpy

SEALED, OPEN = "clinic", "acme"
IN, OUT = 1234.5, 1235.5
"""Numbers whose bytes are looked for; the models of :func:`models.add` add 1."""


def tensor(value: float) -> bytes:
    """How a row of ``value`` lies on a wire or a disk."""
    return struct.pack("<f", value) * 4


def result_trace(job: str) -> bytes:
    return b"tether.result." + job.encode()


async def seal_tenant(running: Services, name: str = SEALED, **what: Any) -> None:
    await running.gateway.tenants.store(Tenant(name, sealed=True, **what))
    ring = running.gateway.seals.keyring
    await wait_until(lambda: ring.newest(name) is not None, "the tenant has a key")


async def infer(running: Services, tenant: str, served: Served, value: float = IN) -> float:
    inputs = (from_numpy(served.manifest.inputs[0].name, row(value)),)
    answer = await running.gateway.infer(served, tenant, inputs, (), request_id="r", timeout_s=20)
    return float(first(answer)[0][0])


async def run_job(running: Services, tenant: str, served: Served, value: float = IN, key: str = "") -> dict[str, Any]:
    (job,) = await running.gateway.jobs.submit(tenant, [new_job(served, row(value), key=key)])
    return await running.gateway.jobs.get(tenant, job["id"], 20)


def shown(job: dict[str, Any]) -> float:
    return float(job["result"]["outputs"][0]["data"][0])


def on_disk(broker: Broker, pattern: bytes) -> bool:
    files = [path for path in broker.home.nats_store.rglob("*") if path.is_file()]
    assert files
    return any(pattern in path.read_bytes() for path in files)


@pytest.mark.parametrize(("tenant", "readable"), [(SEALED, False), (OPEN, True)])
async def test_only_a_sealed_tenants_payloads_are_unreadable_on_the_wire_and_on_disk(
    embedded_broker: Broker, tenant: str, readable: bool
) -> None:
    with tapped(embedded_broker) as (broker, tap):
        async with services(broker, workers=1) as running:
            served = await running.push("bump", models.add())
            await seal_tenant(running)
            assert await infer(running, tenant, served) == OUT
            done = await run_job(running, tenant, served, key="same")
            assert shown(done) == OUT
            assert (await run_job(running, tenant, served, key="same"))["id"] == done["id"]
            with pytest.raises(IdempotencyConflict):
                await run_job(running, tenant, served, IN + 1, key="same")
            await wait_until(lambda: on_disk(broker, result_trace(done["id"])), "its result is on disk")
            assert on_disk(broker, tensor(OUT)) == readable
            await running.workers[0].holder.stop(1)
            (queued,) = await running.gateway.jobs.submit(tenant, [new_job(served, row(IN))])
            await wait_until(lambda: on_disk(broker, queued["id"].encode()), "it is queued on disk")
            assert on_disk(broker, tensor(IN)) == readable
        assert (tap.heard(tensor(IN)), tap.heard(tensor(OUT))) == (readable, readable)
        assert tap.heard(done["id"].encode())
        assert tap.heard(tenant.encode())


async def test_jobs_of_sealed_and_open_tenants_share_a_bundle_and_get_their_own_answers(one: Services) -> None:
    served = await one.push("bump", models.add())
    await seal_tenant(one)
    await seal_tenant(one, "bank")

    tenants = [SEALED, OPEN, "bank"] * 20
    answers = await asyncio.gather(*[infer(one, tenant, served, number) for number, tenant in enumerate(tenants)])
    assert answers == [number + 1 for number in range(len(tenants))]


async def test_a_failure_says_its_reason_to_the_caller_alone(embedded_broker: Broker) -> None:
    with tapped(embedded_broker) as (broker, tap):
        async with services(broker, workers=1) as running:
            served = await running.push("lookup", models.gather())
            await seal_tenant(running)
            for tenant, index in ((SEALED, 86_753), (OPEN, 97_864)):
                request = msgspec.structs.replace(
                    new_job(served, row(1)), inputs=(from_numpy("x", np.array([[index]], np.int64)),)
                )
                (job,) = await running.gateway.jobs.submit(tenant, [request])
                failed = await running.gateway.jobs.get(tenant, job["id"], 20)
                assert (failed["state"], failed["error"]["code"]) == ("failed", InferenceFailed.code)
                message = failed["error"]["message"]
                assert str(index) in message
                assert tap.heard(message.encode()) == (tenant == OPEN)
