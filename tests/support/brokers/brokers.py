"""A broker for a test: the embedded server, or the same configuration in a container."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.brokers.broker_users import add_operator, new_seed

from tether.broker.embedded_server import Binary, EmbeddedServer, find_server
from tether.broker.nats_config import write_ops_files
from tether.errors import ConfigError
from tether.identity.keys import create_home
from tether.process.data_dir import Home
from tether.settings import Settings

IMAGE_VARIABLE = "TETHER_TEST_NATS_IMAGE"


@dataclass
class Broker:
    """A running broker and the home whose keys it knows. ``server`` is None when it runs in a container."""

    home: Home
    settings: Settings
    monitor: str
    server: EmbeddedServer | None = None
    operator_seed: str = ""
    """Of a user of a broker in a container who may do everything; one is added to an embedded broker where a test needs it."""

    @property
    def url(self) -> str:
        return self.settings.nats_url


StartBroker = Callable[..., contextlib.AbstractAsyncContextManager[Broker]]
"""Called with settings to change, e.g. ``start_broker(max_memory_mb=64)``."""


@contextlib.contextmanager
def temporary_home(workers: int = 2) -> Iterator[Home]:
    """A home with all keys, in a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tether-test-"))
    try:
        home = Home.at(str(folder))
        create_home(home, workers=workers)
        yield home
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def server_binary() -> Binary:
    """The server binary; without one the test is skipped, except in CI."""
    try:
        return find_server(Settings())
    except ConfigError as error:
        _absent(str(error))
        raise


def _absent(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.asynccontextmanager
async def embedded(home: Home, binary: Binary, **changes: Any) -> AsyncIterator[Broker]:
    # nobody pulls the plug of a test, and a disk that is shared syncs slowly
    settings = Settings(**{"home": str(home.root), "durability": "fast", **changes})
    async with EmbeddedServer(home, settings, binary=binary) as server:
        yield Broker(home, dataclasses.replace(settings, nats_url=server.url), server.monitor, server)


@contextlib.asynccontextmanager
async def container(home: Home, **changes: Any) -> AsyncIterator[Broker]:
    """The image of TETHER_TEST_NATS_IMAGE under the shipped ``container.conf``."""
    image = os.environ.get(IMAGE_VARIABLE, "")
    if not image:
        _absent(f"{IMAGE_VARIABLE} does not name a nats-server image")
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    os.environ.setdefault("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - only where containers run
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy  # noqa: PLC0415

    settings = Settings(home=str(home.root), durability="durable", **changes)
    folder = home.root / "nats-config"
    files = write_ops_files(folder, home, partitions=settings.partitions)
    started = DockerContainer(image).with_exposed_ports(4222, 8222).with_command("-c /etc/tether/container.conf")
    started = started.waiting_for(LogMessageWaitStrategy("Server is ready"))
    seed = new_seed()
    add_operator(folder / "permissions.conf", seed)
    for file in files:
        started = started.with_copy_into_container(file, f"/etc/tether/{file.name}")
    with contextlib.closing(started.get_docker_client().client), started as running:
        host = running.get_container_host_ip()
        client, monitor = running.get_exposed_port(4222), running.get_exposed_port(8222)
        settings = dataclasses.replace(settings, nats_url=f"nats://{host}:{client}")
        yield Broker(home, settings, f"http://{host}:{monitor}", operator_seed=seed)


async def wait_until(
    true: Callable[[], Awaitable[bool]] | Callable[[], bool], what: str, timeout_s: float = 15.0
) -> None:
    """Wait for a condition; a test that times out says what it waited for."""
    end = asyncio.get_running_loop().time() + timeout_s
    while True:
        found = true()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return
        if asyncio.get_running_loop().time() > end:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.02)
