"""What bounds a run of an ONNX model in the worker's own process: its time, its memory, its callers, an unload."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import numpy as np
import pytest
from support.brokers.brokers import StartBroker, wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row, services

from tether.domain.manifest import Isolation
from tether.domain.tensor import Array
from tether.errors import DeadlineExceeded, InferenceFailed, ResultTooLarge
from tether.frameworks.runtime import Endable
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import Warmup
from tether.worker.models.run_limits import RunWatch, memory_of
from tether.worker.runtimes.process_runtime import ProcessRuntime
from tether.worker.version_manager import HostedVersion

NEVER = np.array([1 << 60], np.int64)
LIMIT_MB = 200


@pytest.fixture
async def small(start_broker: StartBroker) -> AsyncIterator[Services]:
    """A worker whose runs may take little memory."""
    async with start_broker(run_memory_mb=LIMIT_MB) as broker, services(broker, workers=1) as running:
        yield running


@pytest.fixture
async def short(start_broker: StartBroker) -> AsyncIterator[Services]:
    """A worker whose runs may take a second, and give little."""
    async with (
        start_broker(run_timeout_s=1.0, run_memory_mb=LIMIT_MB, shutdown_timeout_s=0.2) as broker,
        services(broker, workers=1) as running,
    ):
        yield running


@pytest.fixture
async def patient(start_broker: StartBroker) -> AsyncIterator[Services]:
    """A worker whose runs may take an hour."""
    async with (
        start_broker(run_timeout_s=3600.0, shutdown_timeout_s=0.2) as broker,
        services(broker, workers=1) as running,
    ):
        yield running


def watch(running: Services) -> RunWatch:
    return running.workers[0].holder.watch


def held(running: Services, name: str) -> HostedVersion:
    (found,) = [one for ref, one in running.workers[0].holder._held.items() if ref.model == name]
    return found


def square(side: int) -> Array:
    return np.array([side, side], np.int64)


async def moved(running: Services, served: ResolvedVersion) -> None:
    await wait_until(lambda: bool(running.gateway.catalog.finding(served).crashed), "everybody knows")
    name = served.manifest.name
    await wait_until(
        lambda: all(isinstance(one, ProcessRuntime) for one in held(running, name).instance.instances.runtimes),
        "it is loaded anew in a process",
    )


async def test_a_run_ends_at_its_limit_and_the_version_gets_a_process_of_its_own(short: Services) -> None:
    served = await short.push("counting", models.counting())
    assert (await short.infer(served, np.array([1000], np.int64))).tolist() == [1000.0]
    with pytest.raises(InferenceFailed, match="exceeded its timeout of 1 s"):
        await short.infer(served, NEVER)
    await wait_until(lambda: watch(short).busy == 0, "its thread is free")
    await moved(short, served)
    assert "took longer than 1 s" in short.gateway.catalog.finding(served).crashed
    assert (await short.infer(served, np.array([7], np.int64))).tolist() == [7.0]


async def test_a_kernel_that_cannot_be_ended_is_not_waited_for(start_broker: StartBroker) -> None:
    async with start_broker(run_timeout_s=5.0, run_memory_mb=0) as broker, services(broker, workers=1) as running:
        served = await running.push("multiplying", models.multiplying())
        with pytest.raises(InferenceFailed, match="exceeded its timeout of 5 s"):
            await running.infer(served, square(9000), timeout_s=120)
        assert watch(running).busy == 1, "it still works"
        await moved(running, served)
        assert (await running.infer(served, square(2), timeout_s=60)).tolist() == [8.0]
        await wait_until(lambda: watch(running).busy == 0, "its thread is free", timeout_s=300)


async def test_a_run_ends_with_the_deadline_of_its_caller(patient: Services) -> None:
    served = await patient.push("counting", models.counting())
    with pytest.raises(DeadlineExceeded):
        await patient.infer(served, NEVER, timeout_s=0.5)
    await wait_until(lambda: watch(patient).busy == 0, "its thread is free")
    assert not patient.gateway.catalog.finding(served).crashed, "it took no longer than it may"
    assert (await patient.infer(served, np.array([3], np.int64))).tolist() == [3.0]


async def test_a_run_ends_when_its_caller_leaves(patient: Services) -> None:
    served = await patient.push("counting", models.counting())
    asking = asyncio.create_task(patient.infer(served, NEVER, timeout_s=600))
    await wait_until(lambda: watch(patient).busy == 1, "it runs")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await wait_until(lambda: watch(patient).busy == 0, "its thread is free")
    assert (await patient.infer(served, np.array([3], np.int64))).tolist() == [3.0]


async def test_a_run_ends_when_its_job_is_cancelled(patient: Services) -> None:
    served = await patient.push("counting", models.counting())
    (job,) = await patient.gateway.jobs.submit(TENANT, [new_job(served, NEVER, deadline_s=3600)])
    await wait_until(lambda: watch(patient).busy == 1, "it runs")
    shown = await patient.gateway.jobs.cancel(TENANT, job["id"])
    assert shown["state"] == "cancelled"
    await wait_until(lambda: watch(patient).busy == 0, "its thread is free")
    assert (await patient.infer(served, np.array([3], np.int64))).tolist() == [3.0]


async def test_a_run_ends_when_its_worker_stops_and_its_job_is_not_failed(patient: Services) -> None:
    served = await patient.push("counting", models.counting())
    (job,) = await patient.gateway.jobs.submit(TENANT, [new_job(served, NEVER, deadline_s=3600)])
    await wait_until(lambda: watch(patient).busy == 1, "it runs")
    await patient.workers[0].holder.stop(0.2)
    await wait_until(lambda: watch(patient).busy == 0, "its thread is free")
    assert (await patient.gateway.jobs.get(TENANT, job["id"]))["state"] == "running"


async def test_a_worker_stops_though_a_run_cannot_be_ended(start_broker: StartBroker) -> None:
    async with start_broker() as broker, services(broker, workers=0) as running:
        served = await running.push("multiplying", models.multiplying())
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tether_cli", "worker", "--data-dir", str(broker.home.root), "--nats", broker.url),
            env=os.environ | {"TETHER_SHUTDOWN_TIMEOUT_S": "0.1", "TETHER_RUN_MEMORY_MB": "0", "TETHER_OPS_PORT": "0"},
        )
        try:
            await wait_until(lambda: bool(running.gateway.catalog.workers(served)), "it answers for the model", 60)
            before = memory_of(worker.pid)
            asking = asyncio.create_task(running.infer(served, square(10_000), timeout_s=600))
            await wait_until(lambda: memory_of(worker.pid) - before > 420 << 20, "the product is being made", 120)
            worker.send_signal(signal.SIGTERM)
            async with asyncio.timeout(15):
                assert await worker.wait() == 0
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_a_run_that_takes_too_much_memory_is_made_again_elsewhere(small: Services) -> None:
    served = await small.push("filling", models.filling())
    assert (await small.infer(served, square(2))).tolist() == [4.0]
    side = 9000  # two matrices of 324 MB
    assert (await small.infer(served, square(side))).tolist() == [float(side) ** 2]
    await moved(small, served)
    assert "of memory" in small.gateway.catalog.finding(served).crashed
    await wait_until(lambda: watch(small).busy == 0, "its thread is free")


async def test_who_runs_beside_one_that_takes_too_much_keeps_its_place(small: Services) -> None:
    filling = await small.push("filling", models.filling())
    beside = await small.push("beside", models.counting())
    steps = np.array([300_000], np.int64)
    answers = await asyncio.gather(small.infer(filling, square(9000)), small.infer(beside, steps))
    assert [answer.tolist() for answer in answers] == [[81_000_000.0], [300_000.0]]
    await moved(small, filling)
    assert not small.gateway.catalog.finding(beside).crashed


async def test_chunks_of_a_job_are_not_gathered_beyond_what_one_answer_holds(short: Services) -> None:
    wide = await short.push("wide", models.repeating(1 << 16), max_batch_size=1)
    with pytest.raises(ResultTooLarge, match="the outputs take more than"):
        await short.infer(wide, np.ones((4000, 4), np.float32))
    held_by_it = held(short, "wide").instance.queue
    assert not len(held_by_it), "the rest of it does not run"


async def test_outputs_that_follow_from_the_inputs_are_refused_before_the_run(short: Services) -> None:
    wide = await short.push("wide", models.repeating(1 << 16), max_batch_size=0)
    assert (await short.infer(wide, row(1.0))).shape == (1, 4 << 16)
    rows = 1 + (LIMIT_MB << 20) // (16 << 16)
    with pytest.raises(ResultTooLarge, match="the outputs of the run would take"):
        await short.infer(wide, np.ones((rows, 4), np.float32))
    assert not short.gateway.catalog.finding(wide).crashed


async def test_a_warm_up_that_takes_too_long_ends(start_broker: StartBroker) -> None:
    async with start_broker(load_timeout_s=2.0) as broker, services(broker, workers=1) as running:
        served = await running.push("looping", models.looping(200_000))
        await running.decide("looping", warmup=(Warmup(count=1000),))
        holder = running.workers[0].holder
        await wait_until(lambda: "the run was ended" in dict(holder.failed()).get("looping:1", ""), "it says so")
        assert (await running.infer(served, row(0.0))).tolist() == [[0.0] * 4], "what was loaded before answers"


async def test_a_setting_gives_every_model_a_process(start_broker: StartBroker) -> None:
    async with start_broker(onnx_isolation="process") as broker, services(broker, workers=1) as running:
        served = await running.push("add", models.add())
        await running.decide("add", isolation=Isolation.THREAD.value)
        assert (await running.infer(served, row(1.0))).tolist() == [[2.0] * 4]
        (copy,) = held(running, "add").instance.instances.runtimes
        assert isinstance(copy, ProcessRuntime)
        assert not isinstance(copy, Endable)
