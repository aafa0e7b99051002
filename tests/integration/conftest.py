"""A platform inside the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from support.brokers.brokers import Broker
from support.platform.services import Services, services

from tether.settings import Settings


@pytest.fixture
def unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python models of this test may tell it by files how far they are: it is about something else than what they may do."""
    defaults = Settings.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "model_confinement", "off")


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
