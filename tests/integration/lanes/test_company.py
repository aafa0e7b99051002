"""How many requests share a message: callers who ask again as soon as they are answered, and one who is alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from support.brokers.brokers import StartBroker
from support.models import models
from support.platform.services import Services, services

from tether.domain.job import Job
from tether.domain.tensor import from_numpy
from tether.gateway_http.bundling import lane_bundler
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.wire import codec

CROWD = 32


@pytest.fixture
async def one(start_broker: StartBroker) -> AsyncIterator[Services]:
    """A platform whose gateway has all the time to wait for company."""
    async with start_broker(bundle_delay_ms=1000.0) as broker, services(broker, workers=1) as running:
        yield running


@pytest.fixture
def bundles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Jobs of each bundle that leaves."""
    sizes: list[int] = []
    encode = codec.encode_jobs

    def noting(jobs: list[Job]) -> Any:
        sizes.append(len(jobs))
        return encode(jobs)

    monkeypatch.setattr(codec, "encode_jobs", noting)
    return sizes


async def ask(one: Services, served: ResolvedVersion) -> None:
    inputs = (from_numpy("x", np.ones((1, 4), np.float32)),)
    await one.gateway.infer(served, "t", inputs, (), request_id="test", timeout_s=60)


async def crowd(one: Services, served: ResolvedVersion, rounds: int) -> None:
    async def again() -> None:
        for _ in range(rounds):
            await ask(one, served)

    await asyncio.gather(*[again() for _ in range(CROWD)])


async def test_a_crowd_that_comes_one_by_one_shares_a_message(one: Services, bundles: list[int]) -> None:
    served = await one.push("add", models.add())
    await crowd(one, served, rounds=20)
    bundles.clear()
    callers = []
    for _ in range(CROWD):
        callers.append(asyncio.create_task(ask(one, served)))
        await asyncio.sleep(0)  # a turn of the loop, as when each is read from a connection of its own
    await asyncio.gather(*callers)
    assert bundles[0] >= CROWD // 2, "the first of them did not leave alone"
    assert sum(bundles) == CROWD


async def test_who_is_alone_after_a_crowd_soon_waits_for_nobody(
    one: Services, monkeypatch: pytest.MonkeyPatch, bundles: list[int]
) -> None:
    served = await one.push("add", models.add())
    await crowd(one, served, rounds=20)
    for _ in range(60):
        await ask(one, served)
    monkeypatch.setattr(lane_bundler, "_MOMENT_S", 60.0)
    async with asyncio.timeout(20):  # thirty times the delay of a second, if each of them waited for others
        for _ in range(30):
            await ask(one, served)
    assert bundles[-30:] == [1] * 30
