"""Bodies and headers that are too large, too slow, too many or never end: a typed answer, and memory stays flat."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from support.http.served import Served, until
from support.http.wire import Raw, chunked, connected, exchange, receive, request

INFER = "POST /v2/models/bump/infer HTTP/1.1"
INFERENCE = "POST /v1/inference HTTP/1.1"
GOOD = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
SIMPLE = b'{"modelId": "bump", "inputData": [[1, 2, 3, 4]]}'
ROUTES = [(INFER, GOOD), (INFERENCE, SIMPLE)]


def headed(target: Served, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("x-api-key", target.key), *more]


def whole(target: Served, line: str, body: bytes) -> Raw:
    return exchange(target.url, request(line, headed(target, ("content-length", str(len(body)))), body))


@contextlib.contextmanager
def memory_stays_flat(limit_mb: float = 20.0) -> Iterator[None]:
    """The gateway runs in this process, and so does the test: what either keeps counts."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    grown = (process.memory_info().rss - before) / 1e6
    assert grown < limit_mb, f"{grown:.1f} MB more"


@pytest.mark.parametrize(("line", "body"), ROUTES)
def test_the_same_requests_are_answered_when_they_are_well(target: Served, line: str, body: bytes) -> None:
    assert whole(target, line, body).status == 200
    chunks = chunked([body[:9], body[9:]]) + b"0\r\n\r\n"
    assert exchange(target.url, request(line, headed(target, ("transfer-encoding", "chunked")), chunks)).status == 200


@pytest.mark.parametrize(("line", "body"), ROUTES)
def test_a_body_over_the_limit_is_refused_before_it_is_read(target: Served, line: str, body: bytes) -> None:
    del body
    sent = request(line, headed(target, ("content-length", str(1 << 40))))
    answer = exchange(target.url, sent)
    assert (answer.status, answer.code) == (413, "payload_too_large")


@pytest.mark.parametrize(("line", "body"), ROUTES)
def test_an_endless_chunked_body_is_refused_at_the_limit(target: Served, line: str, body: bytes) -> None:
    del body
    head = request(line, headed(target, ("transfer-encoding", "chunked")))
    with memory_stays_flat(40):
        answer = exchange(target.url, [head, *[chunked([b" " * 65536])] * 400])
    assert (answer.status, answer.code) == (413, "payload_too_large")


@pytest.mark.parametrize(("line", "body"), [*ROUTES, ("POST /v1/models/tiny/versions HTTP/1.1", b"")])
def test_a_million_tiny_chunks_are_refused_after_a_few_thousand(target: Served, line: str, body: bytes) -> None:
    del body
    head = request(line, headed(target, ("transfer-encoding", "chunked")))
    tiny = chunked([b" "]) * 10_000
    began = time.monotonic()
    with memory_stays_flat():
        answer = exchange(target.url, [head, *[tiny] * 100])
    assert (answer.status, answer.code) == (413, "payload_too_large")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("line", "body"), ROUTES)
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_stops_is_given_up(target: Served, line: str, body: bytes, *, announced: bool) -> None:
    head = ("content-length", str(len(body) + 1)) if announced else ("transfer-encoding", "chunked")
    sent = body if announced else chunked([body])
    answer = exchange(target.url, request(line, headed(target, head), sent))
    assert (answer.status, answer.code, answer.closed) == (408, "request_timeout", True)
    assert "body_timeout_s" in answer.json()["error"]


def test_a_body_that_trickles_is_given_up_though_it_never_rests(target: Served) -> None:
    with connected(target.url) as made:
        made.sendall(request(INFER, headed(target, ("content-length", "1000"))))
        began = time.monotonic()
        made.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - began < 10:
            with contextlib.suppress(TimeoutError):
                made.sendall(b" ")
                answer = made.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    assert 0.9 < time.monotonic() - began < 5


def test_an_upload_that_stops_is_given_up_and_nothing_is_served(target: Served) -> None:
    head = request("POST /v1/models/stopped/versions HTTP/1.1", headed(target, ("content-length", "1000")), b"part")
    answer = exchange(target.url, head)
    assert (answer.status, answer.code) == (408, "request_timeout")
    with target.client() as http:
        assert http.get("/v1/models/stopped").status_code == 404


@pytest.mark.parametrize(("line", "body"), ROUTES)
@pytest.mark.parametrize(
    ("header", "before", "after"),
    [
        (("transfer-encoding", "chunked"), b"%x\r\n", b"\r\n"),
        (("transfer-encoding", "chunked"), b"%x\r\n", b"\r\nZZ\r\n"),
        (("transfer-encoding", "chunked"), b"%x\r\n", b"\r\n1ffffffffffffffff\r\n"),
        (("content-length", "1000"), b"", b""),
    ],
)
def test_a_body_that_is_cut_off_is_not_taken_for_a_whole_one(
    target: Served, *, line: str, body: bytes, header: tuple[str, str], before: bytes, after: bytes
) -> None:
    """The JSON in it is complete, so only the framing tells."""
    start = before % len(body) if before else b""
    sent = request(line, headed(target, header), start + body + after)
    answer = exchange(target.url, sent, half_close=True)
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert "before the body was complete" in answer.json()["error"]


def test_a_model_file_that_is_cut_off_does_not_become_a_version(target: Served) -> None:
    from support.models import models  # noqa: PLC0415 - onnx takes a second to import

    line = "POST /v1/models/cutoff/versions HTTP/1.1"
    sent = request(line, headed(target, ("transfer-encoding", "chunked")), chunked([models.add(3)]))
    assert exchange(target.url, sent, half_close=True).status == 400
    with target.client() as http:
        assert http.get("/v1/models/cutoff").status_code == 404


def test_headers_that_do_not_end_are_given_up(target: Served) -> None:
    began = time.monotonic()
    answer = exchange(target.url, b"GET /v2 HTTP/1.1\r\nhost: test\r\nx-slow:")
    assert answer.closed
    assert answer.status in (0, 408)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (request("GET /v2 HTTP/1.1", [("x", "a" * 200_000)]), (431,)),
        (request("GET /v2 HTTP/1.1", [("x", "a" * 5_000_000)]), (431, 0)),
        (request("GET /v2 HTTP/1.1", [(f"x{number}", "1") for number in range(500)]), (431,)),
        (request("GET /v2 HTTP/1.1", [("x", "1")] * 100_000), (431, 0)),
        (request(f"GET /{'a' * 200_000} HTTP/1.1"), (414, 431)),
        (request(f"GET /v2?{'a=1&' * 100_000} HTTP/1.1"), (414, 431, 0)),
    ],
    ids=["one of 200 kB", "one of 5 MB", "500", "100,000", "path", "query"],
)
def test_headers_that_are_too_large_or_too_many_are_refused(
    target: Served, sent: bytes, statuses: tuple[int, ...]
) -> None:
    """A connection that is cut while we still send shows as status 0."""
    with memory_stays_flat():
        answer = exchange(target.url, sent)
    assert answer.status in statuses
    assert answer.closed


def test_slow_connections_do_not_keep_others_out(target: Served) -> None:
    """All of a gateway's connections are taken by clients that say nothing: they are dropped, and others get in."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            made: socket.socket = stack.enter_context(connected(target.url))
            made.sendall(b"POST /v1/jobs HTTP/1.1\r\nhost: test\r\n")
        answer = exchange(target.url, request("GET /v2/health/live HTTP/1.1"))
    assert answer.status == 200


def test_many_connections_at_rest_are_served_side_by_side(target: Served) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(target.url)) for _ in range(50)]
        for made in held:
            made.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: test\r\n\r\n")
        assert all(made.recv(65536).startswith(b"HTTP/1.1 200") for made in held)
        assert receive(held[0]).closed, "a connection at rest is ended by the server"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_bomb_is_refused_at_the_limit(target: Served, encoding: str) -> None:
    import zlib  # noqa: PLC0415

    compress = gzip.compress if encoding == "gzip" else zlib.compress
    bomb = compress(b" " * (200 << 20), 9)
    assert len(bomb) < 300_000
    sent = request(INFER, headed(target, ("content-encoding", encoding), ("content-length", str(len(bomb)))), bomb)
    with memory_stays_flat(40):
        answer = exchange(target.url, sent)
    assert (answer.status, answer.code) == (413, "payload_too_large")


def test_the_gateway_is_well_afterwards(target: Served) -> None:
    until(lambda: whole(target, INFER, GOOD).status == 200, "it answers")
