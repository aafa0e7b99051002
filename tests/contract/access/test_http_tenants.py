"""Tenants over HTTP: records, and what may not be changed while it matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.http.documented import Document, assert_error
from support.http.served import Served, until
from support.models import models


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("plus", models.add())
    served.share("plus")
    served.push("slow", models.looping(1_000_000))
    served.share("slow")
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


def test_a_tenant_is_made_changed_listed_and_removed(http: httpx.Client) -> None:
    made = http.post("/v1/tenants", json={"name": "made-first", "models": ["a-*", "b"], "quotas": {"queued_jobs": 5}})
    assert made.status_code == 201, made.text
    assert made.json()["quotas"] == {"queued_jobs": 5, "stored_bytes": 0, "requests_per_minute": 0}
    assert (made.json()["isolated"], made.json()["sealed"], made.json()["weight"]) == (False, False, 1.0)
    assert_error(http.post("/v1/tenants", json={"name": "made-first"}), 409, "conflict", "made-first")
    changed = http.patch("/v1/tenants/made-first", json={"weight": 2.5, "quotas": {"stored_bytes": 9}})
    assert changed.status_code == 200
    assert (changed.json()["weight"], changed.json()["models"]) == (2.5, ["a-*", "b"])
    assert changed.json()["quotas"] == {"queued_jobs": 5, "stored_bytes": 9, "requests_per_minute": 0}
    shown = http.get("/v1/tenants/made-first").json()
    assert shown["use"]["keys"] == shown["use"]["queued_jobs"] == 0
    assert "made-first" in [entry["name"] for entry in http.get("/v1/tenants").json()["tenants"]]
    assert http.delete("/v1/tenants/made-first").status_code == 200
    assert_error(http.get("/v1/tenants/made-first"), 404, "not_found", "made-first")
    assert_error(http.patch("/v1/tenants/made-first", json={}), 404, "not_found")
    assert_error(http.delete("/v1/tenants/made-first"), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, "bad_json", ["name"]),
        ({"name": "shared"}, "bad_name", ["reserved"]),
        ({"name": "A b"}, "bad_name", ["name"]),
        ({"name": "x", "models": []}, "bad_json", ["models"]),
        ({"name": "x", "models": ["Ä"]}, "invalid_request", ["models"]),
        ({"name": "x", "models": ["*a*b*c*d*"]}, "invalid_request", ["models"]),
        ({"name": "x", "weight": 0}, "bad_json", ["weight"]),
        ({"name": "x", "quotas": {"queued_jobs": -1}}, "bad_json", ["queued_jobs"]),
        ({"name": "x", "quotas": {"jobs": 1}}, "bad_json", ["jobs"]),
        ({"name": "x", "limits": 1}, "bad_json", ["limits"]),
    ],
)
def test_a_tenant_that_cannot_be_is_refused_by_field(
    http: httpx.Client, body: dict[str, Any], code: str, words: list[str]
) -> None:
    assert_error(http.post("/v1/tenants", json=body), 400, code, *words)


def test_a_tenant_with_keys_that_count_stays(http: httpx.Client) -> None:
    assert http.post("/v1/tenants", json={"name": "keyed"}).status_code == 201
    key = http.post("/v1/keys", json={"tenant": "keyed", "scopes": ["infer"]}).json()
    assert http.get("/v1/tenants/keyed").json()["use"]["keys"] == 1
    assert_error(http.delete("/v1/tenants/keyed"), 409, "conflict", "keys")
    assert http.delete(f"/v1/keys/{key['id']}").status_code == 200
    assert http.delete("/v1/tenants/keyed").status_code == 200


def test_a_tenant_changes_its_isolation_while_its_jobs_wait(http: httpx.Client, served: Served) -> None:
    own = {"x-api-key": served.new_key("jobs", tenant="moving")}
    body = {"model": "slow", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}

    def submit() -> httpx.Response:
        return http.post("/v1/jobs", json=body, headers=own)

    served.bind("moving-1", "moving")
    early = [submit().json()["id"] for _ in range(20)]
    assert http.post("/v1/tenants", json={"name": "moving", "isolated": True}).status_code == 201
    until(lambda: submit().status_code == 202, "the tenant has lanes")
    ended = [http.delete(f"/v1/jobs/{job}", headers=own).status_code for job in early]
    assert ended[-1] == 200, "a job in the lanes that all tenants share is found and cancelled"
    assert http.get("/v1/tenants/moving").json()["use"]["queued_jobs"] > 0
    assert http.patch("/v1/tenants/moving", json={"isolated": False}).json()["isolated"] is False
    late = http.get("/v1/jobs", params={"state": "queued"}, headers=own).json()["jobs"]
    assert [http.delete(f"/v1/jobs/{job['id']}", headers=own).json()["state"] for job in late] == ["cancelled"]
    until(lambda: http.get("/v1/tenants/moving").json()["use"]["queued_jobs"] == 0, "no open jobs")


def test_a_quota_of_jobs_answers_429_and_names_itself(http: httpx.Client, served: Served) -> None:
    own = {"x-api-key": served.new_key("jobs", tenant="few-jobs")}
    body = {"model": "slow", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    assert http.post("/v1/tenants", json={"name": "few-jobs", "quotas": {"queued_jobs": 2}}).status_code == 201
    refused = http.post("/v1/jobs:batch", json={"jobs": [body] * 3}, headers=own)
    assert_error(refused, 429, "quota_exceeded", "few-jobs", "queued_jobs", "is 2")
    assert int(refused.headers["retry-after"]) >= 1
    answer = http.post("/v1/jobs:batch", json={"jobs": [body] * 2}, headers=own)
    assert answer.status_code == 202
    for job in answer.json()["jobs"]:
        http.delete(f"/v1/jobs/{job['id']}", headers=own)


def test_a_quota_of_bytes_is_held_before_the_file_is_read(http: httpx.Client, served: Served) -> None:
    own = {"x-api-key": served.new_key("models:write", tenant="few-bytes")}
    content = models.add()
    digest = hashlib.sha256(content).hexdigest()
    quotas = {"stored_bytes": len(content) + 10}
    assert http.post("/v1/tenants", json={"name": "few-bytes", "quotas": quotas}).status_code == 201

    def push(name: str, data: Any, **headers: str) -> httpx.Response:
        return http.post(f"/v1/models/{name}/versions", content=data, headers={**own, **headers})

    assert push("few-one", content).status_code == 201
    until(lambda: http.get("/v1/tenants/few-bytes").json()["use"]["stored_bytes"] == len(content), "it counts")
    assert_error(push("few-two", content), 429, "quota_exceeded", "few-bytes", "stored_bytes")
    assert_error(push("few-two", iter([content[:50], content[50:]])), 429, "quota_exceeded", "stored_bytes")
    again = push("few-one", content, **{"x-tether-sha256": digest})
    assert again.status_code == 200, "the same version again is no new one"


def test_a_quota_of_bytes_holds_for_chunks_that_nothing_names(http: httpx.Client, served: Served) -> None:
    """Chunks never registered, a file that is refused, and one that says it is another: none of them is room for free."""
    own = {"x-api-key": served.new_key("models:write", "models:read", tenant="few-chunks")}
    content = models.add(7.0)
    room = len(content) + 3000
    assert http.post("/v1/tenants", json={"name": "few-chunks", "quotas": {"stored_bytes": room}}).status_code == 201
    loose = served.services.gateway.unreferenced_chunks

    def put(chunk: bytes) -> httpx.Response:
        path = f"/v1/models/chunks-one/chunks/{hashlib.sha256(chunk).hexdigest()}"
        return http.put(path, content=chunk, headers=own)

    def push(data: bytes, **headers: str) -> httpx.Response:
        return http.post("/v1/models/chunks-one/versions", content=data, headers={**own, **headers})

    assert push(content).status_code == 201
    until(lambda: served.services.gateway.catalog.stored.of("few-chunks") == len(content), "it counts")
    assert loose.bytes_of("few-chunks") == 0
    assert [put(b"a" * 2000).status_code for _ in range(3)] == [201, 200, 200]
    assert_error(put(b"b" * 2000), 429, "quota_exceeded", "few-chunks", "stored_bytes")
    assert push(b"c" * 900).status_code == 422
    assert_error(push(b"d" * 900), 429, "quota_exceeded", "stored_bytes")
    digest = hashlib.sha256(content).hexdigest()
    assert_error(push(b"e" * 5000, **{"x-tether-sha256": digest}), 429, "quota_exceeded", "stored_bytes")
    assert push(content, **{"x-tether-sha256": digest}).status_code == 200
    assert loose.bytes_of("few-chunks") == 2900
