"""Workers and dispatchers that went on without doing their work: one failure ended a task that nobody began again."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.bus import rpc
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.dispatcher import service as dispatcher_service
from tether.dispatcher.service import Dispatcher
from tether.domain.job import Job, JobState, Outcome, new_job_id
from tether.domain.manifest import Assignment, Epoch, Registration
from tether.errors import BadName, BrokerUnavailable, QueueFull, TetherError
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.streams.lane_consumer import Delivery
from tether.wire import codec
from tether.worker import service as worker_service
from tether.worker.jobs.ack_keepalive import KeepAlive
from tether.worker.jobs.redelivery import Redelivery
from tether.worker.models.run_limits import ActiveRun
from tether.worker.scheduling.batching import Done, Run
from tether.worker.scheduling.bundle import Bundle


@dataclasses.dataclass
class Delivered:
    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None = None


def redelivered(running: Services, served: ResolvedVersion, jobs: list[Job]) -> Bundle:
    """A bundle that some worker had in its hands before."""
    ids = tuple(job.id for job in jobs)
    subject = running.bus.names.lane(served.infer_lane)
    sealed = running.bus.signer.sign_envelope(
        MessageType.INFER, subject, codec.encode_jobs(jobs), jobs=ids, message_id=new_job_id()
    )
    message = Delivered(subject, sealed, "$JS.ACK.s.c.2.1.1.1.0")
    header = running.bus.verify_or_raise(sealed, subject, MessageType.INFER).header
    return Bundle(Delivery(running.workers[0]._bus, served.infer_lane, message), header, jobs)


async def second_dispatcher(running: Services) -> Dispatcher:
    return await running.stack.enter_async_context(dispatcher_service.running(running.settings, running.home))


async def test_a_model_that_a_full_disk_refuses_is_reported_and_tried_again_later(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def full(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tether.worker.files.version_files.fetch_model", full)
        await one.push("bump", models.add(), workers=0)
        await wait_until(lambda: bool(one.workers[0].holder.failed()), "the failure is told")
        told, before = time.monotonic(), tries
        await wait_until(lambda: tries == before + 2, "it is tried twice more")
        assert time.monotonic() - told > 0.5, "a pause before each try"
    await wait_until(lambda: bool(one.workers[0].holder.ready()), "it is loaded in the end")


async def test_a_worker_that_stops_while_it_loads_does_not_begin_again(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = 0

    async def slow(*_: object) -> None:
        nonlocal loading
        loading += 1
        await asyncio.Event().wait()

    monkeypatch.setattr("tether.worker.files.version_files.fetch_model", slow)
    await one.push("bump", models.add(), workers=0)
    await wait_until(lambda: loading == 1, "it loads")
    await one.workers[0].holder.stop(1)
    for _ in range(50):
        await asyncio.sleep(0)
    assert (loading, len(one.workers[0].holder._tasks)) == (1, 0)


async def test_a_registration_that_fails_inside_the_dispatcher_is_tried_again(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, call, failures = one.workers[0], rpc.call, 0

    async def failing(*args: Any, **options: Any) -> bytes:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise TetherError("the service failed")
        return await call(*args, **options)

    monkeypatch.setattr(rpc, "call", failing)
    epoch = worker._epoch
    worker.holder.has_orders, worker._acknowledged_at = False, float("-inf")
    await wait_until(lambda: worker._epoch > epoch, "it is registered again")
    await wait_until(lambda: worker.holder.has_orders, "it has orders")


async def test_an_assignment_that_overtakes_the_epoch_it_is_for_is_followed(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = one.workers[0]
    epoch = worker._epoch + 1

    async def late(*_: object, **__: object) -> bytes:
        return codec.encode(Epoch(epoch))

    monkeypatch.setattr(rpc, "call", late)
    worker.holder.has_orders = False
    worker.assigned(worker.name, codec.encode(Assignment(worker.name, epoch, ())))
    assert not worker.holder.has_orders
    await worker.register()
    assert worker.holder.has_orders


async def test_signs_of_life_go_on_after_an_error(one: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    keepalive, send, calls = one.workers[0].holder._keepalive, KeepAlive._send_due, 0

    async def once(self: KeepAlive, bus: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("dictionary changed size during iteration")
        await send(self, bus)

    monkeypatch.setattr(KeepAlive, "_send_due", once)
    await wait_until(lambda: calls > 2, "the thread goes on")
    assert keepalive._thread.is_alive()


async def test_a_dispatcher_without_records_takes_workers_as_they_are(one: Services) -> None:
    edge = dataclasses.replace(one.settings, worker_name="worker-2", region="edge")
    worker = await one.stack.enter_async_context(worker_service.running(edge, one.home))
    assert one.dispatcher is not None
    await KvBucket(one.dispatcher._bus, "assign").delete("worker-2")
    fresh = await second_dispatcher(one)
    await wait_until(lambda: "worker-2" in fresh._workers, "its heartbeats count")
    assert fresh._epochs["worker-2"] == worker._epoch
    assert "edge" in fresh._regions


async def test_a_region_that_is_no_name_is_refused(one: Services) -> None:
    bus = one.workers[0]._bus
    body = codec.encode(Registration("worker-1", "edge.>", 1, ()))
    with pytest.raises(BadName):
        await rpc.call(bus, "registerWorker", MessageType.REGISTER, body, answers=MessageType.REGISTERED)


async def test_a_full_dead_letter_stream_keeps_no_job_from_ending(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await one.push("bump", models.add())
    instance = next(iter(one.workers[0].holder._held.values())).instance

    async def full(*_: object) -> None:
        raise QueueFull("full")

    monkeypatch.setattr(Redelivery, "_publish", full)
    job = Job(new_job_id(), TENANT, new_job(served, row(1)).inputs, one.bus.clock.utc() + 60)
    bundle = redelivered(one, served, [job])
    outcome = await instance.redelivery._dead_letter(bundle, job, 3)
    assert outcome.state is JobState.DEAD


async def test_a_caller_is_answered_once_although_a_neighbour_keeps_killing_the_worker(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await one.push("bump", models.add())
    instance = next(iter(one.workers[0].holder._held.values())).instance
    inputs, deadline = new_job(served, row(1)).inputs, one.bus.clock.utc() + 60
    good, poison = [Job(new_job_id(), TENANT, inputs, deadline) for _ in range(2)]
    delivered: list[tuple[str, JobState]] = []
    run = instance.runs.run

    async def dying(wanted: Run, going: ActiveRun, *, suspect: bool = False) -> tuple[Done, float, float]:
        if wanted.segments[0].source.job.id == poison.id:
            raise BrokerUnavailable("as if the process had died")
        return await run(wanted, going, suspect=suspect)

    async def deliver(_: Sequence[Bundle], outcomes: Sequence[Outcome]) -> None:
        delivered.extend((outcome.job, outcome.state) for outcome in outcomes)

    monkeypatch.setattr(instance.runs, "run", dying)
    monkeypatch.setattr(instance.reader, "deliver", deliver)
    for _ in range(one.settings.max_attempts):
        again = redelivered(one, served, [good, poison])
        instance._on_delivery(again.delivery)
        await wait_until(lambda: again.delivery._settled, "the worker is done with it")  # noqa: B023
    assert delivered == [(good.id, JobState.SUCCEEDED), (poison.id, JobState.DEAD)]


async def test_a_bundle_whose_answer_could_not_be_sent_is_not_acknowledged(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await one.push("bump", models.add())
    bus = one.workers[0]._bus
    publish, lost = bus.publish, 0

    async def flaky(subject: str, *args: Any, **options: Any) -> None:
        nonlocal lost
        if subject == one.gateway._bundler.reply and not lost:
            lost += 1
            raise BrokerUnavailable("away for a moment")
        await publish(subject, *args, **options)

    monkeypatch.setattr(bus, "publish", flaky)
    assert np.array_equal(await one.infer(served, row(1), timeout_s=10), row(2))
    assert lost == 1


async def test_the_end_of_the_keep_alive_thread_keeps_the_event_loop_free(broker: Broker) -> None:
    """It is asked to stop while its own connection waits, and the worker goes on with what it holds."""
    entered, leave = threading.Event(), threading.Event()

    class Waiting(KeepAlive):
        async def _send_due(self, bus: Bus) -> None:  # noqa: ARG002
            entered.set()
            leave.wait(30)

    keepalive = Waiting(broker.settings, broker.home, "worker-1")
    keepalive.start()
    await wait_until(entered.is_set, "the thread is connected")
    stopping = asyncio.create_task(keepalive.stop())
    await asyncio.sleep(0)  # a blocked loop comes back from here only when the thread has ended
    assert keepalive._thread.is_alive()
    leave.set()
    await stopping
    assert not keepalive._thread.is_alive()
