"""Requests that two parsers could read differently: one answer and the connection ends, or exactly one meaning."""

from __future__ import annotations

import json
import re

import pytest
from support.http.served import Served
from support.http.wire import connected, exchange, receive, request

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
INFER = "POST /v2/models/bump/infer HTTP/1.1"
SIZE = str(len(BODY))


@pytest.mark.parametrize(
    "headers",
    [
        [("content-length", SIZE), ("content-length", "5")],
        [("content-length", f"{SIZE}, {SIZE}")],
        [("content-length", f"+{SIZE}")],
        [("content-length", "-1")],
        [("content-length", f"0x{len(BODY):x}")],
        [("content-length", "9" * 40)],
        [("transfer-encoding", "identity")],
        [("transfer-encoding", "xchunked")],
        [("transfer-encoding", "chunked, identity")],
        [("transfer-encoding ", "chunked")],
        [("transfer-encoding", "chunked\r\n x")],
    ],
    ids=str,
)
def test_an_ambiguous_length_is_refused_and_the_connection_ends(target: Served, headers: list[tuple[str, str]]) -> None:
    answer = exchange(target.url, request(INFER, [("x-api-key", target.key), *headers], BODY))
    assert answer.status in (400, 413)
    assert answer.closed
    assert answer.data.count(b"HTTP/1.1") == 1


def test_with_both_lengths_the_chunks_count_and_nothing_is_left_over(target: Served) -> None:
    """RFC 9112, 6.3: Transfer-Encoding overrides, and the connection is not used again."""
    smuggled = b"GET /v2/health/live HTTP/1.1\r\nhost: test\r\n\r\n"
    lines = f"{INFER}\r\nhost: t\r\nx-api-key: {target.key}\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = exchange(target.url, lines.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + smuggled)
    assert answer.status == 200
    assert answer.closed
    assert answer.data.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("line", "statuses"),
    [
        ("GET http://elsewhere/v2 HTTP/1.1", (200,)),
        ("CONNECT elsewhere:443 HTTP/1.1", (404,)),
        ("OPTIONS * HTTP/1.1", (404,)),
        ("TRACE /v2 HTTP/1.1", (405,)),
        ("GET //v2 HTTP/1.1", (404,)),
        ("GET /v2/ HTTP/1.1", (404,)),
        ("GET /v2/../v2 HTTP/1.1", (404,)),
        ("GET /v1/../../etc/passwd HTTP/1.1", (404,)),
        ("GET /v2/models/a%2Fb HTTP/1.1", (401,)),
        ("GET /v2 HTTP/9.9", (400, 505, 0)),
        ("GET /v2", (400, 0)),
        ("PRI * HTTP/2.0\r\n\r\nSM", (400, 505, 0)),
        ("\x16\x03\x01\x02\x00\x01", (400, 0)),
    ],
)
def test_unusual_targets_and_methods_mean_nothing_more(target: Served, line: str, statuses: tuple[int, ...]) -> None:
    answer = exchange(target.url, request(line), timeout_s=5)
    assert answer.status in statuses, answer
    assert b"passwd:" not in answer.data


@pytest.mark.parametrize("header", ["x-http-method-override", "x-method-override", "x-original-url", "x-rewrite-url"])
def test_no_header_changes_method_or_path(target: Served, header: str) -> None:
    headers = [("x-api-key", target.key), (header, "DELETE"), ("x-forwarded-prefix", "/v1/keys")]
    answer = exchange(target.url, request("GET /v2/health/live HTTP/1.1", headers))
    assert answer.json() == {"live": True}


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0"])
def test_no_connection_becomes_another_protocol(target: Served, upgrade: str) -> None:
    headers = [
        ("upgrade", upgrade),
        ("connection", "upgrade, http2-settings"),
        ("http2-settings", "AAMAAABkAAQAAP__"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-version", "13"),
    ]
    answer = exchange(target.url, request("GET /v2/health/live HTTP/1.1", headers), timeout_s=5)
    assert answer.status == 200
    assert b"101" not in answer.data[:20]


def test_a_range_is_passed_over(target: Served) -> None:
    ranges = ",".join(f"{start}-" for start in range(5000))
    answer = exchange(target.url, request("GET /openapi.json HTTP/1.1", [("range", f"bytes={ranges}")]))
    assert answer.status == 200
    assert json.loads(answer.body)["openapi"] == "3.1.0"


def test_requests_in_a_row_are_answered_in_their_order(target: Served) -> None:
    """Pipelined requests of two meanings do not get each other's answers."""
    one = b"GET /v2/health/live HTTP/1.1\r\nhost: t\r\n\r\n"
    two = b"GET /v2/nothing HTTP/1.1\r\nhost: t\r\n\r\n"
    with connected(target.url, 5) as made:
        made.sendall((one + two) * 20)
        found = receive(made).data
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", found)
    assert statuses == [b"200", b"404"] * 20
