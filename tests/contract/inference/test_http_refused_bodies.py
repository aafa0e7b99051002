"""After a body that nobody wanted: what its sender reads, and what becomes of the connection."""

from __future__ import annotations

import socket
from http.client import HTTPResponse
from urllib.parse import urlsplit

import pytest
from support.http.served import Served

PATHS = ["/v2/models/kept/infer", "/v1/jobs", "/v1/models/kept/versions"]


def answers(served: Served, *requests: bytes) -> list[tuple[int, dict[str, str]]]:
    """Status and headers of each, asked one after the other over one connection."""
    address, found = urlsplit(served.url), []
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        for request in requests:
            connection.sendall(request)
            answer = HTTPResponse(connection)
            answer.begin()
            answer.read()
            found.append((answer.status, {name.lower(): value for name, value in answer.headers.items()}))
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunked", [True, False])
def test_after_a_refused_body_the_connection_answers_the_next_request(
    served: Served, path: str, *, chunked: bool
) -> None:
    """As a client with a pool expects it, which takes a connection that was not closed for free."""
    body = b" " * ((6 << 20) + 1)
    digest = "x-tether-sha256: short\r\n"  # of a model's file: refused before it is read
    length = "transfer-encoding: chunked" if chunked else f"content-length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\nhost: t\r\nx-api-key: {served.key}\r\n{digest}{length}\r\n\r\n".encode()
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    get = b"GET /v2/health/live HTTP/1.1\r\nhost: t\r\n\r\n"
    (refused, headers), (next_one, _) = answers(served, head + sent, get)
    assert refused in (400, 404, 413)
    assert headers.get("connection", "keep-alive") == "keep-alive"
    assert next_one == 200


def test_a_connection_whose_body_does_not_end_is_closed_with_the_answer(served: Served) -> None:
    for line in (f"content-length: {10**9}", f"content-length: {10**9}\r\nexpect: 100-continue"):
        head = f"POST /v1/models/kept/versions HTTP/1.1\r\nhost: t\r\n{line}\r\n\r\n".encode()
        ((status, headers),) = answers(served, head)
        assert (status, headers["connection"]) == (401, "close")
