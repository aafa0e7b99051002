"""Fixtures that every suite shares. ``--broker=container`` runs the same tests on a server in a container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from brokers import Broker, StartBroker, container, embedded, server_binary, temporary_home

from tether.bus.server import Binary
from tether.home import Home


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--broker", choices=("embedded", "container"), default="embedded", help="where nats-server runs")


@pytest.fixture(scope="session")
def nats_binary() -> Binary:
    return server_binary()


@pytest.fixture
def home() -> Iterator[Home]:
    """A fresh home with the keys of every role and of two workers."""
    with temporary_home() as made:
        yield made


@pytest.fixture
def start_broker(home: Home, request: pytest.FixtureRequest) -> StartBroker:
    """Start a broker with other settings than the default; it has the keys of ``home``."""
    if request.config.getoption("--broker") == "container":
        return lambda **changes: container(home, **changes)
    binary: Binary = request.getfixturevalue("nats_binary")
    return lambda **changes: embedded(home, binary, **changes)


@pytest.fixture
async def broker(start_broker: StartBroker) -> AsyncIterator[Broker]:
    """A broker of the test's own: nothing of another test is in it."""
    async with start_broker() as running:
        yield running


@pytest.fixture
async def embedded_broker(home: Home, nats_binary: Binary) -> AsyncIterator[Broker]:
    """The embedded server whatever ``--broker`` says, for tests that kill and restart it."""
    async with embedded(home, nats_binary) as running:
        yield running
