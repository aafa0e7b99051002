"""Several requests at a time: as many as allowed, their results in order, and an error that ends the others."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from support.http.http_servers import serving

from tether import AsyncClient, Client
from tether.client.protocol import Concurrently, Flow, Request, RetryPolicy, exchange
from tether.errors import NotFound

WIDTH = 3


class Crowd:
    """Answers nobody until ``WIDTH`` are there, so that fewer at a time would wait for ever; counts who is there."""

    def __init__(self, of: int) -> None:
        self.most = self.here = self.asked = 0
        self._lock = threading.Lock()
        self._together = threading.Barrier(WIDTH, timeout=20)
        self._whole = of - of % WIDTH

    def __call__(self, request: BaseHTTPRequestHandler, _body: bytes) -> tuple[int, Any]:
        with self._lock:
            self.asked += 1
            self.here += 1
            self.most = max(self.most, self.here)
            waits = self.asked <= self._whole
        if waits:
            self._together.wait()
        with self._lock:
            self.here -= 1
        return 200, request.path.encode()


def asked(policy: RetryPolicy, paths: list[str], told: list[str]) -> Flow[list[str]]:
    def one(path: str) -> Flow[str]:
        return (yield from exchange(policy, Request("GET", path))).body.decode()

    return (yield Concurrently(map(one, paths), WIDTH, told.append))  # type: ignore[no-any-return]


PATHS = [f"/{number}" for number in range(11)]


def test_blocking_requests_go_side_by_side() -> None:
    crowd, told = Crowd(len(PATHS)), list[str]()
    with serving(crowd) as url, Client(url) as client:
        assert client.run(lambda policy: asked(policy, PATHS, told)) == PATHS
    assert (crowd.most, sorted(told)) == (WIDTH, sorted(PATHS))


async def test_asynchronous_requests_go_side_by_side() -> None:
    crowd, told = Crowd(len(PATHS)), list[str]()
    with serving(crowd) as url:
        async with AsyncClient(url) as client:
            assert await client.run(lambda policy: asked(policy, PATHS, told)) == PATHS
    assert (crowd.most, sorted(told)) == (WIDTH, sorted(PATHS))


def refuse_two(request: BaseHTTPRequestHandler, _body: bytes) -> tuple[int, Any]:
    if request.path == "/2":
        return 404, {"error": "there is no two", "code": "not_found", "request_id": "r"}
    return 200, request.path.encode()


def test_an_error_ends_the_others_and_leaves_no_thread() -> None:
    many, told = [f"/{number}" for number in range(1000)], list[str]()
    with serving(refuse_two) as url, Client(url) as client:
        with pytest.raises(NotFound, match="no two"):
            client.run(lambda policy: asked(policy, many, told))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tether-client")]
    assert len(told) < 20


async def test_an_error_ends_the_others_and_leaves_no_task() -> None:
    many, told = [f"/{number}" for number in range(1000)], list[str]()
    with serving(refuse_two) as url:
        async with AsyncClient(url) as client:
            with pytest.raises(NotFound, match="no two"):
                await client.run(lambda policy: asked(policy, many, told))
            assert not [task for task in asyncio.all_tasks() if task.get_name() == "client-flow"]
    assert len(told) < 20
