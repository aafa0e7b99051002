"""The way of a synchronous request: bundles, batches, redelivery, restarts, refusals."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import numpy as np
import pytest
from prometheus_client import REGISTRY
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, row, services

from tether.bus.bus import Bus
from tether.crypto import MessageType
from tether.domain.job import Job, JobState, Lane, Outcome, new_job_id
from tether.domain.tensor import from_numpy
from tether.errors import BadTensor, DeadlineExceeded, InferenceFailed, ModelNotFound, TetherError
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.streams.layout import lanes_of
from tether.wire import codec


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def bump(running: Services) -> ResolvedVersion:
    """A model that adds one."""
    return await running.push("bump", models.add())


async def test_a_request_is_answered_with_the_models_output(one: Services) -> None:
    served = await bump(one)
    assert np.array_equal(await one.infer(served, row(3)), row(4))


async def test_a_thousand_callers_share_few_runs_and_everyone_gets_their_own_rows(one: Services) -> None:
    served = await bump(one)
    before = sample("tether_batch_rows_count", model="bump")
    answers = await asyncio.gather(*[one.infer(served, row(number)) for number in range(1000)])
    for number, answer in enumerate(answers):
        assert np.array_equal(answer, row(number + 1))
    assert sample("tether_batch_rows_count", model="bump") - before < 200


async def test_requests_of_other_shapes_are_never_joined(one: Services) -> None:
    served = await one.push("echo", models.identity("FP32", ("n", "m")), max_batch_size=8)
    arrays = [np.full((1 + number % 3, 1 + number % 5), number, dtype=np.float32) for number in range(60)]
    answers = await asyncio.gather(*[one.infer(served, array) for array in arrays])
    for array, answer in zip(arrays, answers, strict=True):
        assert np.array_equal(array, answer)


async def test_one_bad_request_in_a_batch_fails_alone(one: Services) -> None:
    served = await one.push("gather", models.gather(), max_batch_size=8)
    answers = await asyncio.gather(
        *[one.infer(served, np.zeros((1, 1), dtype=np.int64)) for _ in range(5)],
        one.infer(served, np.full((1, 1), 99, dtype=np.int64)),
        return_exceptions=True,
    )
    assert isinstance(answers[-1], InferenceFailed)
    assert not [answer for answer in answers[:-1] if isinstance(answer, BaseException)]


async def test_bad_input_is_refused_before_anything_is_queued(one: Services) -> None:
    served = await bump(one)
    with pytest.raises(BadTensor, match="shape"):
        await one.infer(served, np.ones((1, 3), dtype=np.float32))
    with pytest.raises(BadTensor, match="datatype"):
        await one.infer(served, np.ones((1, 4), dtype=np.float64))
    with pytest.raises(ModelNotFound):
        one.gateway.catalog.resolve("bump", "9")
    inputs = (from_numpy("x", row(1)),)
    with pytest.raises(BadTensor, match="no output"):
        await one.gateway.infer(served, TENANT, inputs, ("nope",), request_id="", timeout_s=1)


async def test_without_a_worker_a_request_ends_at_its_deadline_and_is_not_run_later(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    before = sample("tether_run_seconds_count", model="bump")
    with pytest.raises(DeadlineExceeded):
        await one.infer(served, row(1), timeout_s=0.3)
    assert sample("tether_run_seconds_count", model="bump") == before


async def test_a_request_waits_for_a_worker_that_comes_back(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    waiting = asyncio.create_task(one.infer(served, row(1)))
    await wait_until(lambda: one.gateway.inflight == 1, "the request is on its way")
    await one.start_worker("worker-2")
    assert np.array_equal(await waiting, row(2))


async def test_requests_in_flight_outlive_a_killed_broker(restartable: tuple[Broker, Services]) -> None:
    broker, running = restartable
    assert broker.server is not None
    served = await bump(running)
    waiting = [asyncio.create_task(running.infer(served, row(number))) for number in range(50)]
    while not running.gateway.inflight:
        await asyncio.sleep(0)
    await broker.server.kill()
    more = [asyncio.create_task(running.infer(served, row(number))) for number in range(50, 100)]
    await broker.server.start()
    for number, answer in enumerate(await asyncio.gather(*waiting, *more)):
        assert np.array_equal(answer, row(number + 1))


async def test_inference_goes_on_with_every_dispatcher_dead(broker: Broker) -> None:
    async with services(broker, workers=1) as running:
        served = await bump(running)
        assert running.dispatcher is not None
        await running.dispatcher._bus.close()
        answers = await asyncio.gather(*[running.infer(served, row(number)) for number in range(20)])
        assert len(answers) == 20


class Thief:
    """Pulls a lane as a worker would, and dies with what it got."""

    def __init__(self, bus: Bus, lane: Lane) -> None:
        self.got: list[Delivery] = []
        self.pull = LaneConsumer(bus, lane, 1, self.got.append)


async def test_what_a_dead_worker_held_is_run_by_another_job_by_job(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    thief = Thief(one.workers[0]._bus, served.infer_lane)
    await thief.pull.start()
    waiting = [asyncio.create_task(one.infer(served, row(number))) for number in range(5)]
    await wait_until(lambda: len(thief.got) == 1, "the thief holds a bundle")
    await thief.pull.stop()
    again = sample("tether_redelivered_total", model="bump")
    await one.start_worker("worker-2")
    for number, answer in enumerate(await asyncio.gather(*waiting)):
        assert np.array_equal(answer, row(number + 1))
    assert sample("tether_redelivered_total", model="bump") > again


async def test_messages_that_are_unsigned_tampered_or_misdirected_run_nothing(one: Services) -> None:
    served = await bump(one)
    bus, lane = one.bus, served.infer_lane
    other = lanes_of("bump", 1, "elsewhere")[0]
    job = Job(new_job_id(), TENANT, (from_numpy("x", row(1)),), bus.clock.utc() + 60)
    body = codec.encode_jobs([job])

    def sealed(subject: str) -> bytes:
        return bus.signer.sign_envelope(MessageType.INFER, subject, body, reply=bus.names.reply("x"), jobs=(job.id,))

    good = sealed(bus.names.lane(lane))
    frames = {
        "unsigned": body,
        "bad_signature": good[:-1] + bytes([good[-1] ^ 1]),
        "subject_mismatch": sealed(bus.names.lane(other)),
        "role_not_allowed": one.workers[0]._bus.signer.sign_envelope(
            MessageType.ANSWER, bus.names.lane(lane), body, jobs=(job.id,)
        ),
    }
    runs = sample("tether_run_seconds_count", model="bump")
    for code, frame in frames.items():
        before = metrics.ENVELOPES_REJECTED.labels(code)._value.get()
        await bus.publish_acked(bus.names.lane(lane), frame)

        def counted(code: str = code, before: float = before) -> bool:
            return float(metrics.ENVELOPES_REJECTED.labels(code)._value.get()) == before + 1

        await wait_until(counted, f"{code} was counted")
    assert sample("tether_run_seconds_count", model="bump") == runs
    assert np.array_equal(await one.infer(served, row(1)), row(2))


async def test_an_answer_that_is_forged_reaches_nobody(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    waiting = asyncio.create_task(one.infer(served, row(1), timeout_s=1.0))
    await wait_until(lambda: bool(one.gateway._bundler._waiting), "somebody waits")
    (job_id,) = one.gateway._bundler._waiting
    forged = Outcome(job_id, JobState.SUCCEEDED, (from_numpy("y", row(9)),))
    subject = one.gateway._bundler.reply
    worker = one.workers[0]._bus
    body = codec.encode_outcomes([forged])
    await worker.publish(subject, body)
    await worker.publish(subject, worker.signer.sign_envelope(MessageType.ANSWER, subject + "x", body, jobs=(job_id,)))
    await worker.flush()
    with pytest.raises(DeadlineExceeded):
        await waiting


async def test_a_gateway_full_of_requests_says_so(start_one: Services) -> None:
    served = await bump(start_one)
    await start_one.workers[0].holder.stop(1)
    waiting = [asyncio.create_task(start_one.infer(served, row(1), timeout_s=1.0)) for _ in range(4)]
    await wait_until(lambda: len(start_one.gateway._bundler._waiting) == 4, "the gateway is full")
    with pytest.raises(TetherError) as caught:
        await start_one.infer(served, row(1), timeout_s=1.0)
    assert caught.value.retryable
    assert all(isinstance(end, DeadlineExceeded) for end in await asyncio.gather(*waiting, return_exceptions=True))


@pytest.fixture
async def start_one(embedded_broker: Broker) -> AsyncIterator[Services]:
    small = dataclasses.replace(embedded_broker, settings=dataclasses.replace(embedded_broker.settings, max_inflight=4))
    async with services(small, workers=1) as running:
        yield running
