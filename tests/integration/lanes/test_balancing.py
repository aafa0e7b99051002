"""How two workers share the jobs of a model, on a real broker: what is told is what happens, and changes while jobs flow."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.brokers.brokers import Broker, wait_until
from support.models import bundles
from support.platform.services import TENANT, Services, new_job, row, services

from tether.domain.job import LaneKind
from tether.domain.manifest import ModelRef
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import LoadBalancing
from tether.streams.layout import lanes_of
from tether.worker.jobs.version_server import VersionServer
from tether.worker.scheduling.pull_balance import MOST

SPEED = """
import time
import numpy as np


class Model:
    def load(self, directory):
        self.second = "worker-2" in str(directory)

    def predict(self, inputs):
        time.sleep(SECOND if self.second else FIRST)
        return {"y": np.full_like(inputs["x"], 2 if self.second else 1)}
"""
"""Says which of the two workers it ran on, which take their time."""


@asynccontextmanager
async def pair(broker: Broker, **second: object) -> AsyncIterator[Services]:
    """Two workers, the second with settings of its own."""
    quick = dataclasses.replace(broker.settings, heartbeat_s=0.1)
    async with services(dataclasses.replace(broker, settings=quick), workers=1) as running:
        await running.start_worker("worker-2", **second)
        yield running


async def pushed(
    running: Services, folder: Path, strategy: LoadBalancing, *, first_s: float = 0.0, second_s: float = 0.0
) -> ResolvedVersion:
    """A model that was decided about before it came."""
    await running.decide("m", load_balancing=strategy)
    code = SPEED.replace("FIRST", str(first_s)).replace("SECOND", str(second_s))
    return await running.push_bundle("m", bundles.write(folder, code=code, maxBatchSize=0))


def instances(running: Services) -> list[VersionServer]:
    return [worker.holder._held[ModelRef("m", 1)].instance for worker in running.workers]


async def waiting(running: Services, kind: LaneKind = LaneKind.INFER) -> int:
    """Requests that wait at the broker, as it counts them, in one of the lanes."""
    assert running.dispatcher is not None
    lane = next(lane for lane in lanes_of("m", 1, running.settings.region) if lane.kind is kind)
    names = running.bus.names
    path = f"CONSUMER.INFO.{names.lane_stream(lane)}.{names.lane_consumer(lane)}"
    return int((await running.dispatcher._bus.api(path))["num_waiting"])


async def wait_for(running: Services, places: int) -> None:
    async def is_so() -> bool:
        return [await waiting(running, kind) for kind in LaneKind] == [places, places]

    await wait_until(is_so, f"{places} requests wait in each lane")


async def asked(running: Services, served: ResolvedVersion, count: int) -> Counter[int]:
    """So many requests one after the other; how many each worker answered."""
    return Counter([int((await running.infer(served, row(0)))[0, 0]) for _ in range(count)])


def near(shares: Counter[int], first: int, second: int) -> bool:
    """A request that expires and is asked for anew changes whose turn it is, once."""
    return shares[1] + shares[2] == first + second and abs(shares[1] - first) <= 2


@pytest.mark.parametrize(
    ("strategy", "places", "first"),
    [(LoadBalancing.ROUND_ROBIN, 2, 20), (LoadBalancing.WEIGHTED_ROUND_ROBIN, 4, 10)],
)
async def test_workers_take_turns_one_each_or_as_many_as_they_weigh(
    broker: Broker, tmp_path: Path, strategy: LoadBalancing, places: int, first: int
) -> None:
    """Also where one is four times as slow; and each turn is one request that waits at the broker."""
    async with pair(broker, worker_weight=3) as running:
        served = await pushed(running, tmp_path / "m", strategy, first_s=0.002, second_s=0.008)
        await wait_for(running, places)
        assert near(await asked(running, served, 40), first, 40 - first)
        await wait_for(running, places)


async def test_durable_jobs_are_shared_the_same_way(broker: Broker, tmp_path: Path) -> None:
    async with pair(broker, worker_weight=3) as running:
        served = await pushed(running, tmp_path / "m", LoadBalancing.WEIGHTED_ROUND_ROBIN)
        await wait_for(running, 4)
        shares: Counter[int] = Counter()
        for _ in range(24):
            (shown,) = await running.gateway.jobs.submit(TENANT, [new_job(served, row(0))])
            (ended,) = await running.gateway.jobs.get_many(TENANT, [shown["id"]], 20)
            shares[int(ended["result"]["outputs"][0]["data"][0])] += 1
        assert near(shares, 6, 18)


async def test_a_worker_without_a_free_slot_asks_for_nothing_whatever_it_weighs(broker: Broker, tmp_path: Path) -> None:
    """A slow worker in a crowd does not gather what the other could do meanwhile."""
    async with pair(broker, worker_weight=2) as running:
        served = await pushed(running, tmp_path / "m", LoadBalancing.WEIGHTED_ROUND_ROBIN, first_s=0.002, second_s=0.1)
        await wait_for(running, 3)
        pulls, most, ids = instances(running)[1]._pulls, 0, []
        for _ in range(60):
            (shown,) = await running.gateway.jobs.submit(TENANT, [new_job(served, row(0))])
            ids.append(shown["id"])
            most = max(most, *(pull._held for pull in pulls))
        ended = await running.gateway.jobs.get_many(TENANT, ids, 30)
        shares = Counter(int(job["result"]["outputs"][0]["data"][0]) for job in ended)
        assert shares[1] > 2 * shares[2] > 0
        assert 2 <= most <= 2 + 2 - 1


async def test_capacity_follows_the_measured_speed_and_starves_nobody(broker: Broker, tmp_path: Path) -> None:
    async with pair(broker) as running:
        served = await pushed(running, tmp_path / "m", LoadBalancing.CAPACITY, first_s=0.01, second_s=0.08)
        await wait_for(running, 2)
        first, second = instances(running)
        seen = [0]

        async def settled() -> bool:
            await asked(running, served, 8)
            seen.append(first.runs.capacity.turns)
            return seen[-1] >= 3 and len(set(seen[-4:])) == 1

        await wait_until(settled, "the faster one waits in more places", 60)
        assert second.runs.capacity.turns == 1
        shares = await asked(running, served, 40)
        assert 0.6 < shares[1] / 40 < 0.95, shares

        async def follows() -> bool:
            """Its places change when heartbeats are compared, and what both can do is measured with every run."""
            await asked(running, served, 8)
            ratio = first.runs.capacity.level / second.runs.capacity.level
            return ratio > 2 and abs(first.runs.capacity.turns - min(MOST, ratio)) <= 1

        await wait_until(follows, "its places follow what it can do", 60)


async def test_the_strategy_changes_while_jobs_flow_and_none_is_lost(broker: Broker, tmp_path: Path) -> None:
    """Each way round: nothing fails, nothing is delivered twice, and what waits at the broker is as decided in the end."""
    async with pair(broker, worker_weight=3) as running:
        served = await pushed(running, tmp_path / "m", LoadBalancing.LEAST_CONNECTIONS)
        stop, done = asyncio.Event(), 0

        async def ask() -> None:
            nonlocal done
            while not stop.is_set():
                assert (await running.infer(served, row(0)))[0, 0] in (1, 2)
                done += 1

        async def submit() -> None:
            while not stop.is_set():
                shown = await running.gateway.jobs.submit(TENANT, [new_job(served, row(0)) for _ in range(3)])
                ended = await running.gateway.jobs.get_many(TENANT, [job["id"] for job in shown], 20)
                assert [(job["state"], job["attempts"]) for job in ended] == [("succeeded", 1)] * 3

        async with asyncio.TaskGroup() as group:
            for work in (*[ask] * 6, submit):
                group.create_task(work())
            for strategy in (*LoadBalancing, *reversed(LoadBalancing), LoadBalancing.WEIGHTED_ROUND_ROBIN):
                await running.decide("m", load_balancing=strategy)
                await wait_until(
                    lambda: all(one._serving.strategy is strategy for one in instances(running)),  # noqa: B023
                    f"{strategy} counts",
                )
                before = done
                await wait_until(lambda: done > before + 40, "it answers", 30)  # noqa: B023
            stop.set()
        await wait_for(running, 4)
        assert near(await asked(running, served, 20), 5, 15)


@pytest.mark.parametrize("strategy", [LoadBalancing.ROUND_ROBIN, LoadBalancing.WEIGHTED_ROUND_ROBIN])
async def test_a_worker_that_cannot_hold_it_any_more_asks_for_nothing(
    broker: Broker, tmp_path: Path, strategy: LoadBalancing
) -> None:
    async with pair(broker, worker_weight=3, worker_labels="zone=b") as running:
        served = await pushed(running, tmp_path / "m", strategy)
        assert (await asked(running, served, 8)).keys() == {1, 2}
        await running.decide("m", load_balancing=strategy, labels={"zone": "b"})
        await wait_until(lambda: not running.workers[0].holder.ready(), "the first lets it go")
        await wait_for(running, 1 if strategy is LoadBalancing.ROUND_ROBIN else 3)
        assert await asked(running, served, 8) == {2: 8}


async def test_a_lane_at_rest_gets_colder_once_for_all_of_its_requests(broker: Broker, tmp_path: Path) -> None:
    async with pair(broker, worker_weight=4) as running:
        await pushed(running, tmp_path / "m", LoadBalancing.WEIGHTED_ROUND_ROBIN)
        await wait_for(running, 5)
        pull = instances(running)[1]._pulls[0]
        await wait_until(lambda: pull._expiry_s > 2, "the first requests have ended")
        assert pull._expiry_s <= 8
        await wait_for(running, 5)
