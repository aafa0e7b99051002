"""Unsigned, tampered and misdirected messages on every subject a service acts on: nothing happens, and it is counted."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.bus.bus import Bus
from tether.bus.key_value.leases import LeaseBucket
from tether.crypto import MessageType
from tether.domain import api_key
from tether.domain.job import AttemptNote, Job, JobId, JobState, Outcome, Priority, new_job_id
from tether.domain.manifest import Alias, Assignment, Heartbeat, PushRequest, Registration, Route
from tether.domain.partition import ChunkRequest
from tether.domain.tensor import from_numpy
from tether.process import metrics
from tether.wire import codec


@dataclass
class Target:
    """A subject, who may publish there, and a body that would have an effect if it were believed."""

    name: str
    bus: Bus
    subject: str
    kind: MessageType
    body: bytes
    jobs: tuple[str, ...] = ()
    stored: bool = True


@pytest.fixture
async def one(broker: Broker) -> AsyncIterator[Services]:
    async with services(broker, workers=1) as running:
        await running.push("bump", models.add())
        yield running


async def hijack(running: Services) -> list[Target]:
    """One message for every subject that some service listens to or reads."""
    lease = await LeaseBucket(running.bus).get(0)
    assert lease is not None
    epoch = lease.epoch
    names, gateway, worker = running.bus.names, running.bus, running.workers[0]._bus
    assert running.dispatcher is not None
    assert running.modelstore is not None
    dispatcher = running.dispatcher._bus
    served = running.gateway.catalog.resolve("bump", "")
    job = Job(new_job_id(), TENANT, (from_numpy("x", row(1)),), time.time() + 60)
    ids, bundle = (job.id,), codec.encode_jobs([job])
    done = Outcome(JobId(job.id), JobState.SUCCEEDED, (from_numpy("y", row(9)),), None, 1, "worker-1", 1.0, 2.0)
    key = api_key.stored_key(api_key.new_key_text(), tenant="evil", scopes=("admin",), name="", created_at=1.0)
    beat = Heartbeat("worker-1", 1, "local", (), (), 0, 1, 1.0)
    text = codec.encode
    entry = names.bucket_key
    return [
        Target("infer lane", gateway, names.lane(served.infer_lane), MessageType.INFER, bundle, ids),
        Target("jobs lane", gateway, names.lane(served.job_lane(Priority.HIGH)), MessageType.JOB, bundle, ids),
        Target("reply", worker, running.gateway._bundler.reply, MessageType.ANSWER, codec.encode_outcomes([done]), ids, False),
        Target("register", worker, names.service("registerWorker"), MessageType.REGISTER,
               text(Registration("worker-1", "local", 1, ())), (), False),
        Target("push", gateway, names.store_service("registerModel", 0, epoch), MessageType.PUSH,
               text(PushRequest("bump", served.manifest.files)), (), False),
        Target("wanted chunk", running.modelstore._bus, names.wanted("worker-1"), MessageType.WANTED,
               text(ChunkRequest("0" * 64)), (), False),
        Target("heartbeat", worker, entry("liveness", "worker-1"), MessageType.HEARTBEAT, text(beat)),
        Target("assignment", dispatcher, entry("assign", "worker-1"), MessageType.ASSIGN, text(Assignment("worker-1", 1, ()))),
        Target("route", dispatcher, entry("routes", "bump.1"), MessageType.ROUTE, text(Route("bump", 1, ()))),
        Target("alias", dispatcher, entry("aliases", "bump.latest"), MessageType.ALIAS, text(Alias("bump", "latest", 7))),
        Target("api key", gateway, entry("apikeys", key.id), MessageType.API_KEY, text(key)),
    ]  # fmt: skip


def rejected() -> float:
    return sum(sample.value for family in metrics.ENVELOPES_REJECTED.collect() for sample in family.samples
               if sample.name.endswith("_total"))  # fmt: skip


def frames(target: Target) -> dict[str, bytes]:
    good = target.bus.signer.sign_envelope(target.kind, target.subject, target.body, jobs=target.jobs)
    elsewhere = target.bus.signer.sign_envelope(target.kind, target.subject + ".x", target.body, jobs=target.jobs)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    return {"unsigned": target.body, "tampered": bytes(flipped), "misdirected": elsewhere}


async def publish(target: Target, frame: bytes) -> None:
    if target.stored:
        await target.bus.publish_acked(target.subject, frame)
    else:
        await target.bus.publish(target.subject, frame, reply=target.bus.reply_inbox())


@pytest.mark.parametrize("what", ["unsigned", "tampered", "misdirected"])
async def test_no_subject_acts_on_it(one: Services, what: str) -> None:
    before = await state(one)
    for target in await hijack(one):
        if target.name == "alias":
            continue  # only the model store may publish there: see the permission matrix
        count = rejected()
        await publish(target, frames(target)[what])
        await wait_until(lambda count=count: rejected() > count, f"{target.name}: it was counted")
    assert await state(one) == before
    served = one.gateway.catalog.resolve("bump", "")
    assert (await one.infer(served, row(1))).tolist() == row(2).tolist()


async def state(running: Services) -> tuple[object, ...]:
    """Everything that a believed message would have changed."""
    served = running.gateway.catalog.resolve("bump", "")
    listed, _ = await running.gateway.jobs.list(TENANT, state="", model="", limit=10, cursor="")
    assert running.dispatcher is not None
    return (
        served.manifest,
        running.gateway.catalog.workers(served),
        running.gateway.keys.known(),
        running.workers[0].holder.ready(),
        dict(running.dispatcher._epochs),
        metrics.RUN_SECONDS.labels("bump")._sum.get(),
        listed,
    )


async def test_stored_results_records_and_notes_that_are_not_signed_do_not_count(one: Services) -> None:
    """What a reader finds later is verified as what a listener hears now."""
    served = one.gateway.catalog.resolve("bump", "")
    await one.workers[0].holder.stop(1)
    (job,) = await one.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    worker, names = one.workers[0]._bus, one.bus.names
    note = codec.encode(AttemptNote(2, "worker-1", 1.0))
    await worker.publish_acked(names.bucket_key("attempts", names.attempt_key(job["id"])), note)
    done = Outcome(JobId(job["id"]), JobState.SUCCEEDED, (from_numpy("y", row(9)),), None, 1, "worker-1", 1.0, 2.0)
    await worker.publish_acked(names.result(job["id"]), codec.encode_outcomes([done]))
    assert (await one.gateway.jobs.get(TENANT, job["id"]))["state"] == "queued"
    await one.bus.publish_acked(names.bucket_key("jobs", "f" * 32), b"not signed")
    listed, _ = await one.gateway.jobs.list(TENANT, state="", model="", limit=10, cursor="")
    assert [found["id"] for found in listed] == [job["id"]]
