"""Fixtures of the conformance tests with ``tritonclient``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tritonclient.http as triton
from oip_cases import MODELS
from served import Served


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
