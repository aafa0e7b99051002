"""The files under ops/nats run: one server behind TLS, and three servers that survive the loss of one."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from brokers import make_certificate, wait_until

from tether.bus.config import CLUSTER, write_ops_files
from tether.bus.connection import Bus
from tether.bus.server import Binary, check_server
from tether.bus.topology import ensure_platform
from tether.errors import BrokerUnavailable
from tether.home import Home
from tether.processes import die_with_parent
from tether.settings import Settings


@dataclass
class Node:
    """One server of a shipped file, moved to free loopback ports and a folder of its own."""

    config: Path
    client: int
    monitor: int
    route: int
    process: subprocess.Popen[bytes] | None = None

    def start(self, binary: Binary) -> None:
        self.process = subprocess.Popen(
            [binary.path, "-c", self.config],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - it only makes one system call
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def healthy(self) -> bool:
        async with httpx.AsyncClient(trust_env=False) as http:
            with contextlib.suppress(httpx.HTTPError):
                return (await http.get(f"http://127.0.0.1:{self.monitor}/healthz")).status_code == 200
        return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def nodes(folder: Path, home: Home, names: list[str]) -> list[Node]:
    """The files ``names`` as :class:`Node`; the hosts of the cluster become its route ports."""
    ports = free_ports(3 * len(names))
    made = []
    for index, name in enumerate(names):
        client, monitor, route = ports[3 * index : 3 * index + 3]
        place = folder / name
        write_ops_files(place, home)
        text = (place / f"{name}.conf").read_text()
        text = text.replace("/etc/nats/tls", str(folder)).replace("/data", str(place / "data"))
        text = text.replace("0.0.0.0:4222", f"127.0.0.1:{client}").replace("127.0.0.1:8222", f"127.0.0.1:{monitor}")
        text = text.replace("0.0.0.0:6222", f"127.0.0.1:{route}")
        for other, host in enumerate(CLUSTER[: len(names)]):
            text = text.replace(f"{host}:6222", f"127.0.0.1:{ports[3 * other + 2]}")
        (place / f"{name}.conf").write_text(text)
        made.append(Node(place / f"{name}.conf", client, monitor, route))
    return made


@contextlib.asynccontextmanager
async def running(made: list[Node], binary: Binary) -> AsyncIterator[None]:
    try:
        for node in made:
            node.start(binary)
        for node in made:
            await wait_until(node.healthy, f"{node.config.name} is healthy", 30)
        yield
    finally:
        for node in made:
            node.kill()


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return make_certificate(tmp_path)


async def test_a_single_production_server_speaks_tls_only(
    home: Home, nats_binary: Binary, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node,) = nodes(tmp_path, home, ["single"])
    settings = Settings(nats_url=f"nats://127.0.0.1:{node.client}", home=str(home.root))
    async with running([node], nats_binary):
        report = await check_server(f"http://127.0.0.1:{node.monitor}")
        assert (report.sync, report.strict, report.problems) == ("always", True, ())
        with pytest.raises(BrokerUnavailable, match="SSL_CERT_FILE"):
            async with Bus.connect(settings, home, "dispatcher"):
                pass
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        async with Bus.connect(settings, home, "dispatcher") as bus:
            await ensure_platform(bus, settings)
            assert (await bus.api("INFO"))["streams"] > 10


@pytest.mark.slow
async def test_three_servers_go_on_when_one_is_killed(
    home: Home, nats_binary: Binary, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    made = nodes(tmp_path, home, ["cluster-1", "cluster-2", "cluster-3"])
    servers = ",".join(f"nats://127.0.0.1:{node.client}" for node in made)
    settings = Settings(nats_url=servers, replicas=3, home=str(home.root))
    async with running(made, nats_binary), Bus.connect(settings, home, "dispatcher") as bus:
        await ensure_platform(bus, settings)
        key = bus.names.bucket_key("routes", "m.1")
        assert (await bus.api(f"STREAM.INFO.{bus.names.jobs_stream(0)}"))["config"]["num_replicas"] == 3
        await bus.publish_acked(key, b"before")
        made[0].kill()

        async def written() -> bool:
            with contextlib.suppress(BrokerUnavailable):
                await bus.publish_acked(key, b"after", timeout=2)
                return True
            return False

        await wait_until(written, "a write is acknowledged by the two that are left", 30)
        stored = await bus.direct_get(bus.names.bucket_stream("routes"), key)
        assert stored is not None
        assert stored.data == b"after"
