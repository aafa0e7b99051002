"""Records of durable jobs: stored before anything is queued, found again, and never speaking for another job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from support.brokers.brokers import Broker, wait_until
from support.brokers.operators import reconfigure
from support.brokers.stored import count
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.domain.job import JobId, JobRecord, Priority, digest_of_before, idempotency_digest, new_job_id, record_key
from tether.domain.tensor import to_numpy
from tether.errors import IdempotencyConflict, JobNotFound, QueueFull
from tether.gateway_http import gateway as core
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.wire import codec, oip


async def halted(running: Services) -> ResolvedVersion:
    """A model whose only worker takes nothing."""
    served = await running.push("bump", models.add())
    await running.workers[0].holder.stop(1)
    return served


async def submit(running: Services, *jobs: object) -> list[dict[str, Any]]:
    return await running.gateway.jobs.submit(TENANT, jobs)  # type: ignore[arg-type]


async def listed(running: Services) -> list[str]:
    jobs, _ = await running.gateway.jobs.list(TENANT, state="", model="", limit=1000, cursor="")
    return [job["id"] for job in jobs]


def output(job: dict[str, Any]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    (tensor,) = oip.tensors_from_json(job["result"]["outputs"])
    return to_numpy(tensor)


class Bound:
    """A stream that takes no more than it has, until it is opened again."""

    def __init__(self, running: Services, stream: str) -> None:
        self._home, self._settings, self._bus = running.home, running.settings, running.bus
        self._stream = stream
        self._max = 0

    async def messages(self) -> int:
        return await count(self._bus, self._stream)

    async def shut(self, *, room: int = 0) -> None:
        info = await self._bus.api(f"STREAM.INFO.{self._stream}")
        self._max = info["config"]["max_bytes"]
        await self._limit(info["state"]["bytes"] + room + 1)

    async def open(self) -> None:
        await self._limit(self._max)

    async def _limit(self, most: int) -> None:
        await reconfigure(self._home, self._settings, self._stream, max_bytes=most)


@pytest.mark.parametrize("keyed", [True, False])
async def test_a_job_without_room_for_its_record_is_refused_before_it_is_queued(one: Services, keyed: bool) -> None:
    served = await halted(one)
    records, lanes = Bound(one, one.bus.names.bucket_stream("jobs")), Bound(one, one.bus.names.jobs_stream(0))
    await records.shut()
    jobs = [new_job(served, row(number), key=f"k{number}" if keyed else "") for number in range(20)]
    with pytest.raises(QueueFull):
        await submit(one, *jobs)
    assert await lanes.messages() == 0
    await records.open()
    accepted = await submit(one, *jobs)
    await one.start_worker("worker-2")
    ended = await one.gateway.jobs.get_many(TENANT, [job["id"] for job in accepted], 20)
    assert [float(output(job)[0, 0]) for job in ended] == [number + 1.0 for number in range(20)]


@pytest.mark.parametrize("keyed", [True, False])
async def test_a_request_of_many_bundles_is_queued_whole_or_not_at_all(one: Services, keyed: bool) -> None:
    served = await halted(one)
    lanes = Bound(one, one.bus.names.jobs_stream(0))
    await lanes.shut(room=60_000)
    jobs = [new_job(served, row(number), key=f"k{number}" if keyed else "") for number in range(900)]
    with pytest.raises(QueueFull):
        await submit(one, *jobs)
    queued = await lanes.messages()
    assert queued > 0  # some bundles found room, and the last one did not
    await wait_until(lambda: empty(one), "no record is left of what was refused")
    await lanes.open()
    await one.start_worker("worker-2")
    await wait_until(lambda: drained(lanes), "what had been queued was worked off")
    results = one.bus.names.results_stream
    states = [
        codec.decode_outcomes(envelope.body)[0].state.value
        async for item in one.bus.direct_scan(results, one.bus.names.results())
        if (envelope := one.bus.verify_frame(item.data, item.subject, MessageType.RESULT)) is not None
    ]
    assert set(states) == {"cancelled"}
    accepted = await submit(one, *jobs)
    assert len({job["id"] for job in accepted}) == 900
    ended = await one.gateway.jobs.get_many(TENANT, [job["id"] for job in accepted[:100]], 30)
    assert [float(output(job)[0, 0]) for job in ended] == [number + 1.0 for number in range(100)]


async def empty(running: Services) -> bool:
    return not await listed(running) and await Bound(running, running.bus.names.bucket_stream("jobs")).messages() == 0


async def drained(lanes: Bound) -> bool:
    return await lanes.messages() == 0


async def test_a_key_whose_job_was_forgotten_gets_the_new_jobs_answer(one: Services) -> None:
    """The first job's result is still stored, and its bundle's id still in the broker's window."""
    served = await one.push("bump", models.add())
    (first,) = await submit(one, new_job(served, row(1), key="nightly"))
    assert output(await one.gateway.jobs.get(TENANT, first["id"], 20))[0, 0] == 2.0
    with pytest.raises(IdempotencyConflict):
        await submit(one, new_job(served, row(7), key="nightly"))
    bucket = KvBucket(one.bus, "jobs")
    stored = await one.bus.direct_get(bucket.stream, bucket.subject(record_key(first["id"])))
    assert stored is not None
    await bucket.forget(record_key(first["id"]), stored.sequence)
    (second,) = await submit(one, new_job(served, row(7), key="nightly"))
    assert output(await one.gateway.jobs.get(TENANT, second["id"], 20))[0, 0] == 8.0
    assert second["id"] != first["id"]
    with pytest.raises(JobNotFound):
        await one.gateway.jobs.get(TENANT, first["id"])


async def test_many_requests_with_one_key_at_once_queue_one_job(one: Services) -> None:
    served = await halted(one)
    other = await one.stack.enter_async_context(core.running(one.settings, one.home))
    asked = [
        gateway.jobs.submit(TENANT, [new_job(served, row(1), key="same")])
        for _ in range(12)
        for gateway in (one.gateway, other)
    ]
    answers = await asyncio.gather(*asked)
    assert len({job["id"] for jobs in answers for job in jobs}) == 1
    assert await Bound(one, one.bus.names.jobs_stream(0)).messages() == 1


async def test_a_claim_whose_gateway_died_is_stored_again_under_the_same_id(one: Services) -> None:
    served = await one.push("bump", models.add())
    (first,) = await submit(one, new_job(served, row(1), key="k"))
    await one.gateway.jobs.get(TENANT, first["id"], 20)
    records = one.gateway.jobs._records
    (accepted,) = (await records.find([first["id"]])).values()
    await records._put(msgspec.structs.replace(accepted, bundle="", storing=accepted.bundle))
    with pytest.raises(JobNotFound):
        await one.gateway.jobs.get(TENANT, first["id"])
    (again,) = await submit(one, new_job(served, row(1), key="k"))
    assert again["id"] == first["id"]
    assert output(await one.gateway.jobs.get(TENANT, again["id"], 20))[0, 0] == 2.0


@pytest.mark.parametrize("length", [24, 32])
async def test_records_of_homes_of_before_are_found_by_id_and_by_key(one: Services, length: int) -> None:
    """Their key in the bucket is the whole id, which an Idempotency-Key gave them, or as much of it as the key gave."""
    served = await halted(one)
    (made,) = await submit(one, new_job(served, row(1), key="old"))
    records = one.gateway.jobs._records
    (record,) = (await records.find([made["id"]])).values()
    await records.discard([await records.accept(claimed(record))])
    digest = digest_of_before(idempotency_digest(TENANT, "old"))
    keyed, plain = JobId(digest[:length] + new_job_id()[length:]), new_job_id()
    for job_id in (keyed, plain):
        await put_as_before(one, msgspec.structs.replace(record, id=job_id), length)
    assert (await one.gateway.jobs.get(TENANT, plain))["id"] == plain
    (again,) = await submit(one, new_job(served, row(1), key="old"))
    assert again["id"] == keyed
    with pytest.raises(IdempotencyConflict):
        await submit(one, new_job(served, row(2), key="old"))
    assert await one.gateway.jobs.room.open.count(TENANT) == 2
    assert await one.gateway.jobs.list("other", state="", model="", limit=9, cursor="") == ([], None)
    (newest,) = await submit(one, new_job(served, row(3)))
    assert set(await listed(one)) == {keyed, plain, newest["id"]}
    page, cursor = await one.gateway.jobs.list(TENANT, state="", model="", limit=1, cursor="")
    assert [job["id"] for job in page] == [newest["id"]]
    rest, end = await one.gateway.jobs.list(TENANT, state="", model="", limit=9, cursor=str(cursor))
    assert ({job["id"] for job in rest}, end) == ({keyed, plain}, None)


async def test_a_claim_of_a_home_of_before_is_stored_again_under_its_id_and_key(one: Services) -> None:
    served = await halted(one)
    (made,) = await submit(one, new_job(served, row(1), key="old"))
    records = one.gateway.jobs._records
    (record,) = (await records.find([made["id"]])).values()
    await records.discard([await records.accept(claimed(record))])
    digest = digest_of_before(idempotency_digest(TENANT, "old"))
    older = msgspec.structs.replace(claimed(record), id=JobId(digest[:24] + new_job_id()[24:]))
    assert older.key == digest[:24]
    await records._put(older)
    (again,) = await submit(one, new_job(served, row(1), key="old"))
    assert again["id"] == older.id
    assert (await one.gateway.jobs.get(TENANT, older.id))["id"] == older.id


def claimed(record: JobRecord) -> JobRecord:
    return msgspec.structs.replace(record, bundle="", storing=record.bundle)


async def put_as_before(running: Services, record: JobRecord, length: int) -> None:
    """As gateways stored records when a record's key was so much of its job's id; the oldest know no field ``storing``."""
    bus, fields = running.bus, msgspec.to_builtins(record)
    if length == len(record.id):
        del fields["storing"]
    subject = bus.names.bucket_key("jobs", record.id[:length])
    frame = bus.signer.sign_envelope(MessageType.RECORD, subject, codec.pack(fields))
    await bus.publish_acked(subject, frame, headers={"Nats-TTL": "600"})


@pytest.mark.parametrize("what", ["submit", "keyed", "batch", "get", "list", "cancel", "wait"])
async def test_what_is_asked_while_the_broker_restarts_waits_for_it(
    restartable: tuple[Broker, Services], what: str
) -> None:
    broker, running = restartable
    assert broker.server is not None
    served = await running.push("bump", models.add())
    (job,) = await submit(running, new_job(served, row(1), priority=Priority.LOW))
    await running.gateway.jobs.get(TENANT, job["id"], 20)
    await running.workers[0].holder.stop(1)
    (waiting,) = await submit(running, new_job(served, row(2)))
    jobs = running.gateway.jobs
    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        "submit": lambda: submit(running, new_job(served, row(3))),
        "keyed": lambda: submit(running, new_job(served, row(3), key="k")),
        "batch": lambda: submit(running, *[new_job(served, row(3), key=f"k{number}") for number in range(300)]),
        "get": lambda: jobs.get(TENANT, job["id"]),
        "list": lambda: jobs.list(TENANT, state="", model="", limit=10, cursor=""),
        "cancel": lambda: jobs.cancel(TENANT, waiting["id"]),
        "wait": lambda: jobs.get(TENANT, waiting["id"], 3.0),
    }
    await broker.server.kill()
    await wait_until(lambda: not running.bus.connected, "the gateway has noticed")
    task = asyncio.ensure_future(asked[what]())
    done, _ = await asyncio.wait({task}, timeout=0.3)
    assert not done
    await broker.server.start()
    assert await asyncio.wait_for(task, 20)
