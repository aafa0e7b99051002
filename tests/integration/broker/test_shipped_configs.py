"""The files under ops/nats run: one server behind TLS, and three servers that survive the loss of one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from support.brokers.brokers import wait_until
from support.brokers.shipped import nodes, running

from tether.broker.embedded_server import Binary, check_server
from tether.broker.nats_config import CLUSTER
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.errors import BrokerUnavailable
from tether.identity.certificates import make_certificates
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.streams.job_queue import BusResults
from tether.streams.layout import ensure_platform, ensure_streams, streams


async def test_a_single_production_server_speaks_tls_only(home: Home, nats_binary: Binary, tmp_path: Path) -> None:
    make_certificates(home, ["nats"])
    (node,) = nodes(tmp_path, home, ["single"])
    settings = Settings(nats_url=node.url, home=str(home.root))
    plain = Settings(nats_url=f"nats://127.0.0.1:{node.client}", home=str(home.root))
    async with running([node], nats_binary):
        report = await check_server(f"http://127.0.0.1:{node.monitor}")
        assert (report.sync, report.strict, report.problems) == ("always", True, ())
        with pytest.raises(BrokerUnavailable, match="nats_cert and nats_key"):
            async with connect(plain, home, "dispatcher"):
                pass
        async with connect(settings, home, "dispatcher") as bus:
            await ensure_platform(bus, settings)
            assert (await bus.api("STREAM.NAMES"))["total"] > 10


async def prepared(bus: Bus, settings: Settings) -> bool:
    """As the dispatcher does: three servers that sync each stream may take longer than one try."""
    failed = await ensure_streams(bus, streams(bus.names, settings))
    assert all(isinstance(error, BrokerUnavailable) for error in failed.values()), failed
    return not failed


@pytest.mark.slow
async def test_three_servers_go_on_when_one_is_killed(home: Home, nats_binary: Binary, tmp_path: Path) -> None:
    make_certificates(home, CLUSTER)
    made = nodes(tmp_path, home, ["cluster-1", "cluster-2", "cluster-3"])
    servers = ",".join(node.url for node in made)
    settings = Settings(nats_url=servers, replicas=3, home=str(home.root))
    async with running(made, nats_binary), connect(settings, home, "dispatcher") as bus:
        await wait_until(lambda: prepared(bus, settings), "the streams are there", 60)
        key = bus.names.bucket_key("routes", "m.1")
        assert (await bus.api(f"STREAM.INFO.{bus.names.jobs_stream(0)}"))["config"]["num_replicas"] == 3
        await bus.publish_acked(key, b"before")
        results = BusResults(bus)
        assert await results.commit("job", b"its end")
        assert await results.ended(["job", "another"]) == {"job"}
        made[0].kill()

        async def written() -> bool:
            with contextlib.suppress(BrokerUnavailable):
                await bus.publish_acked(key, b"after", timeout=2)
                return True
            return False

        await wait_until(written, "a write is acknowledged by the two that are left", 30)

        async def read() -> bool:
            """Either of the two may answer, and one of them may be a moment behind."""
            stored = await bus.direct_get(bus.names.bucket_stream("routes"), key)
            return stored is not None and stored.data == b"after"

        await wait_until(read, "what was written is read")

        async def known() -> bool:
            """The stream of results finds a leader of its own."""
            with contextlib.suppress(BrokerUnavailable):
                return await results.ended(["job", "another"]) == {"job"}
            return False

        await wait_until(known, "it is known which jobs have ended")
        assert await results.find(["job", "another"]) == {"job": b"its end"}
