"""A platform that hostile clients meet: short times, so that tests of slow clients are fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.http.served import Served, served
from support.models import models

from tether.broker.embedded_server import Binary

CONNECTIONS = 64


@pytest.fixture(scope="session")
def target(nats_binary: Binary) -> Iterator[Served]:
    with served(nats_binary, body_timeout_s=1.0, header_timeout_s=1.0, max_connections=CONNECTIONS) as running:
        running.push("bump", models.add())
        yield running
