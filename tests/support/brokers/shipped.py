"""Servers under the files of ops/nats, on free loopback ports and in folders of their own."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from support.brokers.brokers import wait_until

from tether.broker.embedded_server import Binary
from tether.broker.nats_config import CLUSTER, write_ops_files
from tether.process.data_dir import Home
from tether.process.os_process import die_with_parent

JETSTREAM_KEY = "key-of-the-tests-0123456789abcdef"
SHIPPED = Path(__file__).parents[3] / "ops" / "nats"


@dataclass
class Node:
    """One server of a shipped file, moved to free loopback ports and a folder of its own."""

    config: Path
    client: int
    monitor: int
    route: int
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=lambda: {"NATS_JETSTREAM_KEY": JETSTREAM_KEY})

    @property
    def url(self) -> str:
        scheme = "tls" if "tls {" in self.config.read_text() else "nats"
        return f"{scheme}://127.0.0.1:{self.client}"

    def start(self, binary: Binary) -> None:
        self.process = subprocess.Popen(
            [binary.path, "-c", self.config],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
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
    """Ports that no connection is given by chance before the server takes them: below those that Linux hands out."""
    found: list[int] = []
    while len(found) < count:
        port = 12_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return list(dict.fromkeys(found)) if len(set(found)) == count else free_ports(count)


def nodes(folder: Path, home: Home, names: list[str]) -> list[Node]:
    """The files ``names`` as :class:`Node`; the hosts of the cluster become its route ports."""
    ports = free_ports(3 * len(names))
    made = []
    for index, name in enumerate(names):
        client, monitor, route = ports[3 * index : 3 * index + 3]
        place = folder / name
        write_ops_files(place, home)
        text = (place / f"{name}.conf").read_text()
        text = text.replace("/etc/nats/tls", str(home.tls_file(""))).replace("/data", str(place / "data"))
        text = text.replace("0.0.0.0:4222", f"127.0.0.1:{client}").replace("127.0.0.1:8222", f"127.0.0.1:{monitor}")
        text = text.replace("127.0.0.1:4222", f"127.0.0.1:{client}").replace('".tether/nats"', f'"{place}/data"')
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
