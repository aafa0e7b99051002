"""The embedded server starts under our configuration, survives a crash and keeps roles apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.brokers.brokers import Broker
from support.platform.disks import fill, small_disk

from tether.broker.embedded_server import Binary, EmbeddedServer, check_server, find_server
from tether.bus.session import connect
from tether.errors import ConfigError, PermissionDenied
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.process.os_process import alive
from tether.settings import Settings
from tether.wire.subjects import Names


async def test_the_server_has_the_settings_tether_relies_on(broker: Broker) -> None:
    report = await check_server(broker.monitor)
    assert report.problems == ()
    assert report.strict


@pytest.mark.parametrize(("durability", "sync"), [("fast", "1s"), ("durable", "always")])
async def test_the_durability_profile_sets_the_sync_interval(
    home: Home, nats_binary: Binary, durability: str, sync: str
) -> None:
    settings = Settings(home=str(home.root), durability=durability)
    async with EmbeddedServer(home, settings, binary=nats_binary) as server:
        assert (await check_server(server.monitor)).sync == sync


@pytest.mark.parametrize(
    "name", ["josé", "日本 語", "a\"b'c", "back\\slash\\n", "$HOME", "#no # comment", "new\nline", "\t\x7f{}()"]
)
async def test_a_home_may_have_any_name_that_is_text(name: str, tmp_path: Path, nats_binary: Binary) -> None:
    home = Home.at(str(tmp_path / name))
    create_home(home, workers=1)
    async with EmbeddedServer(home, Settings(home=str(home.root)), binary=nats_binary) as server:
        assert (await check_server(server.monitor)).problems == ()
    assert (home.nats_store / "jetstream").is_dir()
    assert (home.logs / "nats.log").is_file()


async def test_a_killed_server_comes_back_on_its_port_with_its_data(embedded_broker: Broker) -> None:
    server = embedded_broker.server
    assert server is not None
    keep = Names().dead_stream
    async with connect(embedded_broker.settings, embedded_broker.home, "dispatcher") as bus:
        await bus.api(f"STREAM.CREATE.{keep}", {"name": keep, "subjects": ["keep"], "storage": "file"})
    url, first = server.url, server.pid
    await server.kill()
    assert not alive(first)
    await server.start()
    assert server.url == url
    async with connect(embedded_broker.settings, embedded_broker.home, "dispatcher") as bus:
        assert (await bus.api(f"STREAM.INFO.{keep}"))["config"]["name"] == keep


async def test_a_killed_server_comes_back_on_its_port_while_its_disk_is_full(
    tmp_path: Path, nats_binary: Binary
) -> None:
    with small_disk(tmp_path / "disk", 32):
        home = Home.at(str(tmp_path / "disk" / "home"))
        create_home(home, workers=1)
        async with EmbeddedServer(home, Settings(home=str(home.root)), binary=nats_binary) as server:
            url = server.url
            fill(tmp_path / "disk" / "ballast")
            for _ in range(2):
                await server.kill()
                await server.start()
                assert server.url == url
                async with connect(Settings(home=str(home.root), nats_url=url), home, "admin") as bus:
                    assert await bus.api("INFO")


async def test_stopping_leaves_no_process(home: Home, nats_binary: Binary) -> None:
    server = EmbeddedServer(home, Settings(home=str(home.root)), binary=nats_binary)
    await server.start()
    pid = server.pid
    await server.stop()
    await server.stop()
    assert not alive(pid)


async def test_a_port_in_use_is_said_in_one_line(broker: Broker, home: Home, nats_binary: Binary) -> None:
    port = int(broker.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=r"did not start: .*address already in use"):
        await EmbeddedServer(home, Settings(home=str(home.root), nats_port=port), binary=nats_binary).start()


async def test_an_identity_the_server_does_not_know_is_refused(broker: Broker, tmp_path: Path) -> None:
    stranger = Home(tmp_path)
    create_home(stranger, workers=1)
    with pytest.raises(ConfigError, match="refused"):
        async with connect(broker.settings, stranger, "gateway"):
            pass


@pytest.mark.parametrize(
    ("identity", "subject"),
    [
        ("worker-1", "tether.infer.0.local.shared.m.1"),
        ("worker-1", "$JS.API.STREAM.CREATE.X"),
        ("worker-1", "$KV.TETHER_models.m.1"),
        ("gateway", "$KV.TETHER_models.m.1"),
        ("gateway", "$JS.API.CONSUMER.CREATE.TETHER_JOBS_0.x"),
        ("modelstore", "$KV.TETHER_apikeys.x"),
        ("dispatcher", "$JS.API.STREAM.DELETE.TETHER_JOBS_0"),
        ("admin", "tether.infer.0.local.shared.m.1"),
    ],
)
async def test_a_role_cannot_publish_on_what_is_not_its_own(broker: Broker, identity: str, subject: str) -> None:
    async with connect(broker.settings, broker.home, identity) as bus:
        with pytest.raises(PermissionDenied):
            await bus.publish_acked(subject, b"x", timeout=2)


def test_a_configured_path_that_is_no_server_is_named() -> None:
    with pytest.raises(ConfigError, match="TETHER_NATS_SERVER"):
        find_server(Settings(nats_server="/nonexistent/nats-server"))
