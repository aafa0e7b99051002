"""Three servers of a cluster: what happens to callers when the server that holds the infer stream is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from support.brokers.broker_users import add_operator, new_seed
from support.brokers.brokers import Broker, wait_until
from support.brokers.operators import as_operator
from support.brokers.shipped import Node, nodes, running
from support.brokers.stored import count
from support.models import models
from support.platform.services import TENANT, new_job, row, services

from tether.broker.embedded_server import Binary
from tether.broker.nats_config import CLUSTER
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.domain.job import Priority
from tether.domain.manifest import ModelRef
from tether.errors import BrokerUnavailable
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.identity.certificates import make_certificates
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.streams.lane_consumer import COLD_S
from tether.streams.layout import ensure_streams, streams

pytestmark = pytest.mark.slow

OPERATOR = new_seed()


@asynccontextmanager
async def cluster(home: Home, binary: Binary, folder: Path) -> AsyncIterator[tuple[Broker, list[Node]]]:
    """Three servers with the shipped files, on loopback."""
    make_certificates(home, CLUSTER)
    made = nodes(folder, home, ["cluster-1", "cluster-2", "cluster-3"])
    for node in made:
        add_operator(node.config.parent / "permissions.conf", OPERATOR)
    settings = Settings(nats_url=",".join(node.url for node in made), replicas=3, home=str(home.root))
    async with running(made, binary):
        async with connect(settings, home, "dispatcher") as bus:

            async def there() -> bool:
                return not await ensure_streams(bus, streams(bus.names, settings))

            await wait_until(there, "the streams are there", 30)
        yield Broker(home, settings, ""), made


async def holder(bus: Bus, made: list[Node]) -> Node:
    """The server that holds the infer stream."""
    info = await bus.api(f"STREAM.INFO.{bus.names.infer_stream(0)}")
    return made[CLUSTER.index(info["cluster"]["leader"])]


async def test_waiting_callers_are_answered_when_the_server_with_the_infer_stream_is_killed(
    home: Home, nats_binary: Binary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with cluster(home, nats_binary, tmp_path) as (broker, made), services(broker, workers=1) as platform:
        assert platform.dispatcher is not None
        served = await platform.push("bump", models.add(1.0))
        bus = platform.dispatcher._bus
        node = await holder(bus, made)
        await platform.workers[0].holder.stop(5)  # so that what waits is in the stream that is lost
        waiting = [asyncio.create_task(platform.infer(served, row(value), timeout_s=30)) for value in range(5)]

        async def wait() -> bool:
            return await count(bus, bus.names.infer_stream(0)) > 0

        await wait_until(wait, "requests wait in the stream")
        await platform.start_worker("worker-2")
        node.kill()
        answers = await asyncio.gather(*waiting)
        assert [answer[0, 0] for answer in answers] == [value + 1.0 for value in range(5)]
        other = await holder(bus, made)
        assert other is not node
        node.start(nats_binary)
        await wait_until(node.healthy, "the killed server is back", 60)
        assert (await platform.infer(served, row(9.0)))[0, 0] == 10.0
        assert await holder(bus, made) is other
    assert "STREAM.INFO" not in "".join(record.message for record in caplog.records if record.levelno >= logging.ERROR)


async def test_jobs_of_a_resting_lane_run_soon_after_the_leader_of_its_consumer_was_killed(
    home: Home, nats_binary: Binary, tmp_path: Path
) -> None:
    async with (
        cluster(home, nats_binary, tmp_path) as (broker, made),
        services(broker, workers=1) as platform,
        as_operator(home, broker.settings, OPERATOR) as bus,
    ):
        served = await platform.push("bump", models.add(1.0))
        lane = served.job_lane(Priority.NORMAL)
        consumer = f"{bus.names.lane_stream(lane)}.{bus.names.lane_consumer(lane)}"

        async def leader() -> str:
            with suppress(BrokerUnavailable):
                info = await bus.api(f"CONSUMER.INFO.{consumer}", timeout=1)
                return str(info["cluster"].get("leader", ""))
            return ""

        async def elsewhere() -> bool:
            """The lane's consumer is led by a server that has neither the infer stream nor the worker's connection."""
            now = await leader()
            if now:
                node = made[CLUSTER.index(now)]
                connected = platform.workers[0]._bus._client.connected_url.port
                if node is not await holder(bus, made) and node.client != connected:
                    return True
            with suppress(BrokerUnavailable):
                await bus.api(f"CONSUMER.LEADER.STEPDOWN.{consumer}", {}, timeout=1)
            return False

        await wait_until(elsewhere, "the leaders are on two servers", 60)
        (pull,) = [
            pull for pull in platform.workers[0].holder._held[served_ref(served)].instance._pulls if pull.lane == lane
        ]
        pull._expiry_s = COLD_S
        pull._restart()
        await wait_until(lambda: pull._outstanding > 0 and pull._slowest_s == 15.0, "the lane rests")
        made[CLUSTER.index(await leader())].kill()
        jobs: list[str] = []

        async def accepted() -> bool:
            with suppress(BrokerUnavailable):
                shown = await platform.gateway.jobs.submit(TENANT, [new_job(served, row(1.0), key="once")])
                jobs.extend(job["id"] for job in shown)
            return bool(jobs)

        await wait_until(accepted, "the job is accepted", 30)
        (shown,) = await platform.gateway.jobs.get_many(TENANT, jobs, 15.0)
        assert shown["state"] == "succeeded"


def served_ref(served: ResolvedVersion) -> ModelRef:
    return ModelRef(served.manifest.name, served.manifest.version)
