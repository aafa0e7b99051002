"""What holds for every route: documentation, keys, errors, request ids, CORS, hostile bodies."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openapi_spec_validator
import pytest
from granian.constants import Interfaces
from starlette.applications import Starlette
from support.http.documented import Document
from support.http.served import Served
from support.models import models

from tether.gateway_http.access.authentication import ANY_SCOPE
from tether.gateway_http.api import app, path_matching, route_table
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.http import rsgi
from tether.process import operations_server

ROWS = route_table.table()
SCOPED = [row for row in ROWS if row.scope is not None]
ERROR_FIELDS = {"error", "code", "request_id"}


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("api", models.add())
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


def path_of(row: RouteSpec) -> str:
    return re.sub(r"\{\w+\}", "x", row.path)


def named(row: RouteSpec) -> str:
    return f"{row.method} {row.path}"


def assert_error(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    """A typed error in one line that tells nothing of the machine."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == ERROR_FIELDS
    assert body["code"] == code, body
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "\n" not in body["error"]
    assert "Traceback" not in answer.text
    assert "/tether/" not in answer.text
    for word in words:
        assert word in body["error"], body["error"]


# documentation


def test_the_document_is_valid_openapi(document: Document) -> None:
    openapi_spec_validator.validate(document.content)
    assert document.content["openapi"] == "3.1.0"


def test_every_documented_operation_is_served(served: Served, document: Document) -> None:
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        for method, path, operation in document.operations():
            answer = client.request(method, re.sub(r"\{\w+\}", "x", path))
            assert answer.status_code == (401 if operation["security"] else 200), f"{method} {path}: {answer.text}"


def test_every_operation_has_its_own_id_and_says_what_it_needs(document: Document) -> None:
    ids = [operation["operationId"] for _, _, operation in document.operations()]
    assert len(ids) == len(set(ids))
    for method, path, operation in document.operations():
        assert operation["summary"], f"{method} {path}"
        assert "500" in operation["responses"]


def test_the_page_needs_nothing_from_elsewhere(http: httpx.Client, document: Document) -> None:
    answer = http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<script" not in answer.text
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", answer.text)
    for _, path, operation in document.operations():
        assert path in answer.text
        assert operation["operationId"] in answer.text
    for method in set(re.findall(r"class='method (\w+)'", answer.text)):
        assert f".{method} {{ background:" in answer.text, f"{method} is white on white"
    for target in re.findall(r"href='#([^']+)'", answer.text):
        assert f"id='{target}'" in answer.text


# operations


def test_health_readiness_and_metrics_need_no_key(served: Served, document: Document) -> None:
    with document.client(served, key="") as client:
        assert client.get("/healthz").json() == {"live": True}
        readiness = client.get("/readyz").json()
        assert readiness["ready"] is True
        assert readiness["checks"] == dict.fromkeys(("broker", "inference", "jobs", "results", "storage"), "ok")
        client.get("/nothing/here")
        exposed = client.get("/metrics").text
    assert 'tether_http_requests_total{route="/readyz",status="200"}' in exposed
    assert 'tether_http_requests_total{route="none",status="404"}' in exposed


# keys


@pytest.mark.parametrize("row", SCOPED, ids=named)
@pytest.mark.parametrize("headers", [{}, {"x-api-key": "tk_aaaaaaaa_" + "a" * 43}, {"authorization": "Basic Og=="}])
def test_without_a_valid_key_every_protected_route_says_the_same(
    served: Served, document: Document, row: RouteSpec, headers: dict[str, str]
) -> None:
    with httpx.Client(base_url=served.url, trust_env=False, event_hooks={"response": [document.check]}) as client:
        answer = client.request(row.method, path_of(row), headers=headers)
    assert_error(answer, 401, "unauthenticated")
    assert answer.json()["error"] == "Invalid API key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.fixture(scope="module")
def lesser_keys(served: Served) -> dict[str, str]:
    """For every scope a key that has all scopes but this one, and but admin."""
    scopes = ("infer", "jobs", "models:read", "models:write")
    return {wanted: served.new_key(*[scope for scope in scopes if scope != wanted]) for wanted in (*scopes, "admin")}


@pytest.mark.parametrize("row", [row for row in SCOPED if row.scope != ANY_SCOPE], ids=named)
def test_a_key_without_the_scope_is_forbidden(
    served: Served, document: Document, lesser_keys: dict[str, str], row: RouteSpec
) -> None:
    assert row.scope is not None
    with document.client(served, lesser_keys[row.scope]) as client:
        assert_error(client.request(row.method, path_of(row)), 403, "forbidden", f"'{row.scope}'")


# what is not there


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/", "/v1/jobs/", "/v2/models", "/v2/models/a/b/c", "/docs/", "/%2e%2e/etc/passwd", "//v2"]
)
def test_an_unknown_path_is_a_typed_404(http: httpx.Client, path: str) -> None:
    assert_error(http.get(path), 404, "not_found", "no route matches")


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_wrong_method_is_a_typed_405_that_names_the_right_ones(http: httpx.Client, row: RouteSpec) -> None:
    taken = {other.method for other in ROWS if other.path == row.path}
    wrong = next(method for method in ("PUT", "PATCH", "POST") if method not in taken)
    answer = http.request(wrong, path_of(row))
    assert_error(answer, 405, "invalid_request", wrong, row.method)
    assert row.method in answer.headers["allow"].split(", ")


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_options_tells_the_methods(http: httpx.Client, row: RouteSpec) -> None:
    answer = http.options(path_of(row))
    assert (answer.status_code, answer.content) == (204, b"")
    assert {row.method, "OPTIONS"} <= set(answer.headers["allow"].split(", "))


@pytest.mark.parametrize("path", ["/v2", "/healthz", "/v1/models", "/v1/models/api", "/docs", "/v1/jobs"])
def test_head_has_the_headers_of_get_and_no_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


# request ids


@pytest.mark.parametrize("path", ["/v2", "/nothing", "/v1/models/none", "/v1/jobs/x", "/openapi.json"])
def test_a_request_id_comes_back_and_is_made_when_there_is_none(http: httpx.Client, path: str) -> None:
    assert http.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {http.get(path).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert all(made)


@pytest.mark.parametrize("sent", [b"a" * 500, b"\xff\xfe", b"a\tb", b""])
def test_a_request_id_that_could_spoil_a_log_is_replaced(http: httpx.Client, sent: bytes) -> None:
    told = http.get("/v1/models/none", headers=[(b"x-request-id", sent)])
    assert re.fullmatch(r"[0-9a-f]{16}", told.headers["x-request-id"])


def test_hot_routes_repeat_the_request_id_too(http: httpx.Client) -> None:
    headers = {"x-request-id": "mine-2"}
    assert_error(http.post("/v1/jobs", content=b"{", headers=headers), 400, "bad_json")
    assert http.post("/v2/models/none/infer", content=b"{}", headers=headers).headers["x-request-id"] == "mine-2"


# hostile bodies

WITH_BODY = ("/v1/inference", "/v1/keys", "/v2/repository/index", "/v1/jobs", "/v1/jobs:batch", "/v2/models/api/infer")
SMALL_BODIES = ("/v1/keys", "/v2/repository/index")
NOT_JSON = {
    "no json": b"hello",
    "half": b'{"tenant": "a',
    "array": b"[]",
    "number": b"1",
    "null": b"null",
    "NaN": b'{"modelId": "api", "inputData": NaN, "x": NaN}',
    "infinity": b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1e999]}], "ready": 1e999}',
    "not UTF-8": b'{"tenant": "\xff\xfe", "modelId": "\xff", "model": "\xff", "id": "\xff", "ready": "\xff"}',
    "deep": b'{"modelId": "api", "inputs": ' + b"[" * 30_000 + b', "inputData": ' + b"[" * 30_000,
    "two values": b"{} {}",
    "UTF-16": '{"ready": true}'.encode("utf-16"),
    "wrong types": b'{"modelId": 1, "inputs": {}, "jobs": {}, "tenant": [], "scopes": 1, "ready": "yes", "model": 2}',
}


@pytest.mark.parametrize("path", WITH_BODY)
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_a_body_that_is_not_the_right_json_is_a_typed_400(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body)
    assert answer.status_code == 400, answer.text
    assert_error(answer, 400, answer.json()["code"])
    assert answer.json()["code"] in ("bad_json", "bad_tensor", "invalid_request")
    assert len(answer.text) < 1000


@pytest.mark.parametrize("path", WITH_BODY)
def test_a_body_over_the_limit_is_413_with_or_without_its_length(http: httpx.Client, path: str) -> None:
    body = b" " * ((6 << 20) + 1)

    def parts() -> Iterator[bytes]:
        yield from (body[:1000], body[1000:])

    word = f"65536 bytes, the limit of POST {path}" if path in SMALL_BODIES else "max_body_bytes"
    assert_error(http.post(path, content=body), 413, "payload_too_large", word)
    assert_error(http.post(path, content=parts()), 413, "payload_too_large", word)


def raw(served: Served, request: bytes) -> bytes:
    """Send bytes that no HTTP library would, and read the answer to its end."""
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


@pytest.mark.parametrize("path", [*WITH_BODY, "/v1/models/big/versions"])
def test_a_length_over_the_limit_is_refused_before_a_byte_of_the_body_came(served: Served, path: str) -> None:
    request = (
        f"POST {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\nx-api-key: {served.key}\r\n"
        f"content-length: {10**15}\r\n\r\n"
    )
    head, _, body = raw(served, request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert json.loads(body)["code"] == "payload_too_large"


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /v2 HTTP/1.1\r\nhost: t\r\nx-big: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: t\r\n" + b"".join(b"x-%d: a\r\n" % n for n in range(5000)) + b"\r\n",
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nhost: t\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: t\r\ncontent-length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    ],
    ids=["huge header", "many headers", "huge path", "negative length", "TLS"],
)
def test_a_request_that_is_no_http_is_refused_and_the_gateway_lives(
    served: Served, http: httpx.Client, request_head: bytes
) -> None:
    try:
        answer = raw(served, request_head)
    except ConnectionError:
        answer = b""
    assert answer == b"" or re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert http.get("/v2").status_code == 200


def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing(served: Served, http: httpx.Client) -> None:
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(
            f"POST /v1/models/torn/versions HTTP/1.1\r\nhost: t\r\nx-api-key: {served.key}\r\n"
            "content-length: 5000\r\n\r\nhalf".encode()
        )
    assert http.get("/v1/models/torn").status_code == 404


# our own mistakes


def test_a_failure_of_our_own_tells_no_detail_and_is_logged_with_its_id(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(call: RequestContext) -> RouteReply:
        raise RuntimeError(f"secret detail of {call.gateway}")

    row = RouteSpec("GET", "/fails", "Fails", "Test", failing, {200: None})
    broken = Starlette(routes=path_matching.routes(served.services.gateway, [row]))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(broken), base_url="http://t") as client:
            return await client.get("/fails", headers={"x-request-id": "lost"})

    with caplog.at_level(logging.ERROR):
        answer = served.run(ask())
    assert_error(answer, 500, "internal", "log")
    assert "secret" not in answer.text
    (record,) = [record for record in caplog.records if record.exc_info]
    assert vars(record)["request_id"] == "lost"


# CORS

ORIGIN = "https://app.example"


def with_origin(served: Served, method: str, path: str, headers: dict[str, str], origins: str) -> httpx.Response:
    settings = dataclasses.replace(served.services.settings, cors_origins=origins)

    async def ask() -> httpx.Response:
        opened = rsgi.entry(lambda _method, _path: None, app.whole(served.services.gateway, settings), part_s=30)
        async with (
            operations_server.listening(opened, "127.0.0.1", 0, interface=Interfaces.RSGI) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            return await client.request(method, path, headers=headers)

    return served.run(ask())


@pytest.mark.parametrize("path", ["/v2/models/api/infer", "/v1/jobs", "/v1/models/api/versions", "/v1/models"])
@pytest.mark.parametrize("origins", [ORIGIN, f"https://other.example, {ORIGIN}", "*"])
def test_a_preflight_of_an_allowed_origin_is_answered_without_a_key(served: Served, path: str, origins: str) -> None:
    headers = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key,idempotency-key,inference-header-content-length",
    }
    answer = with_origin(served, "OPTIONS", path, headers, origins)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-api-key" in answer.headers["access-control-allow-headers"]


def test_errors_and_answers_may_be_read_by_an_allowed_origin_only(served: Served) -> None:
    for method, path, status in (("GET", "/v2", 200), ("GET", "/v1/models", 401), ("POST", "/v1/jobs", 401)):
        answer = with_origin(served, method, path, {"origin": ORIGIN}, ORIGIN)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        other = with_origin(served, method, path, {"origin": "https://evil.example"}, ORIGIN)
        assert "access-control-allow-origin" not in other.headers


def test_without_the_setting_no_origin_is_allowed(served: Served, http: httpx.Client) -> None:
    assert "access-control-allow-origin" not in http.get("/v2", headers={"origin": ORIGIN}).headers
