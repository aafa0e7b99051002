"""No accepted job is in no lane and without a result: the dispatcher finds it and ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from support.brokers import cuts
from support.brokers.brokers import Broker, embedded, wait_until
from support.brokers.operators import operator
from support.brokers.stored import count
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services
from support.platform.tenancy import Thief, bound_home, isolate, own_worker

from tether.broker.embedded_server import Binary
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.dispatcher.jobs.sweeper import Sweeper, sweeping
from tether.dispatcher.lanes.consumer_check import LaneCheck
from tether.domain.job import Failure, JobId, JobState, Outcome, Priority, new_job_id
from tether.errors import JobNotFound
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.process.lifecycle import tasks
from tether.streams.lane_admin import consumer_state, next_message
from tether.wire import codec

Restartable = tuple[Broker, Services]


def bus_of(running: Services) -> Bus:
    assert running.dispatcher is not None
    return running.dispatcher._bus


@pytest.fixture
async def bump(one: Services) -> ResolvedVersion:
    return await one.push("bump", models.add())


@pytest.fixture
async def idle(one: Services, bump: ResolvedVersion) -> Services:
    """Nobody pulls: what is submitted stays in its lane."""
    await one.workers[0].holder.stop(1)
    return one


@pytest.fixture
def sweeper(one: Services) -> Sweeper:
    return Sweeper(bus_of(one), LaneCheck(bus_of(one)))


async def sweep(sweeper: Sweeper, *, unqueued_s: float = 60.0) -> None:
    await sweeper.round(grace_s=0.0, unqueued_s=unqueued_s)


async def submit(
    running: Services, served: ResolvedVersion, count: int = 1, *, tenant: str = TENANT, **more: Any
) -> list[str]:
    """Jobs in messages of their own."""
    return [
        (await running.gateway.jobs.submit(tenant, [new_job(served, row(number), **more)]))[0]["id"]
        for number in range(count)
    ]


async def ends(running: Services, jobs: list[str], tenant: str = TENANT) -> list[tuple[str, str]]:
    shown = await running.gateway.jobs.get_many(tenant, jobs, 0.0)
    return [(job["state"], job.get("error", {}).get("code", "")) for job in shown]


async def lose(running: Services, served: ResolvedVersion, place: int, pool: str = "shared") -> None:
    """Take a message out of a lane, by its place there."""
    bus, lane = bus_of(running), served.job_lane(Priority.NORMAL, pool)
    stream = bus.names.lane_stream(lane)
    sequence = 0
    for _ in range(place + 1):
        found = await next_message(bus, stream, bus.names.lane(lane), sequence + 1)
        assert found is not None
        sequence = found.sequence
    async with operator(running.home, running.settings) as everywhere:
        assert (await everywhere.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence}))["success"]


def swept(outcome: str) -> float:
    return float(metrics.JOBS_SWEPT.labels(outcome)._value.get())


def made_again() -> float:
    return float(metrics.LANES_MADE_AGAIN.labels("stuck")._value.get())


LOST = ("failed", "job_lost")
QUEUED = ("queued", "")


async def test_a_job_whose_message_is_gone_ends_as_lost_and_its_neighbours_wait_on(
    idle: Services, bump: ResolvedVersion, sweeper: Sweeper
) -> None:
    jobs = await submit(idle, bump, 3)
    await lose(idle, bump, 1)
    before = swept("lost")
    await sweep(sweeper)
    await sweep(sweeper)
    assert await ends(idle, jobs) == [QUEUED, LOST, QUEUED]
    assert swept("lost") == before + 1


async def test_a_job_in_an_emptied_lane_is_found_by_a_sweeper_that_saw_it_there(
    idle: Services, bump: ResolvedVersion, sweeper: Sweeper
) -> None:
    jobs = await submit(idle, bump, 2)
    await sweep(sweeper)
    async with Thief(idle.workers[0]._bus, bump.job_lane(Priority.NORMAL)) as thief:
        await wait_until(lambda: len(thief.got) == 2, "both are held")
        await sweep(sweeper)
        assert await ends(idle, jobs) == [QUEUED, QUEUED]
        await thief.got[0].ack()
        await idle.workers[0]._bus.flush()
        await sweep(sweeper)
    assert await ends(idle, jobs) == [LOST, QUEUED]


async def test_a_job_whose_result_is_gone_ends_as_lost(one: Services, bump: ResolvedVersion, sweeper: Sweeper) -> None:
    (job,) = await submit(one, bump)
    assert (await one.gateway.jobs.get(TENANT, job, 20.0))["state"] == "succeeded"
    bus = bus_of(one)
    await wait_until(lambda: empty(bus, bus.names.jobs_stream(0)), "it is acknowledged")
    stored = await bus.direct_get(bus.names.results_stream, bus.names.result(job))
    assert stored is not None
    await bus.api(f"STREAM.MSG.DELETE.{bus.names.results_stream}", {"seq": stored.sequence})
    await sweep(sweeper)
    assert await ends(one, [job]) == [LOST]


async def empty(bus: Bus, stream: str) -> bool:
    return await count(bus, stream) == 0


async def test_a_lost_job_keeps_its_idempotency_key(idle: Services, bump: ResolvedVersion, sweeper: Sweeper) -> None:
    request = new_job(bump, row(1), key="key")
    (job,) = await idle.gateway.jobs.submit(TENANT, [request])
    await lose(idle, bump, 0)
    await sweep(sweeper)
    (again,) = await idle.gateway.jobs.submit(TENANT, [request])
    assert (again["id"], again["state"], again["error"]["code"]) == (job["id"], *LOST)
    assert "another key" in again["error"]["message"]


async def test_jobs_that_run_and_end_cost_no_look_at_their_results(
    one: Services, bump: ResolvedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = bus_of(one)
    monkeypatch.setattr("tether.dispatcher.jobs.sweeper.ROUND_S", 3600.0)
    async with tasks() as owner, sweeping(bus, LaneCheck(bus), owner) as sweeper:
        await wait_until(lambda: sweeper._number == 1, "it has begun")
        jobs = [job["id"] for job in await one.gateway.jobs.submit(TENANT, [new_job(bump, row(n)) for n in range(600)])]
        waiting = await submit(one, bump, 1, priority=Priority.LOW)
        shown = await one.gateway.jobs.get_many(TENANT, [*jobs, *waiting], 20.0)
        assert {job["state"] for job in shown} == {"succeeded"}
        await bus.flush()
        await sweeper.open.read()
        await wait_until(lambda: len(sweeper.open) == 0, "every end was heard")
        assert not sweeper._where


async def test_a_sweeper_that_starts_finds_what_is_open_among_what_has_ended(
    one: Services, bump: ResolvedVersion, sweeper: Sweeper
) -> None:
    ended = await one.gateway.jobs.submit(TENANT, [new_job(bump, row(number)) for number in range(700)])
    assert {job["state"] for job in await one.gateway.jobs.get_many(TENANT, [job["id"] for job in ended], 20.0)} == {
        "succeeded"
    }
    await one.workers[0].holder.stop(1)
    jobs = await submit(one, bump, 2)
    await lose(one, bump, 0)
    await sweeper.open.read()
    assert {entry.job for entry in sweeper.open.older_than(0.0)} == set(jobs)
    await sweep(sweeper)
    assert await ends(one, jobs) == [LOST, QUEUED]


async def test_a_message_that_its_consumer_skips_is_delivered_after_a_look(
    restartable: Restartable, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, running = restartable
    served = await running.push("bump", models.add())
    bus = bus_of(running)

    async def nothing(_: LaneCheck) -> None:
        """The sweeper is alone."""

    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(LaneCheck, "check", nothing)
    monkeypatch.setattr("tether.streams.layout._is_ahead", never)
    earlier = await cuts.keep(broker, bus.names.jobs_stream(0))
    for job in await submit(running, served, 12):  # gateways' probes have sequences too
        assert (await running.gateway.jobs.get(TENANT, job, 20.0))["state"] == "succeeded"
    await cuts.cut(broker, earlier)
    assert await running.bus.wait_connected(10)
    jobs = await submit(running, served, 3)
    lane = served.job_lane(Priority.NORMAL)

    async def skips() -> bool:
        """The dispatcher has made the lane, over the files of its consumer of before."""
        found = await consumer_state(bus, lane)
        return found is not None and (found.delivered > 3, found.pending, found.unacked) == (True, 0, 0)

    await wait_until(skips, "the lane's consumer skips them", 30)
    sweeper, before = Sweeper(bus, LaneCheck(bus)), made_again()
    await sweep(sweeper)
    assert made_again() == before + 1
    shown = await running.gateway.jobs.get_many(TENANT, jobs, 20.0)
    assert {job["state"] for job in shown} == {"succeeded"}


async def test_a_record_of_what_was_never_queued_is_removed(
    idle: Services, bump: ResolvedVersion, sweeper: Sweeper
) -> None:
    """Its gateway died between the record and the bundle."""
    (job,) = await submit(idle, bump)
    records = SignedBucket(idle.bus, "jobs", MessageType.RECORD)
    (record,) = [codec.decode_record(body) for body in (await records.entries()).values()]
    claim = msgspec.structs.replace(record, id=new_job_id(), bundle="")
    await records.put(claim.id, codec.encode_record(claim))
    await sweep(sweeper)
    assert await records.get(claim.id) is not None
    before = swept("unqueued")
    await sweep(sweeper, unqueued_s=0.0)
    assert await records.get(claim.id) is None
    assert swept("unqueued") == before + 1
    assert await ends(idle, [job]) == [QUEUED]


async def test_a_record_whose_job_is_queued_after_all_stays(
    idle: Services, bump: ResolvedVersion, sweeper: Sweeper
) -> None:
    (job,) = await submit(idle, bump)
    records = SignedBucket(idle.bus, "jobs", MessageType.RECORD)
    ((key, body),) = (await records.entries()).items()
    claim = msgspec.structs.replace(codec.decode_record(body), bundle="")
    await records.put(key, codec.encode_record(claim))
    await sweep(sweeper)
    await records.put(key, body)
    await sweep(sweeper, unqueued_s=0.0)
    assert await ends(idle, [job]) == [QUEUED]


@pytest.fixture
async def acme(nats_binary: Binary) -> AsyncIterator[Services]:
    with bound_home(own="acme") as home:
        async with embedded(home, nats_binary) as broker, services(broker, workers=0) as running:
            yield running


async def test_an_isolated_tenants_lost_job_ends_too(acme: Services) -> None:
    served = await acme.push("bump", models.add(), workers=0)
    await isolate(acme, "acme", served)
    await own_worker(acme, "own", served, "acme")
    await acme.workers[0].holder.stop(1)
    jobs = await submit(acme, served, 2, tenant="acme")
    await lose(acme, served, 0, "acme")
    sweeper = Sweeper(bus_of(acme), LaneCheck(bus_of(acme)))
    await sweep(sweeper)
    assert await ends(acme, jobs, "acme") == [LOST, QUEUED]


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
async def test_a_dispatcher_can_end_a_job_in_no_other_way(
    idle: Services, bump: ResolvedVersion, state: JobState
) -> None:
    (job,) = await submit(idle, bump)
    bus = bus_of(idle)
    error = None if state is JobState.SUCCEEDED else Failure("inference_failed", "so it says")
    outcome = Outcome(JobId(job), state, (), error, 0, "dispatcher", 0.0, bus.clock.utc())
    subject = bus.names.result(job)
    frame = bus.signer.sign_envelope(MessageType.RESULT, subject, codec.encode_outcomes([outcome]), jobs=(job,))
    await bus.publish_acked(subject, frame)
    assert await ends(idle, [job]) == [QUEUED]


async def test_with_a_keyset_that_does_not_let_the_dispatcher_end_jobs_none_is_ended(
    idle: Services, bump: ResolvedVersion, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = await submit(idle, bump)
    await lose(idle, bump, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Sweeper, "_may_end", lambda _: False)
        await sweep(sweeper)
    assert await ends(idle, jobs) == [QUEUED]
    with pytest.raises(JobNotFound):
        await idle.gateway.jobs.get("other", jobs[0])
