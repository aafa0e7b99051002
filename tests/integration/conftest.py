"""A platform inside the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from brokers import Broker
from services import Services, services


@pytest.fixture
async def one(broker: Broker) -> AsyncIterator[Services]:
    """All services and one worker."""
    async with services(broker, workers=1) as running:
        yield running


@pytest.fixture
async def restartable(embedded_broker: Broker) -> AsyncIterator[tuple[Broker, Services]]:
    """The same on a broker that the test may kill."""
    async with services(embedded_broker, workers=1) as running:
        yield embedded_broker, running
