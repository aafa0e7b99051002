"""Limits as a client sees them: statuses, headers, what counts, and what a refusal does not look at."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest
from support.http.documented import Document, assert_error
from support.http.served import Served, until
from support.models import models

from tether.domain import api_key
from tether.domain.tenant import Quotas, Tenant


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("limited", models.add())
    served.share("limited")
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


def key_with(served: Served, *, tenant: str = "acme", **limits: float) -> dict[str, str]:
    """The header of a new key with limits."""
    text = api_key.new_key_text()
    record = api_key.stored_key(text, tenant=tenant, scopes=api_key.SCOPES, name="limited", created_at=time.time())
    served.run(served.services.gateway.keys.store(msgspec.structs.replace(record, **limits)))
    return {"x-api-key": text}


INFER = "/v2/models/limited/infer"
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
JOB = {"model": "limited", **BODY}


def limits_of(answer: httpx.Response) -> tuple[int, int, int]:
    """Limit, remaining, reset."""
    limit, remaining, reset = (int(answer.headers[f"x-ratelimit-{name}"]) for name in ("limit", "remaining", "reset"))
    return limit, remaining, reset


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", INFER, BODY),
        ("POST", "/v1/inference", {"modelId": "limited", "inputData": [[1, 2, 3, 4]]}),
        ("POST", "/v1/jobs", JOB),
        ("GET", "/v1/jobs", None),
        ("GET", "/v1/models", None),
        ("GET", "/v2/models/limited", None),
        ("GET", "/v1/keys", None),
    ],
)
def test_every_route_counts_and_tells(
    http: httpx.Client, served: Served, method: str, path: str, body: object | None
) -> None:
    key = key_with(served, rate=0.01, burst=2)
    first, second, third = (http.request(method, path, json=body, headers=key) for _ in range(3))
    assert first.is_success
    assert limits_of(first)[:2] == (2, 1)
    assert 99 <= limits_of(first)[2] <= 100
    assert limits_of(second)[1] == 0
    assert_error(third, 429, "rate_limited")
    limit, remaining, reset = limits_of(third)
    assert (limit, remaining) == (2, 0)
    assert 190 <= reset <= 200
    assert 90 <= int(third.headers["retry-after"]) <= 100
    assert "0.01 requests a second" in third.json()["error"]


def test_a_key_without_limits_hears_of_none(http: httpx.Client, served: Served) -> None:
    answer = http.post(INFER, json=BODY, headers=key_with(served))
    assert answer.is_success
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_retry_after_is_when_it_is_let_in_again(http: httpx.Client, served: Served) -> None:
    key = key_with(served, rate=2.0, burst=1)
    assert http.post(INFER, json=BODY, headers=key).is_success
    refused = http.post(INFER, json=BODY, headers=key)
    assert refused.headers["retry-after"] == "1"
    until(lambda: http.post(INFER, json=BODY, headers=key).is_success, "it is let in again", 2.0)


def test_a_refusal_does_not_read_the_body(http: httpx.Client, served: Served) -> None:
    key = key_with(served, rate=0.01, burst=1)
    assert http.post(INFER, content=b"{", headers=key).status_code == 400
    assert_error(http.post(INFER, content=b"{", headers=key), 429, "rate_limited")
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nx-api-key: {key['x-api-key']}\r\ncontent-length: 1000\r\n\r\n"
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 429")


def test_a_bad_request_still_tells_what_is_left(http: httpx.Client, served: Served) -> None:
    answer = http.post(INFER, json={}, headers=key_with(served, rate=1.0, burst=10))
    assert answer.status_code == 400
    assert limits_of(answer)[0] == 10


def test_a_batch_counts_as_its_jobs(http: httpx.Client, served: Served) -> None:
    key = key_with(served, rate=0.01, burst=10)
    assert http.post("/v1/jobs:batch", json={"jobs": [JOB] * 4}, headers=key).status_code == 202
    last = http.post("/v1/jobs:batch", json={"jobs": [JOB] * 20}, headers=key)
    assert last.status_code == 202
    assert limits_of(last)[1] == 0
    assert limits_of(last)[2] >= 2399
    refused = http.post("/v1/jobs", json=JOB, headers=key)
    assert_error(refused, 429, "rate_limited")
    assert int(refused.headers["retry-after"]) > 1400


def test_a_tenants_requests_a_minute_count_over_its_keys(http: httpx.Client, served: Served) -> None:
    gateway = served.services.gateway
    served.run(gateway.tenants.store(Tenant("counted", quotas=Quotas(requests_per_minute=20))))
    keys = [key_with(served, tenant="counted") for _ in range(2)]
    answers = [http.get("/v1/models", headers=keys[turn % 2]) for turn in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit"] == "2"
    assert "20 requests a minute" in answers[2].json()["error"]
    served.run(gateway.tenants.store(Tenant("counted")))
    assert http.get("/v1/models", headers=keys[0]).is_success


def slots(served: Served, key: dict[str, str]) -> int:
    return served.services.gateway.limits.open_requests(api_key.key_id(key["x-api-key"]) or "")


def test_only_so_many_may_be_open(http: httpx.Client, served: Served) -> None:
    key = key_with(served, concurrency=2)
    made = http.post("/v1/jobs", json={**JOB, "deadline_ms": 60000}, headers=key)
    assert limits_of(made)[0] == 2

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=served.url, headers=key, timeout=30, trust_env=False) as client:
            ids = made.json()["id"]
            waits = [client.get("/v1/jobs", params={"ids": ids, "wait": 1}) for _ in range(3)]
            floods = [client.post(INFER, json=BODY) for _ in range(30)]
            return [answer.status_code for answer in await asyncio.gather(*waits, *floods)]

    statuses = asyncio.run(crowd())
    assert set(statuses) == {200, 429}
    assert slots(served, key) == 0


def test_a_client_that_leaves_gives_its_slot_back(http: httpx.Client, served: Served) -> None:
    """It announces a body and goes before it has sent it."""
    del http
    key = key_with(served, concurrency=1)
    address = httpx.URL(served.url)
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nx-api-key: {key['x-api-key']}\r\ncontent-length: 1000\r\n\r\n"
    with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + b"{")
        until(lambda: slots(served, key) == 1, "the request holds its slot")
    until(lambda: slots(served, key) == 0, "its slot is free again")


@pytest.mark.parametrize("body", [b"{", b"", b'{"inputs": []}', b"[" * 100])
def test_an_error_gives_its_slot_back(http: httpx.Client, served: Served, body: bytes) -> None:
    key = key_with(served, concurrency=1)
    for path in (INFER, "/v1/jobs", "/v1/inference", "/v1/jobs:batch"):
        assert http.post(path, content=body, headers=key).status_code == 400
        assert slots(served, key) == 0


async def _crowd(served: Served, key: dict[str, str], connections: int, each: int) -> list[bytes]:
    """One request after the other on many connections; the heads of the answers."""
    address, body = httpx.URL(served.url), json.dumps(BODY).encode()
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nx-api-key: {key['x-api-key']}\r\ncontent-length: {len(body)}\r\n\r\n"

    async def one() -> list[bytes]:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            heads = []
            for _ in range(each):
                writer.write(head.encode() + body)
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                length = re.search(rb"content-length: (\d+)", heads[-1])
                await reader.readexactly(int(length[1]) if length else 0)
            return heads
        finally:
            writer.close()
            await writer.wait_closed()

    return [head for heads in await asyncio.gather(*[one() for _ in range(connections)]) for head in heads]


def test_ten_thousand_requests_over_a_limit_do_not_keep_another_key_out(http: httpx.Client, served: Served) -> None:
    """Every refusal says when to come again, and the other key's requests are all answered meanwhile."""
    flood, calm = key_with(served, rate=20.0, burst=20), key_with(served, tenant="calm")

    async def both() -> tuple[list[bytes], list[int], float]:
        began = time.monotonic()
        flooding = asyncio.create_task(_crowd(served, flood, 100, 100))
        async with httpx.AsyncClient(base_url=served.url, headers=calm, timeout=30, trust_env=False) as client:
            answers = [await client.post(INFER, json=BODY) for _ in range(50)]
        heads = await flooding
        return heads, [answer.status_code for answer in answers], time.monotonic() - began

    heads, calm_answers, elapsed = asyncio.run(both())
    assert calm_answers == [200] * 50
    refused = [head for head in heads if head.startswith(b"HTTP/1.1 429")]
    admitted = [head for head in heads if head.startswith(b"HTTP/1.1 200")]
    assert len(refused) + len(admitted) == 10_000
    assert 20 <= len(admitted) <= 1.1 * (20 + 20 * elapsed)
    assert all(b"retry-after: 1\r\n" in head and b"x-ratelimit-remaining: 0\r\n" in head for head in refused)
    print(f"\n10,000 requests in {elapsed:.1f} s: {len(admitted)} let in, {len(refused)} refused")  # noqa: T201
