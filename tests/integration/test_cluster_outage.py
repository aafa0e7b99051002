"""Three servers of a cluster: what happens to callers when the server that holds the infer stream is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import models
import pytest
from brokers import Broker, wait_until
from services import row, services
from shipped import Node, nodes, running

from tether.bus.certificates import make_certificates
from tether.bus.config import CLUSTER
from tether.bus.connection import Bus
from tether.bus.server import Binary
from tether.bus.topology import ensure_streams, streams
from tether.home import Home
from tether.settings import Settings

pytestmark = pytest.mark.slow


@asynccontextmanager
async def cluster(home: Home, binary: Binary, folder: Path) -> AsyncIterator[tuple[Broker, list[Node]]]:
    """Three servers with the shipped files, on loopback."""
    make_certificates(home, CLUSTER)
    made = nodes(folder, home, ["cluster-1", "cluster-2", "cluster-3"])
    settings = Settings(nats_url=",".join(node.url for node in made), replicas=3, home=str(home.root))
    async with running(made, binary):
        async with Bus.connect(settings, home, "dispatcher") as bus:

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

        async def stored() -> bool:
            return int((await bus.api(f"STREAM.INFO.{bus.names.infer_stream(0)}"))["state"]["messages"]) > 0

        await wait_until(stored, "requests wait in the stream")
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
