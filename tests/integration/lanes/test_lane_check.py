"""Lanes whose consumer does not deliver: after a power cut a stream may be shorter than its consumers remember."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.brokers import cuts
from support.brokers.brokers import Broker, embedded, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services
from support.platform.tenancy import Thief, bound_home, isolate, own_worker

from tether.broker.embedded_server import Binary
from tether.bus.bus import Bus
from tether.dispatcher import service as dispatcher_service
from tether.dispatcher.lanes.consumer_check import LaneCheck
from tether.domain.job import Lane, Priority
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.streams.lane_admin import consumer_state, remove_lane

Restartable = tuple[Broker, Services]


async def done(running: Services, served: ResolvedVersion, count: int, tenant: str = TENANT) -> None:
    """Jobs, one message after another, all of them run."""
    for number in range(count):
        (job,) = await running.gateway.jobs.submit(tenant, [new_job(served, row(number))])
        assert (await running.gateway.jobs.get(tenant, job["id"], 30.0))["state"] == "succeeded"


def made_again(reason: str) -> float:
    return float(metrics.LANES_MADE_AGAIN.labels(reason)._value.get())


async def shortened(
    broker: Broker, running: Services, lane: Lane, served: ResolvedVersion, tenant: str = TENANT
) -> None:
    """The broker has lost the last messages of a lane's stream, and the lane's consumer has not."""
    stream = running.bus.names.lane_stream(lane)
    await done(running, served, 1, tenant)
    earlier = await cuts.keep(broker, stream)
    await done(running, served, 4, tenant)
    await cuts.cut(broker, earlier)
    assert await running.bus.wait_connected(10)


async def test_jobs_run_after_a_power_cut_that_left_a_consumer_ahead_of_its_stream(restartable: Restartable) -> None:
    broker, running = restartable
    served = await running.push("bump", models.add())
    before = made_again("ahead")
    await shortened(broker, running, served.job_lane(Priority.NORMAL), served)
    await done(running, served, 2)
    assert made_again("ahead") > before


async def test_a_consumer_that_is_made_over_the_files_of_one_that_is_ahead_delivers_at_once(
    restartable: Restartable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_: LaneCheck) -> None:
        """Whoever makes the lane is alone."""

    broker, running = restartable
    served = await running.push("bump", models.add())
    monkeypatch.setattr(LaneCheck, "check", nothing)
    before = made_again("ahead")
    await shortened(broker, running, served.job_lane(Priority.NORMAL), served)
    await done(running, served, 2)
    assert made_again("ahead") == before + 1


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No dispatcher looks until the patch is undone, nor at what it has just made."""

    async def nothing(_: LaneCheck) -> None:
        """Sees nothing."""

    async def never(*_: object) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(LaneCheck, "check", nothing)
        patch.setattr("tether.streams.layout._is_ahead", never)
        yield patch


def bus_of(running: Services) -> Bus:
    assert running.dispatcher is not None
    return running.dispatcher._bus


async def submitted(running: Services, served: ResolvedVersion, count: int) -> list[str]:
    return [
        (await running.gateway.jobs.submit(TENANT, [new_job(served, row(number))]))[0]["id"] for number in range(count)
    ]


async def states(running: Services, jobs: list[str]) -> set[str]:
    return {job["state"] for job in await running.gateway.jobs.get_many(TENANT, jobs, 30.0)}


async def test_a_dispatcher_that_starts_later_finds_the_consumer_that_is_ahead(
    restartable: Restartable, blind: pytest.MonkeyPatch
) -> None:
    broker, running = restartable
    served = await running.push("bump", models.add())
    lane = served.job_lane(Priority.NORMAL)
    await shortened(broker, running, lane, served)
    jobs = await submitted(running, served, 1)

    async def there() -> bool:
        return await consumer_state(bus_of(running), lane) is not None

    await wait_until(there, "the lane has a consumer")
    consumer = await consumer_state(bus_of(running), lane)
    assert consumer is not None
    assert (consumer.pending, consumer.unacked) == (0, 0)
    blind.undo()
    async with dispatcher_service.running(running.settings, running.home):
        assert await states(running, jobs) == {"succeeded"}


async def test_messages_that_were_skipped_before_anybody_looked_are_run(
    restartable: Restartable, blind: pytest.MonkeyPatch
) -> None:
    """The stream has grown past what the consumer remembers, so that it delivers what comes and not what lies there."""
    broker, running = restartable
    served = await running.push("bump", models.add())
    lane = served.job_lane(Priority.NORMAL)
    await shortened(broker, running, lane, served)
    jobs = await submitted(running, served, 12)  # gateways' probes have sequences too
    await done(running, served, 1)
    check, before = LaneCheck(bus_of(running)), made_again("stuck")
    blind.undo()
    for _ in range(3):
        await check.check()
    assert made_again("stuck") == before + 1
    assert await states(running, jobs) == {"succeeded"}


async def test_a_lane_with_jobs_whose_consumer_is_gone_gets_one(one: Services, blind: pytest.MonkeyPatch) -> None:
    served = await one.push("bump", models.add())
    lane = served.job_lane(Priority.NORMAL)
    await remove_lane(bus_of(one), lane)
    jobs = await submitted(one, served, 1)
    check = LaneCheck(bus_of(one))
    blind.undo()
    for _ in range(2):
        await check.check()
    assert await states(one, jobs) == {"succeeded"}


async def test_consumers_of_jobs_that_wait_or_are_held_are_left_alone(one: Services, blind: pytest.MonkeyPatch) -> None:
    served = await one.push("bump", models.add())
    await one.workers[0].holder.stop(1)
    lane = served.job_lane(Priority.NORMAL)
    await submitted(one, served, 3)
    made = await created(one, lane)
    check = LaneCheck(bus_of(one))
    blind.undo()
    async with Thief(one.workers[0]._bus, lane) as thief:
        await wait_until(lambda: len(thief.got) == 3, "all are held")
        await submitted(one, served, 8)
        await wait_until(lambda: len(thief.got) == 8, "as many are held as it takes, and others wait")
        for _ in range(4):
            await check.check()
    assert await created(one, lane) == made


async def created(running: Services, lane: Lane) -> str:
    names = running.bus.names
    info = await bus_of(running).api(f"CONSUMER.INFO.{names.lane_stream(lane)}.{names.lane_consumer(lane)}")
    return str(info["created"])


async def test_the_streams_of_an_isolated_tenant_are_looked_at_too(nats_binary: Binary) -> None:
    with bound_home(own="acme") as home:
        async with embedded(home, nats_binary) as broker, services(broker, workers=1) as running:
            served = await running.push("bump", models.add())
            await isolate(running, "acme", served)
            await own_worker(running, "own", served, "acme")
            await shortened(broker, running, served.job_lane(Priority.NORMAL, "acme"), served, "acme")
            await done(running, served, 2, "acme")
