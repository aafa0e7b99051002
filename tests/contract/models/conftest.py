"""Tenants, and a name that several of them may give to a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from support.http.served import Served
from support.http.tenant_http import Tenant, tenants

_numbers = itertools.count()


@pytest.fixture
def name() -> str:
    return f"same-{next(_numbers)}"


@pytest.fixture
def tenant(served: Served) -> Iterator[Callable[[str], Tenant]]:
    with tenants(served) as made:
        yield made


@pytest.fixture
def one(tenant: Callable[[str], Tenant]) -> Tenant:
    return tenant(f"one-{next(_numbers)}")


@pytest.fixture
def two(tenant: Callable[[str], Tenant]) -> Tenant:
    return tenant(f"two-{next(_numbers)}")


@pytest.fixture
def default(tenant: Callable[[str], Tenant]) -> Tenant:
    return tenant("default")
