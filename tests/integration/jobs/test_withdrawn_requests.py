"""Requests whose caller left: what they leave in the lane and in the gateway, and who hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from support.brokers.brokers import StartBroker, wait_until
from support.brokers.stored import count
from support.models import models
from support.platform.services import TENANT, Services, row, services
from support.platform.tenancy import bound_home, isolate, own_worker

from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.job import JobId, Lane, Withdrawal, new_job_id
from tether.errors import RoleNotAllowed, SubjectMismatch
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.process.data_dir import Home
from tether.wire import codec
from tether.worker.jobs.withdrawn_jobs import WithdrawnJobs

OWN = "own"


@pytest.fixture
def home() -> Iterator[Home]:
    with bound_home(own=TENANT) as made:
        yield made


@pytest.fixture
async def idle(start_broker: StartBroker) -> AsyncIterator[Services]:
    """A platform without a worker, whose gateway sends two bundles of one job each and keeps the rest."""
    async with (
        start_broker(bundle_max_jobs=1, worker_prefetch=1) as broker,
        services(broker, workers=0) as running,
    ):
        yield running


def lane_of(running: Services, served: ResolvedVersion) -> Lane:
    return served.lane(running.gateway.tenants.pool(TENANT))


def withdrawn(running: Services, worker: int, model: str) -> WithdrawnJobs:
    """What a worker knows to be withdrawn of a model that it holds."""
    held = running.workers[worker].holder._held
    (found,) = [one.instance._withdrawn for ref, one in held.items() if ref.model == model]
    return found


async def ask_and_leave(running: Services, served: ResolvedVersion) -> None:
    task = asyncio.create_task(running.infer(served, row(1.0), timeout_s=60))
    await wait_until(lambda: running.gateway.held(served.manifest.name) == 1, "the gateway holds the request")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def in_lane(running: Services, lane: Lane) -> int:
    assert running.dispatcher is not None
    return await count(running.dispatcher._bus, running.bus.names.lane_stream(lane))


async def test_a_caller_that_asks_and_leaves_again_and_again_fills_neither_lane_nor_gateway(idle: Services) -> None:
    served = await idle.push("left", models.add())
    lane, bundler = lane_of(idle, served), idle.gateway._bundler
    for _ in range(50):
        await ask_and_leave(idle, served)
        await wait_until(lambda: not any(flight.sending for flight in bundler.flights), "nothing is being sent")
    assert await in_lane(idle, lane) <= 2
    assert (idle.gateway.inflight, len(bundler._waiting), idle.gateway.held("left")) == (0, 0, 0)
    assert len(bundler._lanes[lane]._pending) <= 1
    await idle.start_worker("worker-1")
    assert (await idle.infer(served, row(1.0)))[0, 0] == 2.0
    await wait_until(lambda: not bundler.flights, "what was sent is answered")
    assert not bundler._withdrawn

    async def empty() -> bool:
        return await in_lane(idle, lane) == 0

    await wait_until(empty, "what was answered is acknowledged")


async def test_workers_of_the_pool_hear_what_is_withdrawn_and_no_others(one: Services) -> None:
    served = await one.push("mine", models.add())
    await isolate(one, TENANT, served)
    await own_worker(one, OWN, served, TENANT)
    withdrawals, jobs = one.gateway._bundler._withdrawals, [JobId(new_job_id()) for _ in range(2500)]
    until = one.bus.clock.utc() + 60
    for job in jobs:
        withdrawals.add(lane_of(one, served), job, until)
    await wait_until(lambda: all(job in withdrawn(one, 1, "mine") for job in jobs), "its worker knows")
    assert not any(job in withdrawn(one, 0, "mine") for job in jobs)


async def test_what_is_withdrawn_is_forgotten_at_its_deadline(one: Services) -> None:
    served = await one.push("brief", models.add())
    withdrawals, known = one.gateway._bundler._withdrawals, withdrawn(one, 0, "brief")
    past, coming = JobId(new_job_id()), JobId(new_job_id())
    withdrawals.add(lane_of(one, served), past, one.bus.clock.utc() - 1)
    await wait_until(lambda: past in known, "the worker knows")
    withdrawals.add(lane_of(one, served), coming, one.bus.clock.utc() + 60)
    await wait_until(lambda: coming in known, "the worker knows the next one")
    assert past not in known


@pytest.mark.parametrize("case", ["dispatcher", "worker-1", "modelstore", "another subject"])
async def test_only_a_gateway_may_withdraw_and_only_in_the_lane_that_it_says(one: Services, case: str) -> None:
    served = await one.push("kept", models.add())
    known, job = withdrawn(one, 0, "kept"), new_job_id()
    error = SubjectMismatch if case == "another subject" else RoleNotAllowed
    refusals = metrics.ENVELOPES_REJECTED.labels(error.code)
    before = refusals._value.get()
    subject = one.bus.names.withdrawn(lane_of(one, served))
    body = codec.encode(Withdrawal((job,), one.bus.clock.utc() + 60))
    if case == "another subject":
        frame = one.bus.signer.sign_envelope(MessageType.RESULT, one.bus.names.result(job), body)
    else:
        async with connect(one.settings, one.home, case) as other:
            frame = other.signer.sign_envelope(MessageType.RESULT, subject, body)
    await one.bus.publish(subject, frame)
    await wait_until(lambda: refusals._value.get() == before + 1, "it is refused")
    assert job not in known
