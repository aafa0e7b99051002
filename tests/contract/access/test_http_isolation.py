"""An isolated tenant over HTTP: whether a model is ready for it, and what is to be done when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.http.documented import Document, assert_error
from support.http.served import Served, until
from support.models import models

TENANT = "lonely"
PATH = "/v2/models/alone"
INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("alone", models.add())
    served.share("alone")
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


@pytest.fixture(scope="module")
def lonely(served: Served, document: Document) -> Iterator[httpx.Client]:
    """A client of a tenant that is isolated and has no worker."""
    with served.client() as admin:
        made = admin.post("/v1/tenants", json={"name": TENANT, "isolated": True})
        assert made.status_code == 201, made.text
        key = served.new_key("infer", "jobs", "models:read", tenant=TENANT)
        with httpx.Client(base_url=served.url, headers={"x-api-key": key}, timeout=30, trust_env=False) as client:
            yield client
        assert admin.patch(f"/v1/tenants/{TENANT}", json={"isolated": False}).status_code == 200


def entry(client: httpx.Client) -> dict[str, Any]:
    (found,) = [item for item in client.post("/v2/repository/index").json() if item["name"] == "alone"]
    return dict(found)


def test_a_model_is_ready_for_those_whose_workers_hold_it(http: httpx.Client, lonely: httpx.Client) -> None:
    assert http.get(f"{PATH}/ready").status_code == 200
    assert lonely.get(f"{PATH}/ready").status_code == 400
    assert [item["ready"] for item in lonely.get("/v1/models").json()["models"] if item["name"] == "alone"] == [False]
    assert [item["workers"] for item in lonely.get("/v1/models/alone").json()["versions"]] == [0]
    assert [item["workers"] for item in http.get("/v1/models/alone").json()["versions"]] == [1]
    assert entry(http)["state"] == "READY"
    shown = entry(lonely)
    assert shown["state"] == "UNAVAILABLE"
    assert "tether identity add NAME --role worker --tenant lonely" in shown["reason"]


def test_without_a_worker_of_its_own_its_callers_are_told_and_its_jobs_wait(
    served: Served, http: httpx.Client, lonely: httpx.Client
) -> None:
    assert_error(submit(lonely), 503, "model_not_ready", "'lonely'")
    served.bind("lonely-1", TENANT)
    until(lambda: submit(lonely).status_code == 202, "the tenant has lanes")
    refused = lonely.post(f"{PATH}/infer", json={"inputs": [INPUT]})
    assert_error(refused, 503, "model_not_ready", "'lonely' is isolated", "tether worker --name NAME")
    assert "retry-after" in refused.headers
    job = submit(lonely).json()
    assert lonely.get(f"/v1/jobs/{job['id']}", params={"wait": 1}).json()["state"] == "queued"
    assert_error(http.get(f"/v1/jobs/{job['id']}"), 404, "job_not_found")
    for shown in lonely.get("/v1/jobs").json()["jobs"]:
        assert lonely.delete(f"/v1/jobs/{shown['id']}").json()["state"] == "cancelled"
    assert http.post(f"{PATH}/infer", json={"inputs": [INPUT]}).status_code == 200


def submit(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/jobs", json={"model": "alone", "inputs": [INPUT]})
