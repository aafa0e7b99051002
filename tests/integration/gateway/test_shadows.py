"""Copies for shadow versions keep to the walls that their requests keep to, and outlive the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.configs import configure
from support.platform.services import TENANT, Services, first, row
from support.platform.tenancy import bound_home, isolate, own_worker

from tether.domain.tensor import from_numpy
from tether.gateway_http.inference.output_comparison import Verdict
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import ModelConfig, Shadow
from tether.process.data_dir import Home

CLINIC, OWN = "clinic", "own"
SHADOW = Shadow(2)


@pytest.fixture
def home() -> Iterator[Home]:
    with bound_home(own=CLINIC) as made:
        yield made


async def infer(running: Services, served: ResolvedVersion, value: float, tenant: str = CLINIC) -> float:
    inputs = (from_numpy("x", row(value)),)
    answer = await running.gateway.infer(served, tenant, inputs, (), request_id="r", timeout_s=20)
    return float(first(answer)[0, 0])


def counts(running: Services, name: str) -> dict[Verdict, int]:
    """Those that are not 0."""
    tally = running.gateway.features.shadows.tallies(name)[SHADOW]
    return {verdict: count for verdict, count in tally.counts.items() if count}


async def test_copies_of_an_isolated_and_sealed_tenants_requests_run_at_its_own_worker(one: Services) -> None:
    served = await one.push("bump", models.add())
    shadow = await one.push("bump", models.add(2.0))
    await configure(one, ModelConfig("bump", shadows=(SHADOW,)))
    await isolate(one, CLINIC, served, sealed=True)
    await own_worker(one, OWN, served, CLINIC)
    await wait_until(lambda: one.gateway.catalog.workers(shadow, CLINIC) == (OWN,), "its worker holds both versions")
    await wait_until(lambda: one.gateway.tenant_encryption.keyring.newest(CLINIC) is not None, "the tenant has a key")
    await one.workers[0].holder.stop(5.0)
    assert await infer(one, served, 4.0) == 5.0
    await wait_until(lambda: counts(one, "bump") == {Verdict.DIFFERENT: 1}, "the copy was answered")


async def test_copies_that_were_under_way_when_the_broker_died_are_answered_afterwards(
    restartable: tuple[Broker, Services],
) -> None:
    broker, running = restartable
    served = await running.push("bump", models.add())
    await running.push("bump", models.add(2.0))
    await configure(running, ModelConfig("bump", shadows=(SHADOW,)))
    assert broker.server is not None
    for value in range(8):
        assert await infer(running, served, float(value), TENANT) == value + 1
    await broker.server.kill()
    assert running.gateway.features.shadows.under_way <= 8
    waiting = [asyncio.ensure_future(infer(running, served, float(value), TENANT)) for value in range(3)]
    await broker.server.start()
    assert await asyncio.gather(*waiting) == [1.0, 2.0, 3.0]
    await wait_until(lambda: running.gateway.features.shadows.under_way == 0, "all copies have ended", 40)
    assert sum(counts(running, "bump").values()) == 11
    assert counts(running, "bump").get(Verdict.DIFFERENT, 0) >= 3
