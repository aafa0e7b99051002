"""Tenants that are sealed and isolated at once: none but their own workers, and gateways, open what is theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import Services, first, new_job, row
from support.platform.tenancy import bound_home, has_lane, isolate, own_worker

from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import NoDecryptionKey
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process.data_dir import Home

CLINIC, OWN = "clinic", "own"


@pytest.fixture
def home() -> Iterator[Home]:
    with bound_home(own=CLINIC) as made:
        yield made


async def infer(running: Services, served: ResolvedVersion, value: float) -> float:
    inputs = (from_numpy("x", row(value)),)
    answer = await running.gateway.infer(served, CLINIC, inputs, (), request_id="r", timeout_s=20)
    return float(first(answer)[0, 0])


async def test_only_the_tenants_own_worker_opens_what_is_its(one: Services) -> None:
    served = await one.push("bump", models.add())
    await isolate(one, CLINIC, served, sealed=True)
    await own_worker(one, OWN, served, CLINIC)
    await wait_until(lambda: one.gateway.tenant_encryption.keyring.newest(CLINIC) is not None, "the tenant has a key")
    key = one.gateway.tenant_encryption.keyring.newest(CLINIC)
    assert key is not None
    assert await infer(one, served, 4.0) == 5.0
    (job,) = await one.gateway.jobs.submit(CLINIC, [new_job(served, row(6.0))])
    done = await one.gateway.jobs.get(CLINIC, job["id"], 20)
    assert (done["state"], done["result"]["outputs"][0]["data"][0]) == ("succeeded", 7.0)
    shared, own = one.workers
    assert (await own.keyring.find(CLINIC, key.id)).id == key.id
    with pytest.raises(NoDecryptionKey):
        await shared.keyring.find(CLINIC, key.id)


async def test_jobs_that_wait_while_their_sealed_tenant_is_isolated_are_run(one: Services) -> None:
    """They were accepted for the shared workers, and are in the shared lane."""
    served = await one.push("bump", models.add())
    await one.gateway.tenants.store(Tenant(CLINIC, sealed=True))
    await wait_until(lambda: one.gateway.tenant_encryption.keyring.newest(CLINIC) is not None, "the tenant has a key")
    before = one.gateway.tenant_encryption.keyring.newest(CLINIC)
    assert before is not None
    await one.workers[0].holder.stop(5.0)
    jobs = await one.gateway.jobs.submit(CLINIC, [new_job(served, row(float(n))) for n in range(5)])
    await isolate(one, CLINIC, sealed=True)
    await wait_until(lambda: _another_key(one, before.id), "the tenant has a key that shared workers have not")
    await wait_until(lambda: has_lane(one, served, CLINIC), "the tenant has lanes")
    await one.start_worker("worker-2")
    shown = await one.gateway.jobs.get_many(CLINIC, [job["id"] for job in jobs], 20)
    assert [(job["state"], job.get("error")) for job in shown] == [("succeeded", None)] * 5


def _another_key(running: Services, key_id: bytes) -> bool:
    newest = running.gateway.tenant_encryption.keyring.newest(CLINIC)
    return newest is not None and newest.id != key_id
