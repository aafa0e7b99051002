"""A login that may do everything: what somebody does who runs the broker, for tests that change or break what is stored there."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.brokers.broker_users import add_operator, new_seed
from support.brokers.brokers import Broker, wait_until

from tether.broker.embedded_server import _running_on
from tether.bus.bus import Bus
from tether.bus.session import connect, prepare
from tether.bus.tls import client_context
from tether.errors import BrokerUnavailable, ConfigError
from tether.process.data_dir import Home
from tether.settings import Settings


@asynccontextmanager
async def as_operator(home: Home, settings: Settings, seed: str) -> AsyncIterator[Bus]:
    """A connection of the user that :func:`add_operator` added, as soon as the broker knows it."""
    bus, _ = prepare(settings, home, "admin")

    async def connected() -> bool:
        try:
            await bus.open_connection(seed, client_context(settings, home))
        except (BrokerUnavailable, ConfigError):
            return False
        return True

    await wait_until(connected, "the broker has read its users")
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def operator(home: Home, settings: Settings) -> AsyncIterator[Bus]:
    """:func:`as_operator` on the embedded broker of a home."""
    found = _running_on(home)
    assert found is not None
    seed = new_seed()
    add_operator(home.nats_config, seed)
    os.kill(found[0], signal.SIGHUP)
    async with as_operator(home, settings, seed) as bus:
        yield bus


@asynccontextmanager
async def operator_of(broker: Broker) -> AsyncIterator[Bus]:
    """:func:`as_operator` on a test's broker, of either kind."""
    home, settings, seed = broker.home, broker.settings, broker.operator_seed
    async with as_operator(home, settings, seed) if seed else operator(home, settings) as bus:
        yield bus


async def reconfigure(home: Home, settings: Settings, stream: str, **changes: object) -> None:
    """Change fields of a stream's configuration, as an administrator may."""
    async with connect(settings, home, "admin", follow=False) as bus:
        config = (await bus.api(f"STREAM.INFO.{stream}"))["config"]
        await bus.api(f"STREAM.UPDATE.{stream}", {**config, **changes})
