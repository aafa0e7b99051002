"""Valid messages at the wrong place, for the wrong job, or a second time: refused, counted, and nothing changes."""

from __future__ import annotations

import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.crypto import MessageType, Signer
from tether.domain.job import Job, JobId, JobState, Outcome, Priority, new_job_id
from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import ResultConflict, VersionConflict
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.process.data_dir import load_identity
from tether.streams.job_queue import BusResults
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.wire import codec


def refused(code: str) -> float:
    return float(metrics.ENVELOPES_REJECTED.labels(code)._value.get())


def runs(model: str) -> float:
    return float(metrics.RUN_SECONDS.labels(model)._sum.get())


async def bump(running: Services) -> ResolvedVersion:
    return await running.push("bump", models.add())


async def captured(running: Services, served: ResolvedVersion) -> tuple[str, bytes, str]:
    """A job that ended, and the bundle that carried it, as it lay in its lane."""
    lane = served.job_lane(Priority.NORMAL)
    got: list[Delivery] = []
    await running.workers[0].holder.stop(1)
    pull = LaneConsumer(running.workers[0]._bus, lane, 1, got.append)
    await pull.start()
    (job,) = await running.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    await wait_until(lambda: bool(got), "the bundle was seen")
    await pull.stop()
    await got[0].give_back()
    await running.start_worker("worker-2")
    done = await running.gateway.jobs.get(TENANT, job["id"], 20)
    assert done["state"] == "succeeded"
    return job["id"], got[0].frame, got[0].subject


async def test_a_bundle_counts_only_in_its_own_lane(one: Services) -> None:
    served = await bump(one)
    job, frame, subject = await captured(one, served)
    elsewhere = one.bus.names.lane(served.job_lane(Priority.HIGH))
    assert elsewhere != subject
    before, ran = refused("subject_mismatch"), runs("bump")
    await one.bus.publish_acked(elsewhere, frame)
    await wait_until(lambda: refused("subject_mismatch") > before, "it was refused")
    assert (await one.gateway.jobs.get(TENANT, job))["state"] == "succeeded"
    assert runs("bump") == ran
    assert await queued(one, elsewhere) == 0


async def queued(running: Services, subject: str) -> int:
    """Messages that wait in a lane or are in a worker's hands."""
    assert running.dispatcher is not None
    stream = running.bus.names.jobs_stream(0)
    info = await running.dispatcher._bus.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
    return sum((info["state"].get("subjects") or {}).values())


async def test_a_bundle_of_jobs_that_ended_runs_no_second_time(one: Services) -> None:
    served = await bump(one)
    job, frame, subject = await captured(one, served)
    done, ran, stored = await one.gateway.jobs.get(TENANT, job), runs("bump"), await results(one, job)
    await one.bus.publish_acked(subject, frame)
    await wait_until_async(one, subject)
    assert runs("bump") == ran
    assert await one.gateway.jobs.get(TENANT, job) == done
    assert await results(one, job) == stored


async def results(running: Services, job: str) -> dict[str, bytes]:
    return await BusResults(running.bus).find([job])


async def wait_until_async(running: Services, subject: str) -> None:
    async def empty() -> bool:
        return await queued(running, subject) == 0

    await wait_until(empty, "the lane is worked off")


async def test_a_bundle_whose_time_is_over_and_whose_result_is_forgotten_does_not_run(one: Services) -> None:
    """The result of a job outlives its deadline, so what comes after that is late by its own deadline."""
    served = await bump(one)
    subject = one.bus.names.lane(served.job_lane(Priority.NORMAL))
    job = Job(new_job_id(), TENANT, (from_numpy("x", row(1)),), one.bus.clock.utc() - 1)
    frame = one.bus.signer.sign_envelope(MessageType.JOB, subject, codec.encode_jobs([job]), jobs=(job.id,))
    ran = runs("bump")
    await one.bus.publish_acked(subject, frame)
    await wait_until_async(one, subject)
    assert runs("bump") == ran
    (stored,) = codec.decode_outcomes(
        one.bus.verify_or_raise(
            (await results(one, job.id))[job.id], one.bus.names.result(job.id), MessageType.RESULT
        ).body
    )
    assert stored.state is JobState.EXPIRED


async def test_a_waiting_request_that_is_sent_again_later_is_expired_or_answered_to_nobody(one: Services) -> None:
    served = await bump(one)
    subject, reply = one.bus.names.lane(served.infer_lane), one.gateway._bundler.reply
    job = Job(new_job_id(), TENANT, (from_numpy("x", row(1)),), one.bus.clock.utc() + 30)
    body = codec.encode_jobs([job])

    def frame(expires_at: int) -> bytes:
        return one.bus.signer.sign_envelope(
            MessageType.INFER, subject, body, reply=reply, jobs=(job.id,), expires_at=expires_at
        )

    before, ran = refused("expired"), runs("bump")
    # the worker's clock is behind by as long as the answer to its registration took, which is at most 2 s
    await one.bus.publish_acked(subject, frame(one.bus.clock.utc_ms() - 3000))
    await wait_until(lambda: refused("expired") > before, "it is expired")
    assert runs("bump") == ran
    late = metrics.ANSWERS_LATE._value.get()
    await one.bus.publish_acked(subject, frame(int(job.deadline * 1000)))
    await wait_until(lambda: metrics.ANSWERS_LATE._value.get() > late, "nobody waited for the answer")


# results


async def held(running: Services) -> str:
    """A job that nobody runs."""
    served = await bump(running)
    await running.workers[0].holder.stop(1)
    (job,) = await running.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    return str(job["id"])


def outcome(job: str, attempts: int = 1) -> Outcome:
    return Outcome(JobId(job), JobState.SUCCEEDED, (from_numpy("y", row(9)),), None, attempts, "worker-1", 1.0, 2.0)


@pytest.mark.parametrize(
    "how", ["another job's outcome", "another job in the header", "another attempt in the header", "two outcomes"]
)
async def test_a_result_that_is_not_that_of_its_job_and_attempt_does_not_count(one: Services, how: str) -> None:
    job = await held(one)
    bus, subject = one.workers[0]._bus, one.bus.names.result(job)
    ends, header, attempt = [outcome(job)], job, 1
    if how == "another job's outcome":
        ends = [outcome("f" * 32)]
    elif how == "another job in the header":
        header = "f" * 32
    elif how == "another attempt in the header":
        attempt = 2
    else:
        ends = [outcome(job), outcome(job)]
    body = codec.encode_outcomes(ends)
    frame = bus.signer.sign_envelope(MessageType.RESULT, subject, body, jobs=(header,), attempt=attempt)
    before, shown = refused(ResultConflict.code), await one.gateway.jobs.get(TENANT, job)
    assert await BusResults(bus).commit(job, frame)
    assert await one.gateway.jobs.get(TENANT, job) == shown
    assert refused(ResultConflict.code) == before + 1


async def test_a_result_moved_from_another_job_does_not_count(one: Services) -> None:
    job, bus = await held(one), one.workers[0]._bus
    other = "f" * 32
    body = codec.encode_outcomes([outcome(other)])
    frame = bus.signer.sign_envelope(MessageType.RESULT, bus.names.result(other), body, jobs=(other,), attempt=1)
    before = refused("subject_mismatch")
    await bus.publish_acked(bus.names.result(job), frame)
    assert (await one.gateway.jobs.get(TENANT, job))["state"] == "queued"
    assert refused("subject_mismatch") > before


async def test_a_job_that_ended_takes_no_second_result(one: Services) -> None:
    served = await bump(one)
    (job,) = await one.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    done = await one.gateway.jobs.get(TENANT, job["id"], 20)
    bus, subject = one.workers[0]._bus, one.bus.names.result(job["id"])
    body = codec.encode_outcomes([outcome(job["id"], 2)])
    frame = bus.signer.sign_envelope(MessageType.RESULT, subject, body, jobs=(job["id"],), attempt=2)
    with pytest.raises(ResultConflict):
        await bus.publish_acked(subject, frame)
    assert await one.gateway.jobs.get(TENANT, job["id"]) == done


# key-value entries


async def test_an_entry_that_is_put_back_or_copied_does_not_count(one: Services) -> None:
    """A tenant's stricter record is replaced by the older, looser one, byte for byte as it was signed."""
    tenants = one.gateway.tenants
    raw = KvBucket(one.bus, "tenants")
    await tenants.store(Tenant("lab", models=("*",)))
    loose = await raw.get("lab")
    assert loose is not None
    await tenants.store(Tenant("lab", models=("x-*",)))
    strict = tenants.get("lab")
    for key in ("lab", "other"):
        before = refused("stale_entry")
        await raw.put(key, loose)
        await wait_until(lambda before=before: refused("stale_entry") > before, "it was refused")
        assert (tenants.get("lab"), tenants.find("other")) == (strict, None)
        assert await tenants.bucket.get(key) is None
    await tenants.store(Tenant("lab", models=("y-*",)))
    assert await tenants.bucket.entries() == {"lab": codec.encode(Tenant("lab", models=("y-*",)))}


async def test_a_writer_whose_clock_is_behind_still_replaces(one: Services) -> None:
    bus = one.bus
    behind = load_identity(one.home.identity("gateway"))
    ahead, late = SignedBucket(bus, "tenants", MessageType.TENANT), SignedBucket(bus, "tenants", MessageType.TENANT)
    seen: dict[str, bytes | None] = {}
    async with SignedBucket(bus, "tenants", MessageType.TENANT).watch(seen.__setitem__):
        await ahead.put("lab", b"1")
        signer, bus.signer = bus.signer, Signer(behind, lambda: bus.clock.utc_ms() - 20_000)
        try:
            await late.put("lab", b"2")
            await wait_until(lambda: seen.get("lab") == b"2", "the watcher follows")
            await late.put("lab", b"3")
        finally:
            bus.signer = signer
        await wait_until(lambda: seen.get("lab") == b"3", "and again")
        await ahead.put("lab", b"4")
        await wait_until(lambda: seen.get("lab") == b"4", "and the other writer")


async def test_of_two_writers_at_once_the_one_who_comes_second_writes_last(one: Services) -> None:
    bucket = SignedBucket(one.bus, "tenants", MessageType.TENANT)
    latest = await bucket.latest("lab")
    await bucket.put("lab", b"1")
    with pytest.raises(VersionConflict):
        await bucket.replace("lab", b"2", latest)
    assert await bucket.get("lab") == b"1"
