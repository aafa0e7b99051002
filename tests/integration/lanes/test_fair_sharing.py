"""Tenants on one lane: a flood waits behind itself, also when it was there first."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import Services, services

from tether.domain.job import Lane
from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import Unavailable
from tether.gateway_http.bundling.infer_bundler import InferBundler
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.streams.job_queue import BusQueue


def slow(layers: int = 40, width: int = 512) -> bytes:
    """A few milliseconds a row."""
    weights = np.random.default_rng(1).standard_normal((width, width)).astype(np.float32) / width**0.5
    nodes, last = [helper.make_node("MatMul", ["x", "first"], ["t"])], "t"
    for layer in range(layers):
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"t{layer}"]))
        last = f"t{layer}"
    nodes.append(helper.make_node("ReduceMean", [last], ["y"], axes=[1], keepdims=1))
    initial = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(weights[:4], "first")]
    inputs, outputs = [models.value("x", "FP32", ["n", 4])], [models.value("y", "FP32", ["n", 1])]
    return models.to_bytes(models.model(nodes, inputs, outputs, initial))


class Callers:
    """Requests of tenants, and the order in which they were answered."""

    def __init__(self, running: Services, served: ResolvedVersion) -> None:
        self._gateway = running.gateway
        self._served = served
        self.answered: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, tenant: str, count: int) -> list[asyncio.Task[None]]:
        made = [asyncio.create_task(self._one(tenant)) for _ in range(count)]
        self.tasks += made
        return made

    async def _one(self, tenant: str) -> None:
        inputs = (from_numpy("x", np.ones((8, 4), np.float32)),)
        await self._gateway.infer(self._served, tenant, inputs, (), request_id="test", timeout_s=60)
        self.answered.append(tenant)


async def test_a_calm_tenants_requests_overtake_a_flood(one: Services) -> None:
    served = await one.push("slow", slow())
    callers = Callers(one, served)
    await asyncio.gather(*callers.ask("calm", 8), *callers.ask("flood", 8))
    callers.answered.clear()
    callers.ask("flood", 400)
    await wait_until(lambda: len(callers.answered) >= 5, "the flood is under way")
    before = len(callers.answered)
    await asyncio.gather(*callers.ask("calm", 5))
    overtaken = Counter(callers.answered)["flood"] - before
    await asyncio.gather(*callers.tasks)
    assert overtaken <= 60, "calm callers waited for what was in flight and their turns, not for 400 others"


async def test_a_flood_stays_in_the_gateway_and_not_in_the_lane(one: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the broker holds of it is what its workers are busy with."""
    served = await one.push("slow", slow())
    callers = Callers(one, served)
    await asyncio.gather(*callers.ask("flood", 20))
    in_flight: list[int] = []
    enqueue = BusQueue.enqueue

    async def noting(self: BusQueue, lane: Lane, frame: bytes, **rest: Any) -> None:
        in_flight.append(one.gateway.inflight)
        await enqueue(self, lane, frame, **rest)

    monkeypatch.setattr(BusQueue, "enqueue", noting)
    monkeypatch.setattr(InferBundler, "max_jobs", 16)  # so that there are many bundles, however fast the model is
    await asyncio.gather(*callers.ask("flood", 300))
    assert len(in_flight) >= 300 // 16
    assert max(in_flight) <= 2 * max(2, one.settings.worker_prefetch)


async def test_weights_decide_who_gets_how_much(one: Services) -> None:
    served = await one.push("slow", slow())
    await one.gateway.tenants.store(Tenant("heavy", weight=4.0))
    callers = Callers(one, served)
    await asyncio.gather(*callers.ask("heavy", 8), *callers.ask("light", 8))
    callers.answered.clear()
    callers.ask("light", 150)
    callers.ask("heavy", 150)
    await wait_until(lambda: len(callers.answered) >= 120, "both were served for a while")
    found = Counter(callers.answered[20:120])
    await asyncio.gather(*callers.tasks)
    assert 2.5 <= found["heavy"] / found["light"] <= 6


async def test_a_full_gateway_refuses_those_above_their_share_first(broker: Broker) -> None:
    limited = dataclasses.replace(broker.settings, max_inflight=40)
    async with services(Broker(broker.home, limited, broker.monitor, broker.server), workers=1) as one:
        served = await one.push("slow", slow())
        callers = Callers(one, served)
        flood = callers.ask("flood", 60)
        await wait_until(lambda: any(task.done() for task in flood), "some were refused or answered")
        calm = callers.ask("calm", 5)
        results = await asyncio.gather(*flood, return_exceptions=True)
        assert sum(isinstance(result, Unavailable) for result in results) >= 15
        assert await asyncio.gather(*calm) == [None] * 5
