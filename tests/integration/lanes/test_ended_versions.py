"""What becomes of jobs that wait for a version when it is deleted, and of its lanes: nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import bundles, models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.dispatcher import service as dispatcher_service
from tether.dispatcher.lanes import deleted_versions
from tether.domain.job import Lane, LaneKind, Priority
from tether.domain.manifest import Assignment, Change, ChangeRequest, ModelRef
from tether.domain.worker_protocol import EndedLanes
from tether.errors import ModelNotFound
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.streams.lane_admin import lanes_there, lanes_with_messages
from tether.wire import codec

GONE_S = 40.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes that stay empty go sooner than they would: after a fifth of the time."""
    monkeypatch.setattr(deleted_versions, "KEEP_S", deleted_versions.KEEP_S / 5)


async def two_versions(running: Services) -> tuple[ResolvedVersion, ResolvedVersion]:
    """Version 1, which no alias stands for, and version 2."""
    return await running.push("bump", models.add(1.0)), await running.push("bump", models.add(2.0))


async def delete(running: Services, version: int = 1, name: str = "bump") -> None:
    await running.change(ChangeRequest(Change.DELETE_VERSION, name, version=version, by="test"))


async def submit(
    running: Services, served: ResolvedVersion, count: int, priority: Priority = Priority.NORMAL
) -> list[str]:
    jobs = [new_job(served, row(number), priority=priority) for number in range(count)]
    return [job["id"] for job in await running.gateway.jobs.submit(TENANT, jobs)]


async def told(running: Services, ids: list[str]) -> set[tuple[str, str]]:
    """State and error code of jobs that have ended."""
    shown = await running.gateway.jobs.get_many(TENANT, ids, 40)
    return {(job["state"], job.get("error", {}).get("code", "")) for job in shown}


async def lanes(running: Services, version: int = 1) -> set[Lane]:
    """The lanes that the broker has of a version of ``bump``."""
    assert running.dispatcher is not None
    there = await lanes_there(running.dispatcher._bus)
    return {lane for lane in there if (lane.model, lane.version) == ("bump", version)}


async def no_lanes(running: Services) -> bool:
    return not await lanes(running)


async def test_jobs_that_wait_for_a_deleted_version_fail_at_once_and_its_lanes_go(one: Services) -> None:
    first, second = await two_versions(one)
    await one.workers[0].holder.stop(1)
    ids = [job for level in Priority for job in await submit(one, first, 40, level)]
    kept = await submit(one, second, 3)
    caller = asyncio.create_task(one.infer(first, row(1)))
    infer = Lane(LaneKind.INFER, "bump", 1)

    async def waiting() -> bool:
        assert one.dispatcher is not None
        return infer in await lanes_with_messages(one.dispatcher._bus) and not caller.done()

    await wait_until(waiting, "the caller waits")
    await delete(one)
    assert await told(one, ids) == {("failed", "model_not_found")}
    with pytest.raises(ModelNotFound, match="version 1 of model 'bump' was deleted while the job waited"):
        await caller
    shown = await one.gateway.jobs.get(TENANT, ids[0])
    assert shown["attempts"] == 0
    await wait_until(lambda: no_lanes(one), "its lanes are gone", GONE_S)
    assert len(await lanes(one, 2)) == 4
    catalog = one.gateway.catalog
    await wait_until(lambda: ("bump", 1, "shared") not in catalog._routes, "its route is gone", GONE_S)
    await one.start_worker("worker-2")
    assert await told(one, kept) == {("succeeded", "")}


async def test_what_is_published_after_the_lanes_are_gone_ends_all_the_same(one: Services) -> None:
    first, _ = await two_versions(one)
    await delete(one)
    await wait_until(lambda: no_lanes(one), "its lanes are gone", GONE_S)
    # as a gateway that hears of it very late
    one.gateway.catalog.require_lane = lambda *_: None  # type: ignore[method-assign]
    ids = await submit(one, first, 5)
    assert await told(one, ids) == {("failed", "model_not_found")}
    await wait_until(lambda: no_lanes(one), "its lanes are gone again", GONE_S)


@pytest.mark.usefixtures("unconfined")
async def test_a_job_that_runs_while_its_version_is_deleted_ends_on_it(one: Services, tmp_path: Path) -> None:
    gate, begun = tmp_path / "gate", tmp_path / "begun"
    gate.touch()
    code = bundles.CODE.replace(
        "        first =",
        f"        open({str(begun)!r}, 'a').close()\n"
        f"        while not os.path.exists({str(gate)!r}):\n            time.sleep(0.01)\n"
        "        first =",
        1,
    )
    served = await one.push_bundle("gated", bundles.write(tmp_path / "one", code=code))
    await one.push_bundle("gated", bundles.write(tmp_path / "two", bias=2.0, code=code))
    gate.unlink()
    begun.unlink(missing_ok=True)
    ids = await submit(one, served, 1)
    await wait_until(begun.exists, "it runs", 30)
    pulls = one.workers[0].holder._held[ModelRef("gated", 1)].instance._pulls
    assert all(pull._task for pull in pulls)
    await delete(one, name="gated")
    await wait_until(lambda: not any(pull._task for pull in pulls), "the worker asks for no more of its jobs")
    late = await submit(one, served, 3)
    assert await told(one, late) == {("failed", "model_not_found")}
    await wait_until(lambda: is_running(one, ids[0]), "it is noted as running")
    gate.touch()
    assert await told(one, ids) == {("succeeded", "")}


async def is_running(running: Services, job: str) -> bool:
    return bool((await running.gateway.jobs.get(TENANT, job))["state"] == "running")


async def test_a_dispatcher_goes_on_where_another_one_stopped_and_two_do_no_harm(broker: Broker) -> None:
    async with services(broker, workers=0) as before:
        first, _ = await two_versions(before)
        ids = await submit(before, first, 50)
        await delete(before)
    async with (
        services(broker, workers=0) as running,
        dispatcher_service.running(broker.settings, broker.home),
    ):
        await running.start_worker("worker-1")
        assert await told(running, ids) == {("failed", "model_not_found")}
        await wait_until(lambda: no_lanes(running), "its lanes are gone", GONE_S)
        second = running.gateway.catalog.resolve("bump", "2")
        assert await told(running, await submit(running, second, 3)) == {("succeeded", "")}


async def test_a_broker_that_dies_in_between_loses_no_job(embedded_broker: Broker) -> None:
    server = embedded_broker.server
    assert server is not None
    async with services(embedded_broker, workers=0) as running:
        first, second = await two_versions(running)
        ids = await submit(running, first, 200)
        await delete(running)
        await server.kill()
        await server.start()
        assert await running.bus.wait_connected(10)
        await running.start_worker("worker-1")
        assert await told(running, ids) == {("failed", "model_not_found")}
        await server.kill()
        await server.start()
        assert await running.bus.wait_connected(10)
        assert await told(running, await submit(running, second, 3)) == {("succeeded", "")}
        await wait_until(lambda: no_lanes(running), "its lanes are gone", GONE_S)


async def test_several_versions_are_deleted_at_once(one: Services) -> None:
    served = [await one.push("bump", models.add(float(number))) for number in range(4)]
    await one.workers[0].holder.stop(1)
    ids = [job for version in served[:3] for job in await submit(one, version, 10)]
    await asyncio.gather(*[delete(one, number) for number in (1, 2, 3)])
    assert await told(one, ids) == {("failed", "model_not_found")}


async def test_a_worker_ends_no_job_of_a_version_that_is_there_whatever_it_is_told(one: Services) -> None:
    first, _ = await two_versions(one)
    worker = one.workers[0]
    lie = Assignment(worker.name, worker._epoch, (), "shared", (EndedLanes("bump", 1, "local"),))
    worker.assigned(worker.name, codec.encode(lie))
    await wait_until(lambda: worker.holder.ready() == (), "it let go")
    ids = await submit(one, first, 5)
    asked = 0

    async def counted() -> bool:
        nonlocal asked
        asked += 1
        return asked > 60

    await wait_until(counted, "the lanes were looked at for a while")
    assert {job["state"] for job in await one.gateway.jobs.get_many(TENANT, ids, 0)} == {"queued"}
    honest = Assignment(worker.name, worker._epoch, (ModelRef("bump", 1),))
    worker.assigned(worker.name, codec.encode(honest))
    assert await told(one, ids) == {("succeeded", "")}
