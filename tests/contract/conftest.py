"""Fixtures of the tests over HTTP: clients of the shared platform, and ``tritonclient`` for those of conformance."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import tritonclient.http as triton
from support.http.oip_cases import MODELS
from support.http.served import Served

from tether import Client


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture
def sdk(served: Served) -> Iterator[Client]:
    with Client(served.url, served.key) as client:
        yield client


@pytest.fixture(scope="session")
def oip(served: Served) -> Served:
    for name, content in MODELS.items():
        served.push(name, content)
    return served


@pytest.fixture
def client(oip: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(oip.url.removeprefix("http://"), network_timeout=60) as made:
        yield made


@pytest.fixture
def headers(oip: Served) -> dict[str, str]:
    return dict(oip.headers)
