"""What a model's configuration says about waiting, and about the rows and the priority of requests, in the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.brokers.brokers import Broker, StartBroker, wait_until
from support.models import models
from support.platform.configs import configure
from support.platform.services import Services, new_job, row, services

from tether.domain.job import Priority
from tether.errors import DeadlineExceeded, IdempotencyConflict, QueueFull
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import ModelConfig, QueuePolicy, TimeoutAction
from tether.process import metrics


@pytest.fixture
async def idle(start_broker: StartBroker) -> AsyncIterator[Services]:
    """A platform without a worker, whose gateway sends two bundles of one job each and keeps the rest."""
    async with (
        start_broker(bundle_max_jobs=1, worker_prefetch=1) as broker,
        services(broker, workers=0) as running,
    ):
        yield running


async def asked(running: Services, served: ResolvedVersion, value: float, order: list[float] | None = None) -> float:
    answer = float((await running.infer(served, row(value), timeout_s=60))[0, 0])
    if order is not None:
        order.append(value)
    return answer


def refusals() -> float:
    return float(metrics.LIMITED.labels("queue")._value.get())


async def in_flight(running: Services, count: int) -> None:
    await wait_until(lambda: running.gateway.inflight == count, f"{count} bundles are on their way")


async def test_what_waits_too_long_is_refused_in_the_gateway_and_by_the_worker(idle: Services) -> None:
    served = await idle.push("short", models.add())
    await configure(idle, ModelConfig("short", revision=1, queue=QueuePolicy(timeout_ms=1500)))
    tasks = [asyncio.create_task(asked(idle, served, float(value))) for value in range(4)]
    await in_flight(idle, 2)
    await wait_until(lambda: sum(task.done() for task in tasks) == 2, "what had not left is refused")
    for task in tasks[2:]:
        with pytest.raises(DeadlineExceeded, match=r"queue\.timeout_ms"):
            task.result()
    assert not any(task.done() for task in tasks[:2])
    await idle.start_worker("worker-1")
    for task in tasks[:2]:
        with pytest.raises(DeadlineExceeded, match="before the job could run"):
            async with asyncio.timeout(30):
                await task
    assert await asked(idle, served, 5.0) == 6.0


async def test_what_waited_too_long_is_served_after_those_that_did_not(idle: Services) -> None:
    served = await idle.push("polite", models.add())
    queue = QueuePolicy(timeout_ms=200, timeout_action=TimeoutAction.DELAY)
    await configure(idle, ModelConfig("polite", revision=1, queue=queue))
    order: list[float] = []
    clock = idle.bus.clock.monotonic
    tasks = [asyncio.create_task(asked(idle, served, value, order)) for value in (1.0, 2.0, 3.0, 4.0)]
    await in_flight(idle, 2)
    late = clock() + 0.2
    await wait_until(lambda: clock() > late, "the first ones are late")
    queue = QueuePolicy(timeout_ms=60_000, timeout_action=TimeoutAction.DELAY)
    await configure(idle, ModelConfig("polite", revision=2, queue=queue))
    tasks += [asyncio.create_task(asked(idle, served, value, order)) for value in (5.0, 6.0)]
    await wait_until(lambda: idle.gateway.held("polite") == 6, "all of them wait")
    await idle.start_worker("worker-1")
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*tasks)
    assert answers == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert order == [1.0, 2.0, 5.0, 6.0, 3.0, 4.0]


async def test_one_request_too_many_is_refused_at_once(idle: Services) -> None:
    served = await idle.push("small", models.add())
    await configure(idle, ModelConfig("small", revision=1, queue=QueuePolicy(max_size=3)))
    tasks = [asyncio.create_task(asked(idle, served, float(value))) for value in range(3)]
    await wait_until(lambda: idle.gateway.held("small") == 3, "three wait")
    before = refusals()
    with pytest.raises(QueueFull, match=r"queue\.max_size"):
        await asked(idle, served, 9.0)
    assert refusals() == before + 1
    await idle.start_worker("worker-1")
    async with asyncio.timeout(60):
        assert await asyncio.gather(*tasks) == [1.0, 2.0, 3.0]
    assert await asked(idle, served, 9.0) == 10.0
    assert idle.gateway.held("small") == 0


async def test_jobs_without_a_priority_get_that_of_their_model(one: Services) -> None:
    served = await one.push("urgent", models.add())
    submit = one.gateway.jobs.submit
    plain = new_job(served, row(1.0), key="k", priority=None)
    (first,) = await submit("acme", [plain])
    await configure(one, ModelConfig("urgent", revision=1, default_priority="high"))
    (again,) = await submit("acme", [plain])
    assert (first["priority"], again["priority"], again["id"]) == ("normal", "normal", first["id"])
    (high,) = await submit("acme", [new_job(served, row(1.0), priority=None)])
    (low,) = await submit("acme", [new_job(served, row(1.0), priority=Priority.LOW)])
    assert (high["priority"], low["priority"]) == ("high", "low")
    with pytest.raises(IdempotencyConflict):
        await submit("acme", [new_job(served, row(1.0), key="k", priority=Priority.HIGH)])


async def test_a_broker_restart_does_not_lengthen_or_lose_what_waits(
    restartable: tuple[Broker, Services],
) -> None:
    broker, running = restartable
    served = await running.push("kept", models.add())
    await configure(running, ModelConfig("kept", revision=1, queue=QueuePolicy(timeout_ms=50_000)))
    assert broker.server is not None
    await broker.server.kill()
    task = asyncio.create_task(asked(running, served, 1.0))
    await wait_until(lambda: running.gateway.held("kept") == 1, "it waits")
    await broker.server.start()
    async with asyncio.timeout(50):
        assert await task == 2.0
