"""Durable jobs: accepted once, run, fenced, cancelled, expired, buried."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import bundles, models
from support.platform.services import TENANT, Services, new_job, row

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.domain.job import SHARED, STORED_S, AttemptNote, JobId, JobState, Lane, Outcome, Priority
from tether.domain.manifest import ModelRef
from tether.domain.tensor import from_numpy, to_numpy
from tether.errors import BadTensor, IdempotencyConflict, JobNotFound, ResultConflict
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.streams.job_queue import BusResults
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.wire import codec, oip


async def bump(running: Services) -> ResolvedVersion:
    return await running.push("bump", models.add())


async def submit(running: Services, *jobs: object) -> list[str]:
    shown = await running.gateway.jobs.submit(TENANT, jobs)  # type: ignore[arg-type]
    return [job["id"] for job in shown]


def output(job: dict[str, object]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    (tensor,) = oip.tensors_from_json(job["result"]["outputs"])  # type: ignore[index]
    return to_numpy(tensor)


class Thief:
    """Takes one bundle of a lane and keeps it."""

    def __init__(self, bus: Bus, lane: Lane) -> None:
        self.got: list[Delivery] = []
        self.pull = LaneConsumer(bus, lane, 1, self.got.append)


async def test_jobs_are_run_and_their_results_kept(one: Services) -> None:
    served = await bump(one)
    ids = await submit(one, *[new_job(served, row(number)) for number in range(300)])
    assert len(set(ids)) == 300
    for start in range(0, 300, 100):
        for offset, job in enumerate(await one.gateway.jobs.get_many(TENANT, ids[start : start + 100], 20)):
            assert job["state"] == "succeeded"
            assert job["attempts"] == 1
            assert np.array_equal(output(job), row(start + offset + 1))
            assert job["submitted_at"] <= job["started_at"] <= job["finished_at"]


async def test_a_job_that_is_not_valid_queues_none_of_its_batch(one: Services) -> None:
    served = await bump(one)
    with pytest.raises(BadTensor):
        await submit(one, new_job(served, row(1)), new_job(served, np.ones((1, 3), np.float32)))
    assert await one.gateway.jobs.list(TENANT, state="", model="", limit=10, cursor="") == ([], None)


async def test_the_same_key_is_the_same_job_also_after_a_restart(restartable: tuple[Broker, Services]) -> None:
    broker, running = restartable
    assert broker.server is not None
    served = await bump(running)
    (first,) = await submit(running, new_job(served, row(1), key="k"))
    done = await running.gateway.jobs.get(TENANT, first, 20)
    assert done["state"] == "succeeded"
    await broker.server.kill()
    await broker.server.start()
    assert await running.bus.wait_connected(5)
    (again,) = await running.gateway.jobs.submit(TENANT, [new_job(served, row(1), key="k")])
    assert (again["id"], again["state"], again["finished_at"]) == (first, "succeeded", done["finished_at"])
    with pytest.raises(IdempotencyConflict):
        await submit(running, new_job(served, row(2), key="k"))


async def test_another_tenants_job_is_not_there(one: Services) -> None:
    served = await bump(one)
    (job_id,) = await submit(one, new_job(served, row(1)))
    with pytest.raises(JobNotFound):
        await one.gateway.jobs.get("other", job_id)
    with pytest.raises(JobNotFound):
        await one.gateway.jobs.cancel("other", job_id)
    for nonsense in ("", "x" * 32, "a.*", ">", "../x"):
        with pytest.raises(JobNotFound):
            await one.gateway.jobs.get(TENANT, nonsense)


async def test_a_cancelled_job_never_runs_and_stays_cancelled(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    cancelled, kept = await submit(one, new_job(served, row(1)), new_job(served, row(2)))
    assert (await one.gateway.jobs.cancel(TENANT, cancelled))["state"] == "cancelled"
    with pytest.raises(ResultConflict):
        await one.gateway.jobs.cancel(TENANT, cancelled)
    await one.start_worker("worker-2")
    assert (await one.gateway.jobs.get(TENANT, kept, 20))["state"] == "succeeded"
    job = await one.gateway.jobs.get(TENANT, cancelled)
    assert (job["state"], job["attempts"], "result" in job) == ("cancelled", 0, False)


async def test_a_bundle_that_was_stored_while_its_worker_listened_is_not_asked_about(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateways tell workers of cancelled jobs; one that has listened since before a bundle was stored knows them all."""
    served = await bump(one)
    instance = one.workers[0].holder._held[ModelRef("bump", served.manifest.version)].instance
    asked: list[str] = []
    ended = BusResults.ended

    async def noted(self: BusResults, jobs: Sequence[str], *, pool: str = SHARED) -> set[str]:
        asked.extend(jobs)
        return await ended(self, jobs, pool=pool)

    async def done(value: int) -> str:
        (job,) = await submit(one, new_job(served, row(value)))
        assert (await one.gateway.jobs.get(TENANT, job, 20))["state"] == "succeeded"
        return job

    monkeypatch.setattr(BusResults, "ended", noted)
    assert asked == [first := await done(1)]
    instance._withdrawn._since = 0.0
    await done(2)
    assert asked == [first]
    one.workers[0]._bus.begin_again()
    await wait_until(lambda: instance._withdrawn._since > 0.0, "it listens again")
    assert asked == [first, await done(3)]


async def test_a_job_expires_when_nobody_runs_it_in_time(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    (job_id,) = await submit(one, new_job(served, row(1), deadline_s=0.2))
    job = await one.gateway.jobs.get(TENANT, job_id, 10)
    assert (job["state"], job["error"]["code"]) == ("expired", "deadline_exceeded")
    await one.start_worker("worker-2")
    (later,) = await submit(one, new_job(served, row(2)))
    assert (await one.gateway.jobs.get(TENANT, later, 20))["state"] == "succeeded"
    assert (await one.gateway.jobs.get(TENANT, job_id))["state"] == "expired"


async def test_a_model_that_refuses_its_input_fails_only_that_job(one: Services) -> None:
    served = await one.push("gather", models.gather(), max_batch_size=8)
    arrays = [np.full((1, 1), value, dtype=np.int64) for value in (0, 99, 1)]
    ids = await submit(one, *[new_job(served, array) for array in arrays])
    jobs = await one.gateway.jobs.get_many(TENANT, ids, 20)
    assert [job["state"] for job in jobs] == ["succeeded", "failed", "succeeded"]
    assert jobs[1]["error"]["code"] == "inference_failed"


async def test_jobs_outlive_a_killed_broker(restartable: tuple[Broker, Services]) -> None:
    broker, running = restartable
    assert broker.server is not None
    served = await bump(running)
    await running.workers[0].holder.stop(1)
    ids = await submit(running, *[new_job(served, row(number)) for number in range(100)])
    await broker.server.kill()
    await broker.server.start()
    await running.start_worker("worker-2")
    jobs = await running.gateway.jobs.get_many(TENANT, ids, 30)
    assert {job["state"] for job in jobs} == {"succeeded"}


async def test_what_a_dead_worker_held_is_run_again_with_attempt_two(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    thief = Thief(one.workers[0]._bus, served.job_lane(Priority.NORMAL))
    await thief.pull.start()
    ids = await submit(one, *[new_job(served, row(number)) for number in range(3)])
    await wait_until(lambda: bool(thief.got), "the thief holds a bundle")
    await thief.pull.stop()
    await thief.got[0].give_back()
    await one.start_worker("worker-2")
    jobs = await one.gateway.jobs.get_many(TENANT, ids, 30)
    assert {(job["state"], job["attempts"]) for job in jobs} == {("succeeded", 2)}


async def test_a_job_that_keeps_killing_its_worker_is_buried_and_its_neighbours_live(one: Services) -> None:
    """Worker after worker died while this job ran alone: their notes say so."""
    served = await bump(one)
    bus, lane = one.workers[0]._bus, served.job_lane(Priority.NORMAL)
    await one.workers[0].holder.stop(1)
    thief = Thief(bus, lane)
    await thief.pull.start()
    ids = await submit(one, *[new_job(served, row(number)) for number in range(3)])
    await wait_until(lambda: bool(thief.got), "the thief holds the bundle")
    await thief.pull.stop()
    note = AttemptNote(one.settings.max_attempts, "worker-1", bus.clock.utc())
    await SignedBucket(bus, "attempts", MessageType.ATTEMPT).put(bus.names.attempt_key(ids[1]), codec.encode(note))
    await thief.got[0].give_back()
    await one.start_worker("worker-2")
    jobs = await one.gateway.jobs.get_many(TENANT, ids, 30)
    assert [job["state"] for job in jobs] == ["succeeded", "dead", "succeeded"]
    assert jobs[1]["error"]["code"] == "attempts_exhausted"
    letter = await buried(one, lane)
    assert letter["job"] == ids[1]
    assert letter["frame"] == thief.got[0].frame


async def buried(running: Services, lane: Lane) -> dict[str, object]:
    """The dead letter of a lane, verified."""
    bus, subject = running.bus, running.bus.names.dead(lane)
    found = (await bus.direct_batch(bus.names.dead_stream, [subject]))[subject]
    envelope = bus.verify_frame(found.data, subject, MessageType.DEAD)
    assert envelope is not None
    letter: dict[str, object] = codec.unpack(envelope.body)
    return letter


async def test_a_late_result_changes_nothing(one: Services) -> None:
    served = await bump(one)
    (job_id,) = await submit(one, new_job(served, row(1)))
    before = await one.gateway.jobs.get(TENANT, job_id, 20)
    bus = one.workers[0]._bus
    late = Outcome(JobId(job_id), JobState.SUCCEEDED, (from_numpy("y", row(99)),), None, 2, "worker-1", 1.0, 2.0)
    subject = bus.names.result(job_id)
    frame = bus.signer.sign_envelope(MessageType.RESULT, subject, codec.encode_outcomes([late]), jobs=(job_id,))
    assert not await BusResults(bus).commit(job_id, frame)
    assert await one.gateway.jobs.get(TENANT, job_id) == before


async def test_a_gateway_cannot_make_a_job_succeed(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    (job_id,) = await submit(one, new_job(served, row(1)))
    forged = Outcome(JobId(job_id), JobState.SUCCEEDED, (from_numpy("y", row(9)),), None, 1, "gateway", 1.0, 2.0)
    subject = one.bus.names.result(job_id)
    frame = one.bus.signer.sign_envelope(MessageType.RESULT, subject, codec.encode_outcomes([forged]), jobs=(job_id,))
    assert await BusResults(one.bus).commit(job_id, frame)
    assert (await one.gateway.jobs.get(TENANT, job_id))["state"] != "succeeded"


async def test_lists_are_newest_first_filtered_and_paged(one: Services) -> None:
    served = await bump(one)
    ids = []
    for number in range(7):
        ids += await submit(one, new_job(served, row(number)))
    await one.gateway.jobs.get_many(TENANT, ids, 20)
    page, cursor = await one.gateway.jobs.list(TENANT, state="", model="", limit=3, cursor="")
    assert [job["id"] for job in page] == ids[:3:-1]
    assert cursor is not None
    rest, end = await one.gateway.jobs.list(TENANT, state="succeeded", model="bump", limit=10, cursor=cursor)
    assert [job["id"] for job in rest] == ids[3::-1]
    assert end is None
    assert await one.gateway.jobs.list(TENANT, state="dead", model="", limit=10, cursor="") == ([], None)
    assert await one.gateway.jobs.list("other", state="", model="", limit=10, cursor="") == ([], None)


async def test_jobs_of_every_priority_have_a_lane_and_are_run(one: Services) -> None:
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    (low,) = await submit(one, new_job(served, row(1), priority=Priority.LOW))
    (high,) = await submit(one, new_job(served, row(2), priority=Priority.HIGH))
    (normal,) = await submit(one, new_job(served, row(3)))
    await one.start_worker("worker-2")
    jobs = await asyncio.gather(*[one.gateway.jobs.get(TENANT, job, 20) for job in (low, high, normal)])
    assert [job["priority"] for job in jobs] == ["low", "high", "normal"]
    assert {job["state"] for job in jobs} == {"succeeded"}


WAITS = """
import time
from pathlib import Path


class Model:
    def load(self, directory):
        self.folder = Path(FOLDER)

    def predict(self, inputs):
        while (self.folder / "hold").exists():
            (self.folder / "begun").touch()
            time.sleep(0.01)
        return {"y": inputs["x"]}
"""
"""Runs for as long as a file is there."""


@pytest.mark.usefixtures("unconfined")
@pytest.mark.parametrize("looked_at", [True, False])
async def test_a_job_that_ends_after_its_deadline_is_expired_whoever_looks(
    one: Services, tmp_path: Path, looked_at: bool
) -> None:
    """It begins in time and runs for longer than it may."""
    code = WAITS.replace("FOLDER", repr(str(tmp_path)))
    served = await one.push_bundle("slow", bundles.write(tmp_path / "m", code=code, maxBatchSize=0))
    (tmp_path / "hold").touch()
    (job_id,) = await submit(one, new_job(served, row(1), deadline_s=3.0))
    await wait_until((tmp_path / "begun").exists, "it runs")
    if looked_at:
        await wait_until(lambda: has_state(one, job_id, "running"), "it is seen to run")
    (record,) = (await one.gateway.jobs._records.find([job_id])).values()
    await wait_until(lambda: one.workers[0]._bus.clock.utc() > record.deadline, "its time is over")
    (tmp_path / "hold").unlink()
    await wait_until(lambda: has_result(one, job_id), "its run is over")
    job = await one.gateway.jobs.get(TENANT, job_id)
    assert (job["state"], job["error"]["code"], "result" in job) == ("expired", "deadline_exceeded", False)
    assert job["attempts"] == 1
    assert job["started_at"] < job["finished_at"]


async def has_state(running: Services, job_id: str, state: str) -> bool:
    return bool((await running.gateway.jobs.get(TENANT, job_id))["state"] == state)


async def has_result(running: Services, job_id: str) -> bool:
    return bool(await running.gateway.jobs._results.find([job_id]))


async def test_a_result_that_was_stored_too_late_does_not_count_whoever_looks(one: Services) -> None:
    """Its worker's clock says that it was in time."""
    served = await bump(one)
    await one.workers[0].holder.stop(1)
    (job_id,) = await submit(one, new_job(served, row(1), deadline_s=0.1))
    (record,) = (await one.gateway.jobs._records.find([job_id])).values()
    bus = one.workers[0]._bus
    await wait_until(lambda: bus.clock.utc() > record.deadline + STORED_S, "nobody may end it in time any more")
    at = record.deadline - 0.05
    end = Outcome(JobId(job_id), JobState.SUCCEEDED, (from_numpy("y", row(2)),), None, 1, "worker-1", at, at)
    subject = bus.names.result(job_id)
    frame = bus.signer.sign_envelope(
        MessageType.RESULT, subject, codec.encode_outcomes([end]), jobs=(job_id,), attempt=1
    )
    assert await BusResults(bus).commit(job_id, frame)
    job = await one.gateway.jobs.get(TENANT, job_id)
    assert (job["state"], "result" in job) == ("expired", False)
