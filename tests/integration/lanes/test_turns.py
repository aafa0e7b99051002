"""Who waits for whom in a worker: the order of runs as the model itself saw it, and what a busy worker leaves to others."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from support.brokers.brokers import Broker, wait_until
from support.brokers.stored import count
from support.models import bundles
from support.platform.services import TENANT, Services, new_job, row, services

from tether.domain.job import Priority
from tether.errors import BrokerUnavailable
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.worker.jobs.version_server import VersionServer

pytestmark = pytest.mark.usefixtures("unconfined")

CODE = """
import os
import time
import numpy as np


class Model:
    def load(self, directory):
        self.worker = 2 if "worker-2" in str(directory) else 1

    def predict(self, inputs):
        for value in inputs["x"][:, 0]:
            open(f"{FOLDER}/run-{time.monotonic_ns():020}-{int(value)}", "a").close()
            end = time.monotonic() + EACH
            while time.monotonic() < end or os.path.exists(f"{FOLDER}/hold-{int(value)}"):
                time.sleep(0.005)
        return {"y": np.full_like(inputs["x"], self.worker)}
"""
"""Writes down what it runs, one job at a time; a job runs for as long as a file with its name is there."""


class Gate:
    """A model that is not batched, and a folder that it looks into and writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    async def push(self, running: Services, *, each_s: float = 0.0) -> ResolvedVersion:
        code = CODE.replace("FOLDER", repr(str(self.folder))).replace("EACH", str(each_s))
        bundle = bundles.write(self.folder / "bundle", code=code, maxBatchSize=0)
        served = await running.push_bundle("gate", bundle)
        for run in self.folder.glob("run-*"):
            run.unlink()
        return served

    def hold(self, value: int) -> None:
        (self.folder / f"hold-{value}").touch()

    def release(self, value: int) -> None:
        (self.folder / f"hold-{value}").unlink()

    @property
    def runs(self) -> list[int]:
        """The jobs that began, in order."""
        return [int(path.name.rsplit("-", 1)[1]) for path in sorted(self.folder.glob("run-*"))]

    async def began(self, value: int) -> None:
        await wait_until(lambda: value in self.runs, f"{value} runs", 30)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


async def submit(
    running: Services, served: ResolvedVersion, values: range, priority: Priority = Priority.NORMAL
) -> list[str]:
    jobs = [new_job(served, row(value), priority=priority) for value in values]
    return [job["id"] for job in await running.gateway.jobs.submit(TENANT, jobs)]


async def ended(running: Services, ids: list[str]) -> list[int]:
    """The workers that ran the jobs, each at the first attempt."""
    jobs = await running.gateway.jobs.get_many(TENANT, ids, 60)
    assert [(job["state"], job["attempts"]) for job in jobs] == [("succeeded", 1)] * len(ids)
    return [int(job["result"]["outputs"][0]["data"][0]) for job in jobs]


def instance(running: Services, worker: int = 0) -> VersionServer:
    (held,) = running.workers[worker].holder._held.values()
    return held.instance


async def in_stream(running: Services) -> bool:
    """Whether a caller's message is at the broker, where it stays until it is answered."""
    assert running.dispatcher is not None
    return await count(running.dispatcher._bus, running.bus.names.infer_stream(0)) == 1


def handed_back() -> float:
    return REGISTRY.get_sample_value("tether_handed_back_total", {"model": "gate"}) or 0.0


async def test_whoever_waits_beside_a_batch_waits_for_one_run(one: Services, gate: Gate) -> None:
    """100 low jobs in one message, and a caller, a high and a normal job that come while the first of them runs."""
    served = await gate.push(one)
    gate.hold(0)
    low = await submit(one, served, range(100), Priority.LOW)
    await gate.began(0)
    normal = await submit(one, served, range(300, 301))
    high = await submit(one, served, range(200, 201), Priority.HIGH)
    caller = asyncio.create_task(one.infer(served, row(400), timeout_s=30))
    await wait_until(lambda: in_stream(one), "the caller waits")
    gate.release(0)
    await caller
    await ended(one, [*high, *normal, *low])
    assert gate.runs[:4] == [0, 400, 200, 300]
    assert gate.runs[4:] == list(range(1, 100)), "the batch goes on in its order"


async def has_states(running: Services, ids: list[str], states: list[str]) -> bool:
    return [job["state"] for job in await running.gateway.jobs.get_many(TENANT, ids, 0)] == states


async def test_results_are_there_as_soon_as_each_run_has_ended(one: Services, gate: Gate) -> None:
    served = await gate.push(one)
    gate.hold(3)
    ids = await submit(one, served, range(5))
    await gate.began(3)
    assert await ended(one, ids[:3]) == [1, 1, 1]
    await wait_until(lambda: has_states(one, ids[3:], ["running", "running"]), "the bundle is noted as running")
    gate.release(3)
    await ended(one, ids)


async def test_priorities_are_strict_where_jobs_cannot_be_joined(one: Services, gate: Gate) -> None:
    """Each job is a message of its own, in any order: all high ones run before all normal ones, and those before the low."""
    served = await gate.push(one, each_s=0.01)
    gate.hold(1000)
    first = await submit(one, served, range(1000, 1001), Priority.LOW)
    await gate.began(1000)
    ids = []
    for value in range(12):
        for offset, priority in ((200, Priority.LOW), (100, Priority.NORMAL), (0, Priority.HIGH)):
            ids += await submit(one, served, range(offset + value, offset + value + 1), priority)
    gate.release(1000)
    await ended(one, [*first, *ids])
    assert [value // 100 for value in gate.runs] == [10, *[0] * 12, *[1] * 12, *[2] * 12]


async def test_low_jobs_get_a_run_now_and_then_however_many_callers_come(broker: Broker, gate: Gate) -> None:
    async with services(broker, workers=0) as running:
        await running.start_worker("worker-1", priority_patience_s=0.3)
        served = await gate.push(running, each_s=0.02)
        low, stop = await submit(running, served, range(1, 4), Priority.LOW), asyncio.Event()

        async def call() -> None:
            while not stop.is_set():
                await running.infer(served, row(100), timeout_s=30)

        callers = [asyncio.create_task(call()) for _ in range(6)]
        await ended(running, low)
        stop.set()
        await asyncio.gather(*callers)
        order = [value for value in gate.runs if value < 100]
        places = [gate.runs.index(value) for value in (1, 2, 3)]
        assert order == [1, 2, 3]
        assert min(later - sooner for sooner, later in pairwise(places)) > 1, "callers come first"


@pytest.mark.parametrize("kind", ["callers", "jobs"])
async def test_nobody_waits_behind_a_long_job_while_another_worker_is_idle(
    broker: Broker, gate: Gate, kind: str
) -> None:
    """The model is quick as a rule, so the worker asks ahead; then one job takes very long."""
    async with services(broker, workers=2) as running:
        served = await gate.push(running)
        await ended(running, await submit(running, served, range(100, 140)))
        gate.hold(1)
        long = await submit(running, served, range(1, 2))
        await gate.began(1)
        if kind == "callers":
            found = [int((await running.infer(served, row(value), timeout_s=20))[0, 0]) for value in range(2, 18)]
        else:
            found = await ended(
                running,
                [job for value in range(2, 18) for job in await submit(running, served, range(value, value + 1))],
            )
        busy = {1, 2} - set(found)
        gate.release(1)
        assert busy == set(await ended(running, long)), "all of them ran on the other worker"


async def test_what_a_busy_worker_hands_back_is_joined_elsewhere_and_not_suspected(
    broker: Broker, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held messages when a run turned out to be long: another worker that comes later has them at once, as if new."""
    # on a machine so busy that no run is quick the worker asks ahead too, and is not soon aware that a run is long
    for module in ("scheduling.pull_pace", "jobs.lane_pulls"):
        monkeypatch.setattr(f"tether.worker.{module}.AHEAD_S", 1.0)
    async with services(broker, workers=1) as running:
        served = await gate.push(running, each_s=0.001)
        await ended(running, await submit(running, served, range(100, 140)))
        before, again = handed_back(), REGISTRY.get_sample_value("tether_redelivered_total", {"model": "gate"})
        gate.hold(1)
        ids = await submit(running, served, range(1, 2))
        for value in range(2, 10):
            ids += await submit(running, served, range(value, value + 1))
        await gate.began(1)
        await wait_until(lambda: handed_back() > before, "what waits is handed back")
        states = ["running"] + ["queued"] * 8
        await wait_until(lambda: has_states(running, ids, states), "the first one is noted as running")
        await running.start_worker("worker-2")
        assert await ended(running, ids[1:]) == [2] * 8
        gate.release(1)
        await ended(running, ids)
        assert REGISTRY.get_sample_value("tether_redelivered_total", {"model": "gate"}) == again


async def test_the_rest_of_a_batch_goes_elsewhere_when_more_urgent_work_does_not_end(
    broker: Broker, gate: Gate
) -> None:
    async with services(broker, workers=1) as running:
        served = await gate.push(running)
        gate.hold(0)
        batch = await submit(running, served, range(20), Priority.LOW)
        await gate.began(0)
        gate.hold(500)
        urgent = await submit(running, served, range(500, 501), Priority.HIGH)
        gate.release(0)
        await gate.began(500)
        await wait_until(lambda: not len(instance(running).queue), "the batch is handed back")
        await running.start_worker("worker-2")
        workers = await ended(running, batch)
        assert (workers[0], set(workers[1:])) == (1, {2})
        gate.release(500)
        await ended(running, urgent)
        assert sorted(gate.runs) == [*range(20), 500], "nothing ran twice"


async def test_a_batch_of_long_jobs_is_cut_so_that_workers_share_it(broker: Broker, gate: Gate) -> None:
    """Once it is known how long a job runs; also by a gateway that has seen no answer of it."""
    async with services(broker, workers=2) as running:
        served = await gate.push(running, each_s=0.03)
        lane = served.job_lane(Priority.NORMAL, "shared")
        await ended(running, await submit(running, served, range(3)))
        await wait_until(lambda: running.gateway.catalog.job_s(lane) > 0.02, "the gateway knows how long a job runs")
        workers = await ended(running, await submit(running, served, range(100, 132)))
        assert min(workers.count(1), workers.count(2)) >= 8, "in one bundle one of them would have all"


@pytest.mark.parametrize("noted", [True, False])
async def test_a_worker_that_stops_hands_the_rest_of_a_batch_to_another_at_once(
    broker: Broker, gate: Gate, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """Not when it has run all of it, not when its drain time is over; and job by job only where its note is missing."""

    async def lost(*_: object) -> None:
        raise BrokerUnavailable("away for a moment")

    async with services(broker, workers=1) as running:
        served = await gate.push(running)
        gate.hold(1)
        ids = await submit(running, served, range(40))
        await gate.began(1)
        await running.start_worker("worker-2")
        await wait_until(lambda: bool(running.workers[1].holder.ready()), "the other one holds it")
        first = instance(running)
        if not noted:
            monkeypatch.setattr(first.redelivery, "_put", lost)
        stopping = asyncio.create_task(running.workers[0].holder.stop(30))
        await wait_until(lambda: not len(first.queue), "it begins no more")
        gate.release(1)
        jobs = await running.gateway.jobs.get_many(TENANT, ids, 60)
        await stopping
        found = [(int(job["result"]["outputs"][0]["data"][0]), job["attempts"]) for job in jobs]
        assert found == [(1, 1)] * 2 + [(2, 1 if noted else 2)] * 38
        assert gate.runs == list(range(40))
