"""Results without room: no run and no caller waits for them, and every job ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import numpy as np
import pytest
from support.brokers.brokers import StartBroker, wait_until
from support.brokers.operators import reconfigure
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.bus.session import connect
from tether.domain.tensor import Array
from tether.errors import QueueFull, ResultConflict
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.streams.layout import ENDS
from tether.streams.usage import stream_use
from tether.worker.jobs import outcome_publisher
from tether.worker.jobs.commit_slots import SLOW_RUNS
from tether.worker.service import WorkerService


@pytest.fixture
async def short(start_broker: StartBroker) -> AsyncIterator[Services]:
    async with start_broker(max_file_mb=256) as broker, services(broker, workers=1) as running:
        yield running


@pytest.fixture(autouse=True)
def nobody_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when no dispatcher runs: what is stored stays, and so do the bounds that tests set."""

    async def nothing(*_: object) -> None:
        return

    monkeypatch.setattr("tether.dispatcher.jobs.retention.Retention.round", nothing)


async def bound(running: Services, room: int) -> None:
    """Let results have ``room`` bytes more than they have."""
    stream = running.bus.names.results_stream
    state = (await running.bus.api(f"STREAM.INFO.{stream}"))["state"]
    await reconfigure(running.home, running.settings, stream, max_bytes=max(1, state["bytes"] + room))


async def waiting_jobs(running: Services, served: ResolvedVersion, inputs: list[Array]) -> list[str]:
    """Jobs that were accepted while no worker took any."""
    await running.workers[0].holder.stop(1)
    requests = [new_job(served, one) for one in inputs]
    return [job["id"] for job in await running.gateway.jobs.submit(TENANT, requests)]


async def ends(running: Services, ids: list[str]) -> list[dict[str, object]]:
    return await running.gateway.jobs.get_many(TENANT, ids, 30)


def waits(worker: WorkerService) -> bool:
    return "are not stored yet" in worker.checks()["results"]


async def test_a_caller_is_answered_while_results_have_no_room(short: Services) -> None:
    """The ends of many more runs than a model has places wait, and each is stored once there is room."""
    served = await short.push("bump", models.add(), max_batch_size=1)
    ids = await waiting_jobs(short, served, [row(number) for number in range(3 * SLOW_RUNS)])
    await bound(short, 0)
    worker = await short.start_worker("worker-2")
    await wait_until(lambda: waits(worker), "the worker says that results are not stored")
    held = next(iter(worker.holder._held.values())).instance
    await wait_until(lambda: held._commit_slots.durable_full, "no durable job begins any more")
    for number in range(20):
        assert np.array_equal(await short.infer(served, row(number), timeout_s=10), row(number + 1))
    assert metrics.RESULTS_WAITING._value.get() >= SLOW_RUNS
    await wait_until(lambda: "are full" in short.gateway.readiness.checks()["results"], "the gateway says so")
    await bound(short, 1 << 20)
    assert {job["state"] for job in await ends(short, ids)} == {"succeeded"}
    await wait_until(lambda: worker.checks()["results"] == "ok", "nothing waits")
    assert metrics.RESULTS_WAITING._value.get() == 0
    assert not held._commit_slots.full(0)


async def test_outputs_without_room_end_their_job_as_failed_with_the_reason(
    short: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome_publisher, "ROOM_S", 0.5)
    served = await short.push("wide", models.add(width=4096), max_batch_size=1)
    wide = [np.full((1, 4096), number, np.float32) for number in range(3)]
    ids = await waiting_jobs(short, served, wide)
    await bound(short, 8192)
    await short.start_worker("worker-2")
    found = await ends(short, ids)
    assert {job["state"] for job in found} == {"failed"}
    for job in found:
        assert job["error"]["code"] == "storage_full"  # type: ignore[index]
        assert "max_file_mb" in job["error"]["message"]  # type: ignore[index]


async def test_a_job_that_was_ended_meanwhile_waits_no_longer(short: Services) -> None:
    """Its end came from elsewhere; the worker lets go of its own, which is refused for that and not for want of room."""
    served = await short.push("bump", models.add(), max_batch_size=1)
    (job,) = await waiting_jobs(short, served, [row(1)])
    await bound(short, 0)
    worker = await short.start_worker("worker-2")
    await wait_until(lambda: waits(worker), "its result waits")
    async with connect(short.settings, short.home, "admin") as admin:
        stream = short.bus.names.results_stream
        config = (await admin.api(f"STREAM.INFO.{stream}"))["config"]
        cancelling = asyncio.create_task(short.gateway.jobs.cancel(TENANT, job))
        await admin.api(f"STREAM.UPDATE.{stream}", {**config, "max_bytes": config["max_bytes"] + 1000})
    end: object = (await asyncio.gather(cancelling, return_exceptions=True))[0]
    await wait_until(lambda: worker.checks()["results"] == "ok", "the worker has let go")
    (found,) = await ends(short, [job])
    assert found["state"] == ("succeeded" if isinstance(end, ResultConflict) else "cancelled")


async def test_outputs_leave_room_for_ends_without(short: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dispatcher makes room. Outputs of 16 KiB fill the results, and every job after them ends all the same: as failed, with
    the reason."""
    monkeypatch.setattr(outcome_publisher, "ROOM_S", 0.5)
    served = await short.push("wide", models.add(width=4096), max_batch_size=1)
    room = 1 << 20
    fit, more = room // (16 << 10), 60
    wide = [np.full((1, 4096), number, np.float32) for number in range(fit + more)]
    ids = await waiting_jobs(short, served, wide)
    await bound(short, room)
    worker = await short.start_worker("worker-2")
    found = await ends(short, ids)
    states = Counter(job["state"] for job in found)
    assert set(states) == {"succeeded", "failed"}
    assert states["failed"] >= more
    codes = {job["error"]["code"] for job in found if job["state"] == "failed"}  # type: ignore[index]
    assert codes == {"storage_full"}
    assert worker.checks()["results"] == "ok", "none waits"
    use = await stream_use(short.bus, short.bus.names.results_stream)
    assert use is not None
    assert use.share > 1 - ENDS, "what was kept for ends is used by them"
    with pytest.raises(QueueFull, match="results of durable jobs fill"):
        await short.gateway.jobs.submit(TENANT, [new_job(served, wide[0])])
    await wait_until(lambda: "are full" in short.gateway.readiness.checks()["results"], "the gateway says so")
    assert np.array_equal(await short.infer(served, wide[1], timeout_s=10), wide[1] + 1), "callers are answered"
