"""Requests that the HTTP server refuses before the gateway sees them: a status without a body, and the connection ends."""

from __future__ import annotations

import pytest
from support.http.served import Served
from support.http.wire import exchange, request

from tether import Client
from tether.errors import InvalidRequest

INFER = "POST /v2/models/bump/infer HTTP/1.1"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("GET /v2 HTTP/1.1", [("x", "a" * 200_000)]), 431),
        (request("GET /v2 HTTP/1.1", [(f"x{number}", "1") for number in range(101)]), 431),
        (request(f"GET /{'a' * 65_535} HTTP/1.1"), 414),
        (request(INFER, [("content-length", "2"), ("content-length", "5")], b"{}"), 400),
        (request(INFER, [("content-length", "-1")], b"{}"), 400),
        (request(INFER, [("transfer-encoding", "identity")], b"{}"), 400),
        (request("GET /v2 HTTP/3.0"), 400),
        (request("GET /v2"), 400),
        (request("GET  /v2 HTTP/1.1"), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32), 400),
        (request("GET /v2 HTTP/1.1", [("x y", "1")]), 400),
    ],
    ids=[
        "header",
        "headers",
        "path",
        "two lengths",
        "negative length",
        "coding",
        "version",
        "no version",
        "spaces",
        "TLS",
        "name",
    ],
)
def test_the_http_server_answers_alone_with_a_status_and_no_body(target: Served, sent: bytes, status: int) -> None:
    """Neither Granian nor the library below it (hyper) lets an application write this answer."""
    answer = exchange(target.url, sent)
    head = answer.data.partition(b"\r\n\r\n")[0].lower()
    assert (answer.status, answer.body, answer.closed) == (status, b"", True), answer.data
    assert b"content-length: 0" in head
    assert b"connection: close" in head


@pytest.mark.parametrize("length", [60_000, 70_000])
def test_a_client_that_is_given_too_long_a_name_says_so(target: Served, length: int) -> None:
    with Client(target.url, target.key) as client, pytest.raises(InvalidRequest, match=r"is not allowed|too long"):
        client.model("a" * length)
