"""The dispatcher gives versions to workers by label, memory and replicas, while everything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import bundles, models
from support.platform.services import TENANT, Services, new_job, services

from tether.dispatcher import service as dispatcher_service
from tether.dispatcher.assignments import rendezvous
from tether.domain.job import SHARED
from tether.errors import ConfigError
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.settings import load


def holders(running: Services, served: ResolvedVersion) -> set[str]:
    return set(running.gateway.catalog.workers(served))


async def ended(running: Services, served: ResolvedVersion, count: int = 3) -> set[str]:
    """How so many durable jobs end."""
    inputs = np.ones((1, served.manifest.inputs[0].shape[1]), np.float32)
    shown = await running.gateway.jobs.submit(TENANT, [new_job(served, inputs) for _ in range(count)])
    return {job["state"] for job in await running.gateway.jobs.get_many(TENANT, [job["id"] for job in shown], 40)}


async def silent(*, leaving: bool = False) -> None:
    """As the heartbeat of a worker that nobody hears."""


async def test_a_model_goes_where_its_labels_are_and_says_so_when_they_are_nowhere(one: Services) -> None:
    served = await one.push("bump", models.add())
    assert holders(one, served) == {"worker-1"}
    await one.decide("bump", labels={"gpu": "a100"})
    reason = "no worker has the labels gpu=a100; start one with them in 'worker_labels'"
    catalog = one.gateway.catalog
    await wait_until(lambda: catalog.reason(served) == reason and not catalog.workers(served), "nobody holds it")
    await one.start_worker("worker-2", worker_labels="zone=eu, gpu=a100")
    await wait_until(lambda: holders(one, served) == {"worker-2"}, "the labelled one holds it", 30)
    await wait_until(lambda: not catalog.reason(served), "and all is well")
    assert await ended(one, served) == {"succeeded"}
    await one.decide("bump", labels={"zone": "eu"}, replicas_max=1)
    assert await ended(one, served) == {"succeeded"}
    assert holders(one, served) == {"worker-2"}


async def test_one_replica_moves_when_its_worker_dies_and_back_without_a_gap(broker: Broker) -> None:
    async with services(broker, workers=2) as running:
        await running.decide("bump", replicas_max=1)
        served = await running.push("bump", models.add(), workers=1)
        (holder,) = holders(running, served)
        other = ({"worker-1", "worker-2"} - {holder}).pop()
        (worker,) = [worker for worker in running.workers if worker.name == holder]
        seen: list[set[str]] = []
        beats, worker.heartbeat = worker.heartbeat, silent  # type: ignore[method-assign]
        await wait_until(lambda: holders(running, served) == {other}, "the other one took over", 30)
        worker.heartbeat = beats  # type: ignore[method-assign]

        def back() -> bool:
            seen.append(holders(running, served))
            return seen[-1] == {holder}

        await wait_until(back, "it is back where it belongs", 30)
        assert set() not in seen
        assert await ended(running, served) == {"succeeded"}


async def test_a_version_that_its_worker_cannot_load_goes_to_another_one(broker: Broker, tmp_path: Path) -> None:
    unable = max(("worker-1", "worker-2"), key=lambda name: rendezvous(name, "python:1"))
    (able,) = {"worker-1", "worker-2"} - {unable}
    guard = "        assert os.environ['OMP_NUM_THREADS'] != '3', 'too many threads'\n"
    code = bundles.CODE.replace("        self.bias", f"{guard}        self.bias", 1)
    async with services(broker, workers=0) as running:
        await running.decide("python", replicas_max=1)
        worker = await running.start_worker(unable, instance_threads=3)
        await running.push_bundle("python", bundles.write(tmp_path / "python", code=code), workers=0)
        served = running.gateway.catalog.resolve("python", "1")
        await wait_until(lambda: bool(worker.holder.failed()), "it cannot load it", 60)
        await running.start_worker(able)
        await wait_until(lambda: holders(running, served) == {able}, "the other one holds it", 60)
        assert await ended(running, served) == {"succeeded"}


async def test_memory_is_not_overbooked_and_what_does_not_fit_says_why(broker: Broker) -> None:
    size = 600_000
    async with services(broker, workers=0) as running:
        await running.start_worker("worker-1", worker_memory_mb=1)
        first = await running.push("first", models.padded(size))
        second = await running.push("second", models.padded(size, seed=1), workers=0)
        catalog = running.gateway.catalog
        await wait_until(lambda: catalog.reason(second).startswith("need 1 MiB, and no worker"), "it says why")
        assert holders(running, first) == {"worker-1"}
        assert holders(running, second) == set()
        await running.decide("first", loaded=False)
        await wait_until(lambda: holders(running, second) == {"worker-1"}, "there is room", 30)
        assert await ended(running, second) == {"succeeded"}


async def test_a_dispatcher_that_takes_over_moves_nothing(broker: Broker) -> None:
    async with services(broker, workers=2) as running:
        await running.decide("bump", replicas_max=1)
        served = await running.push("bump", models.add(), workers=1)
        (holder,) = holders(running, served)
        async with dispatcher_service.running(broker.settings, broker.home) as fresh:
            await wait_until(lambda: len(fresh._workers) == 2, "it has heard of both")
            await fresh.reconcile()
            places = {worker: one.models for worker, one in fresh._assigned.items()}
            assert {worker for worker, refs in places.items() if refs} == {holder}
            assert fresh._routed[SHARED, places[holder][0]].workers in ((holder,), ())
            assert holders(running, served) == {holder}


@pytest.mark.parametrize("text", ["gpu", "=a", "a=1,a=2", "a=" + "x" * 65, ",".join(f"n{n}=1" for n in range(17))])
def test_labels_that_are_none_are_refused_at_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="'worker_labels' must be up to 16 different NAME=VALUE"):
        load("worker", overrides={"worker_labels": text}, environ={})
