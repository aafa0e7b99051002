"""Rows of different callers in one run: only of versions that keep them apart, and cut where a request has too many."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client import REGISTRY
from support.brokers.brokers import Broker, wait_until
from support.models import models
from support.platform.services import Services, new_job, row, services

from tether.bus.key_value.bucket import SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.dispatcher import service as dispatcher_service
from tether.domain.manifest import Batching, Finding, Manifest
from tether.domain.tensor import Array
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.wire import codec
from tether.worker.runs import row_judgement


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def reason(running: Services, served: ResolvedVersion) -> str:
    return running.gateway.catalog.batching(served).reason


async def ask(running: Services, served: ResolvedVersion, arrays: list[Array]) -> list[Array]:
    return list(await asyncio.gather(*[running.infer(served, array) for array in arrays]))


async def run_jobs(running: Services, served: ResolvedVersion, arrays: list[Array]) -> list[Array]:
    """As durable jobs that are submitted together."""
    accepted = await running.gateway.jobs.submit("acme", [new_job(served, array) for array in arrays])
    ended = await running.gateway.jobs.get_many("acme", [job["id"] for job in accepted], 30)
    found = []
    for job in ended:
        assert job["state"] == "succeeded", job
        output = job["result"]["outputs"][0]
        found.append(np.array(output["data"], np.float32).reshape(output["shape"]))
    return found


@pytest.mark.parametrize("limit", [None, 8, 1])
async def test_a_request_with_more_rows_than_a_run_takes_is_answered_whole(one: Services, limit: int | None) -> None:
    served = await one.push("wide", models.add(), max_batch_size=32)
    if limit is not None:
        config = await one.decide("wide", max_batch_size=limit)
        held = next(held for held in one.workers[0].holder._held.values() if held.instance.manifest.name == "wide")
        await wait_until(lambda: held.loader.config == config, "it is heard")
    before, runs = sample("tether_batch_rows_sum", model="wide"), sample("tether_batch_rows_count", model="wide")
    arrays = [np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + rows for rows in (50, 1, 33, 100)]
    for found in (await ask(one, served, arrays), await run_jobs(one, served, arrays)):
        for array, answer in zip(arrays, found, strict=True):
            np.testing.assert_array_equal(answer, array + 1)
    assert sample("tether_batch_rows_sum", model="wide") - before == 2 * 184
    assert sample("tether_batch_rows_count", model="wide") - runs >= 2 * 184 / (limit or 32)


async def test_a_version_that_is_not_batched_runs_a_request_whole(one: Services) -> None:
    served = await one.push("whole", models.over_batch())
    before = sample("tether_batch_rows_sum", model="whole")
    values = np.random.default_rng(1).standard_normal((600, 4)).astype(np.float32)
    (answer,) = await ask(one, served, [values])
    np.testing.assert_allclose(answer.sum(axis=0), np.ones(4), rtol=1e-4)
    assert sample("tether_batch_rows_sum", model="whole") - before == 1


async def as_before(running: Services, served: ResolvedVersion) -> None:
    """Have a worker load a version whose manifest is from before there was a basis."""
    manifest = msgspec.structs.replace(served.manifest, batching=Batching(8))
    key = running.bus.names.version_key(manifest.name, manifest.version)
    async with connect(running.settings, running.home, "modelstore") as bus:
        await SignedBucket(bus, "models", MessageType.MANIFEST).put(key, codec.encode(manifest))
    for loaded in (False, True):
        await running.decide(manifest.name, loaded=loaded)
        await wait_until(lambda: bool(running.workers[0].holder.ready()) is loaded, f"loaded: {loaded}")  # noqa: B023


def told(running: Services) -> Batching:
    """How jobs of the version are joined, as the gateway knows it now."""
    return running.gateway.catalog.batching(running.gateway.catalog.resolve("old", "1"))


async def test_a_version_from_before_is_judged_when_it_is_loaded_and_batched_only_after_that(one: Services) -> None:
    await as_before(one, await one.push("old", models.add()))
    await wait_until(lambda: told(one).basis == "proven", "it is judged")
    assert (told(one).max_batch_size, told(one).reason) == (8, "")
    (held,) = one.workers[0].holder._held.values()
    assert held.loader.serving.batching.max_batch_size == 8


async def test_a_version_from_before_that_mixes_rows_is_never_batched(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await one.push("old", models.over_batch())
    proceed = asyncio.Event()
    judge = row_judgement.judge

    async def held_back(manifest: Manifest, directory: Path) -> Finding:
        await proceed.wait()
        return await judge(manifest, directory)

    monkeypatch.setattr(row_judgement, "judge", held_back)
    await as_before(one, served)
    assert "no worker has checked it" in told(one).reason
    for _ in range(2):
        arrays = [np.random.default_rng(n).standard_normal((1 + n % 3, 4)).astype(np.float32) for n in range(40)]
        for array, answer in zip(arrays, await ask(one, served, arrays), strict=True):
            grown = np.exp(array)
            np.testing.assert_allclose(answer, grown / grown.sum(axis=0), rtol=1e-4)
        proceed.set()
        await wait_until(lambda: "--max-batch-size" in told(one).reason, "it is judged")
    assert told(one).max_batch_size == 0
    assert told(one).reason.startswith("operator Softmax")


def mixture(count: int) -> list[Array]:
    """Requests of 1 to 3 rows, of which a third is detected and carries who asked."""
    drawn = np.random.default_rng(7)
    arrays = []
    for number in range(count):
        rows = np.full((1 + number % 3, 4), number + 1, np.float32)
        rows[drawn.random(len(rows)) > 0.33] *= -1
        arrays.append(rows)
    return arrays


@pytest.mark.parametrize("durable", [False, True])
async def test_a_declared_detector_is_found_out_by_its_first_runs_and_nobody_gets_rows_of_others(
    one: Services, durable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    served = await one.push("detector", models.detections(), max_batch_size=8)
    stopped = sample("tether_batching_stopped_total", model="detector")
    arrays = mixture(90)
    found = await (run_jobs if durable else ask)(one, served, arrays)
    for array, answer in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(answer, array[array[:, 0] > 0])
    assert sample("tether_batching_stopped_total", model="detector") - stopped == 1
    (told,) = [record for record in caplog.records if getattr(record, "action", "") == "batching_stopped"]
    assert "output 'y' had the shape" in told.getMessage()
    await wait_until(lambda: "mixed rows of different jobs" in reason(one, served), "the gateway heard of it")
    assert one.gateway.catalog.batching(served).max_batch_size == 0


async def test_what_one_worker_found_out_counts_for_all_and_for_as_long_as_the_version_is_there(
    broker: Broker,
) -> None:
    async with services(broker, workers=1) as running:
        served = await running.push("detector", models.detections(), max_batch_size=8)
        await ask(running, served, [row(-1)])
        await wait_until(lambda: "mixed rows" in reason(running, served), "the gateway heard of it")
        other = await running.start_worker("worker-2")
        await wait_until(lambda: bool(other.holder.ready()), "another worker holds it")
        assert other.holder.findings.get(other.holder.ready()[0]).mixed
        assert not other.holder.findings.unreported()
        (held,) = other.holder._held.values()
        assert held.loader.serving.batching.max_batch_size == 0
        again = await running.push("detector", models.detections(), max_batch_size=4)
        assert (again.manifest.version, running.gateway.catalog.batching(again).max_batch_size) == (2, 4)
    async with services(broker, workers=0) as running:
        await wait_until(lambda: "detector" in running.gateway.catalog.names(), "the model is known")
        served = running.gateway.catalog.resolve("detector", "1")
        await wait_until(lambda: "mixed rows" in reason(running, served), "it was remembered")
        assert isinstance(running.dispatcher, dispatcher_service.Dispatcher)
