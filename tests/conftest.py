"""Fixtures that every suite shares.

A test that uses ``broker`` runs on the embedded server and, where TETHER_TEST_NATS_IMAGE names an image, once more on a
server in a container when its file is one of :data:`BOTH`; ``--broker container`` runs all of them in containers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.brokers.brokers import (
    IMAGE_VARIABLE,
    Broker,
    StartBroker,
    container,
    embedded,
    server_binary,
    temporary_home,
)
from support.http.served import Served
from support.http.served import served as serving
from support.suite import alone, groups

from tether.broker.embedded_server import Binary
from tether.process.data_dir import Home


def pytest_configure() -> None:
    """A job in the background of a shell ignores SIGINT, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--broker", choices=("embedded", "container"), help="run on one kind of broker only")


BOTH = ("bus", "inference", "jobs", "modelstore", "server", "tls", "zero_trust")
"""Files (``test_X.py``) about what the broker does with us, which is another one in a container: synced, and far away."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "start_broker" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--broker")
        both = metafunc.module.__name__.removeprefix("test_") in BOTH
        containers = both and (IMAGE_VARIABLE in os.environ or "CI" in os.environ)
        kinds = [chosen] if chosen else ["embedded", "container"] if containers else ["embedded"]
        marked = [pytest.param(kind, marks=pytest.mark.container if kind == "container" else ()) for kind in kinds]
        metafunc.parametrize("start_broker", marked, indirect=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """After they were put into a random order: what is to be alone begins, and then the longest groups."""
    items.sort(key=lambda item: groups.rank(item.nodeid))
    for item in items:
        if groups.group_of(item.nodeid) == groups.ALONE:
            item.add_marker(pytest.mark.alone)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> groups.ByGroup:
    """How the suite is shared among processes."""
    return groups.ByGroup(config, log)


_PLACES = pytest.StashKey[alone.Places]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Before any fixture is set up, and before a test's time counts."""
    locks = os.environ.get("TETHER_TEST_LOCKS")
    if not locks:
        return (yield)
    places = item.config.stash.setdefault(_PLACES, alone.Places(Path(locks)))
    with places.place(alone=_alone(item), then_alone=nextitem is not None and _alone(nextitem)):
        return (yield)


def _alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


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
    if request.param == "container":
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


@pytest.fixture(scope="session")
def served(nats_binary: Binary) -> Iterator[Served]:
    """A whole platform behind HTTP, shared: a test that changes it names what it makes after itself."""
    with serving(nats_binary) as running:
        yield running
