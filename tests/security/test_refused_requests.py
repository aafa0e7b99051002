"""A refused request leaves nothing behind: an error that is kept by its own traceback keeps the request, and its connection open,
until the garbage collector comes, which a gateway has done seldom."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from support.http.served import Served
from support.http.wire import chunked, exchange, request

from tether.errors import TetherError

CHUNKED = ("transfer-encoding", "chunked")
HOT, COLD = "POST /v2/models/bump/infer HTTP/1.1", "POST /v1/models/m/rollback HTTP/1.1"
CASES = [
    (HOT, True, chunked([b"{"]), 408),
    (COLD, True, chunked([b"{"]), 408),
    (HOT, True, chunked([b"{", b""]), 400),
    (COLD, True, chunked([b"{", b""]), 400),
    (HOT, False, chunked([b"{}", b""]), 401),
    (COLD, False, chunked([b"{}", b""]), 401),
    ("POST /v2/models/none/infer HTTP/1.1", True, chunked([b"{}", b""]), 404),
    ("GET /v1/models/none HTTP/1.1", True, b"", 404),
]


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def errors() -> list[TetherError]:
    return [thing for thing in gc.get_objects() if isinstance(thing, TetherError)]


@pytest.mark.parametrize(("line", "keyed", "body", "status"), CASES)
@pytest.mark.usefixtures("uncollected")
def test_no_error_outlives_its_answer(target: Served, line: str, body: bytes, status: int, *, keyed: bool) -> None:
    before = set(map(id, errors()))
    headers = [("x-api-key", target.key)] if keyed else []
    answer = exchange(target.url, request(line, [*headers, CHUNKED] if body else headers, body))
    assert answer.status == status
    assert [error for error in errors() if id(error) not in before] == []
    assert answer.closed
