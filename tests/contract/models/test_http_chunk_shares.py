"""One tenant's model chunks leave room for another one's, without a quota."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.brokers.operators import reconfigure
from support.http.served import Served
from support.http.tenant_http import Tenant, tenants

ROOM = 2_000_000
CHUNK = 50_000


@pytest.fixture
def tight(served: Served) -> Iterator[str]:
    """The store of the chunks of every model has room for :data:`ROOM` bytes more; its stream."""
    services = served.services
    streams = [services.bus.names.object_stream(bucket) for bucket in services.bus.names.chunk_buckets()]
    before = {stream: served.run(services.bus.api(f"STREAM.INFO.{stream}")) for stream in streams}

    def bound(most: dict[str, int]) -> None:
        for stream, value in most.items():
            served.run(reconfigure(services.home, services.settings, stream, max_bytes=value))

    bound({stream: info["state"]["bytes"] + ROOM for stream, info in before.items()})
    yield streams[0]
    bound({stream: info["config"]["max_bytes"] for stream, info in before.items()})


def put(tenant: Tenant, content: bytes) -> httpx.Response:
    return tenant.http.put(f"/v1/models/m/chunks/{hashlib.sha256(content).hexdigest()}", content=content)


def filled(tenant: Tenant, size: int, most: int) -> tuple[int, httpx.Response]:
    """How many chunks a tenant put before it was refused, and the refusal."""
    for number in range(most):
        answer = put(tenant, os.urandom(size))
        if answer.status_code != 201:
            return number, answer
    raise AssertionError("nothing was refused")


def test_a_tenant_that_fills_the_store_of_chunks_leaves_room(served: Served, tight: str) -> None:
    with tenants(served) as made:
        greedy, modest = made("greedy-chunks"), made("modest-chunks")
        count, refused = filled(greedy, CHUNK, 2 * ROOM // CHUNK)
        assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
        assert "tenant 'greedy-chunks' has" in refused.json()["error"]
        assert "max_file_mb" in refused.json()["error"]
        info: dict[str, Any] = served.run(served.services.bus.api(f"STREAM.INFO.{tight}"))
        used = 1 - (info["config"]["max_bytes"] - info["state"]["bytes"]) / ROOM
        assert 0.6 < used < 0.95, count
        assert [put(modest, os.urandom(CHUNK)).status_code for _ in range(2)] == [201, 201]
        assert put(greedy, os.urandom(CHUNK)).status_code == 429
