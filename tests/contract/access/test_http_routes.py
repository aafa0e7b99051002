"""What each route does: simple inference, jobs, models, the index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import helper
from support.http.documented import Document, assert_error
from support.http.served import Served, until
from support.models import models


def reciprocal() -> bytes:
    """``y = 1 / x``: infinite at 0."""
    node = helper.make_node("Reciprocal", ["x"], ["y"])
    values = [models.value(name, "FP32", ["n", 2]) for name in ("x", "y")]
    return models.to_bytes(models.model([node], values[:1], values[1:]))


def pair() -> bytes:
    """``y = a + b``."""
    node = helper.make_node("Add", ["a", "b"], ["y"])
    a, b, y = [models.value(name, "FP32", ["n", 2]) for name in ("a", "b", "y")]
    return models.to_bytes(models.model([node], [a, b], [y]))


MODELS = {
    "plus": models.add(),
    "pair": pair(),
    "recip": reciprocal(),
    "texts": models.identity("BYTES"),
    "halves": models.identity("FP16"),
    "brains": models.identity("BF16"),
    "flags": models.identity("BOOL"),
    "slow": models.looping(1_000_000),
}


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    for name, content in MODELS.items():
        served.push(name, content)
        served.share(name)
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


# POST /v1/inference


@pytest.mark.parametrize("version", [None, 1, "1", "latest"])
@pytest.mark.parametrize(
    "data",
    [
        [[1, 2, 3, 4]],
        {"x": [[1, 2, 3, 4]]},
        [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}],
    ],
    ids=["bare", "named", "tensors"],
)
def test_simple_inference_takes_each_form_of_input(http: httpx.Client, data: Any, version: int | str | None) -> None:
    answer = http.post("/v1/inference", json={"modelId": "plus", "inputData": data, "version": version})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"modelId": "plus", "version": "1", "output": {"y": [[2.0, 3.0, 4.0, 5.0]]}}


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("texts", ["", "a", "grüße", "汉字"]),
        ("flags", [True, False, True, True]),
        ("halves", [0.5, -1.5, 65504.0, 0.0]),
        ("brains", [0.5, -1.5, 128.0, 0.0]),
    ],
)
def test_simple_inference_carries_text_booleans_and_short_floats(
    http: httpx.Client, model: str, row: list[Any]
) -> None:
    answer = http.post("/v1/inference", json={"modelId": model, "inputData": [row, row]})
    assert answer.json()["output"] == {"y": [row, row]}


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 400, "invalid_request", ["modelId is required"]),
        ({"inputData": [1]}, 400, "invalid_request", ["modelId is required"]),
        ({"modelId": "plus"}, 400, "invalid_request", ["inputData is required"]),
        ({"modelId": "plus", "inputData": None}, 400, "invalid_request", ["inputData is required"]),
        ({"modelId": 5, "inputData": [1]}, 400, "bad_json", ["modelId"]),
        ({"modelId": "none", "inputData": [1]}, 404, "model_not_found", ["none"]),
        ({"modelId": "No Name", "inputData": [1]}, 400, "bad_name", ["model"]),
        ({"modelId": "plus", "inputData": [1], "version": 99}, 404, "model_not_found", ["99"]),
        ({"modelId": "plus", "inputData": 5}, 400, "bad_tensor", ["'x'", "[]", "[-1, 4]"]),
        ({"modelId": "plus", "inputData": "text"}, 400, "bad_tensor", ["'x'"]),
        ({"modelId": "plus", "inputData": [1, 2]}, 400, "bad_tensor", ["'x'", "[2]", "[-1, 4]"]),
        ({"modelId": "plus", "inputData": [[1, 2, 3, 4], [5]]}, 400, "bad_tensor", ["'x'", "regular"]),
        ({"modelId": "plus", "inputData": [[1, 2, 3, "a"]]}, 400, "bad_tensor", ["'x'", "FP32"]),
        ({"modelId": "plus", "inputData": {"z": [[1]]}}, 400, "bad_tensor", ["'z'", "'x'"]),
        ({"modelId": "plus", "inputData": {}}, 400, "bad_tensor", ["'x'", "missing"]),
        ({"modelId": "plus", "inputData": []}, 400, "bad_tensor", ["'x'"]),
        ({"modelId": "plus", "inputData": [{"name": "x"}]}, 400, "bad_tensor", ["'x'", "datatype"]),
        ({"modelId": "pair", "inputData": [[1, 2]]}, 400, "bad_tensor", ["object", "'a'", "'b'"]),
        ({"modelId": "pair", "inputData": {"a": [[1, 2]]}}, 400, "bad_tensor", ["'b'"]),
        ({"modelId": "recip", "inputData": [[0, 1]]}, 400, "invalid_request", ["'y'", "binary"]),
        (
            {"modelId": "plus", "inputData": [[1, 2, 3, 4]], "parameters": {"timeout": "x"}},
            400,
            "invalid_request",
            ["timeout"],
        ),
        ({"modelId": "slow", "inputData": [[1, 2, 3, 4]], "parameters": {"timeout": 1}}, 504, "deadline_exceeded", []),
    ],
)
def test_simple_inference_refuses_what_does_not_fit_by_name(
    http: httpx.Client, *, body: dict[str, Any], status: int, code: str, words: list[str]
) -> None:
    assert_error(http.post("/v1/inference", json=body), status, code, *words)


# jobs


def tensor(value: float) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}


def submit(http: httpx.Client, value: float = 1.0, model: str = "plus", **rest: Any) -> dict[str, Any]:
    answer = http.post("/v1/jobs", json={"model": model, "inputs": [tensor(value)], **rest})
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_a_job_is_accepted_waited_for_and_tells_its_result(http: httpx.Client) -> None:
    made = submit(http, 4.0, priority="high")
    assert (made["state"], made["model"], made["version"], made["priority"]) == ("queued", "plus", "1", "high")
    ended = http.get(f"/v1/jobs/{made['id']}", params={"wait": 20}).json()
    assert ended["state"] == "succeeded"
    assert ended["result"]["outputs"][0]["data"] == [5.0] * 4
    assert ended["attempts"] == 1
    times = [datetime.fromisoformat(ended[name]) for name in ("submitted_at", "started_at", "finished_at")]
    assert times == sorted(times)
    assert all(time.tzinfo is not None for time in times)


def test_many_jobs_are_accepted_at_once_and_waited_for_together(http: httpx.Client) -> None:
    jobs = [{"model": "plus", "inputs": [tensor(value)]} for value in range(20)]
    made = http.post("/v1/jobs:batch", json={"jobs": jobs}).json()["jobs"]
    ids = [job["id"] for job in made]
    ended = http.get("/v1/jobs", params={"ids": ",".join(ids), "wait": 20}).json()["jobs"]
    assert [job["id"] for job in ended] == ids
    assert [job["result"]["outputs"][0]["data"][0] for job in ended] == [value + 1.0 for value in range(20)]


def test_an_idempotency_key_makes_one_job_and_is_not_for_another_request(http: httpx.Client) -> None:
    headers = {"idempotency-key": "order-17"}
    body = {"model": "plus", "inputs": [tensor(1)]}
    ids = {http.post("/v1/jobs", json=body, headers=headers).json()["id"] for _ in range(3)}
    assert len(ids) == 1
    other = http.post("/v1/jobs", json={"model": "plus", "inputs": [tensor(2)]}, headers=headers)
    assert_error(other, 409, "idempotency_conflict", "Idempotency-Key")


def test_jobs_are_listed_newest_first_page_by_page(served: Served, document: Document) -> None:
    key = served.new_key("jobs", tenant="lister")
    with document.client(served, key) as http:
        made = [submit(http, value)["id"] for value in range(5)]
        http.get("/v1/jobs", params={"ids": ",".join(made), "wait": 20})
        first = http.get("/v1/jobs", params={"limit": 3, "state": "succeeded", "model": "plus"}).json()
        rest = http.get("/v1/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
        assert [job["id"] for job in first["jobs"] + rest["jobs"]] == made[::-1]
        assert http.get("/v1/jobs", params={"state": "dead"}).json()["jobs"] == []
        assert http.get("/v1/jobs", params={"model": "pair"}).json()["jobs"] == []


def test_a_cancelled_job_stays_cancelled_and_an_ended_one_cannot_be(http: httpx.Client) -> None:
    made = submit(http, model="slow")
    cancelled = http.delete(f"/v1/jobs/{made['id']}")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert cancelled.json()["error"]["code"] == "job_cancelled"
    assert_error(http.delete(f"/v1/jobs/{made['id']}"), 409, "result_conflict", "cancelled")
    done = submit(http)
    http.get(f"/v1/jobs/{done['id']}", params={"wait": 20})
    assert_error(http.delete(f"/v1/jobs/{done['id']}"), 409, "result_conflict", "succeeded")
    assert http.get(f"/v1/jobs/{made['id']}").json()["state"] == "cancelled"


def test_another_tenants_job_is_not_there(served: Served, document: Document, http: httpx.Client) -> None:
    made = submit(http)
    with document.client(served, served.new_key("jobs", tenant="other")) as other:
        for job_id in (made["id"], "0" * 32, "x", "a.b"):
            assert_error(other.get(f"/v1/jobs/{job_id}"), 404, "job_not_found")
            assert_error(other.delete(f"/v1/jobs/{job_id}"), 404, "job_not_found")
        assert_error(other.get("/v1/jobs", params={"ids": made["id"]}), 404, "job_not_found")
        assert other.get("/v1/jobs").json() == {"jobs": []}


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("/v1/jobs", "state=gone", "state"),
        ("/v1/jobs", "limit=0", "limit"),
        ("/v1/jobs", "limit=1001", "limit"),
        ("/v1/jobs", "limit=ten", "limit"),
        ("/v1/jobs", "limit=1&limit=2", "limit"),
        ("/v1/jobs", "cursor=-1", "cursor"),
        ("/v1/jobs", "cursor=abc", "cursor"),
        ("/v1/jobs", "model=" + "a" * 65, "model"),
        ("/v1/jobs", "ids=x", "ids"),
        ("/v1/jobs", "ids=" + ",".join(f"{number:032x}" for number in range(201)), "ids"),
        ("/v1/jobs", f"ids={'0' * 32}&state=queued", "ids"),
        ("/v1/jobs", "wait=5", "wait"),
        ("/v1/jobs", "page=2", "page"),
        (f"/v1/jobs/{'0' * 32}", "wait=-1", "wait"),
        (f"/v1/jobs/{'0' * 32}", "wait=nan", "wait"),
        (f"/v1/jobs/{'0' * 32}", "wait=inf", "wait"),
        (f"/v1/jobs/{'0' * 32}", "wait=soon", "wait"),
        ("/v1/models/m/versions", "max_batch_size=-2", "max_batch_size"),
        ("/v1/models/m/versions", "max_delay_ms=1e9", "max_delay_ms"),
        ("/v1/models/m/versions", "max_batchsize=2", "max_batchsize"),
    ],
)
def test_query_parameters_that_do_not_fit_are_refused_by_name(
    http: httpx.Client, path: str, query: str, field: str
) -> None:
    method = "POST" if path.endswith("versions") else "GET"
    assert_error(http.request(method, f"{path}?{query}"), 400, "invalid_request", f"'{field}'")


# models


def test_pushed_models_are_listed_and_shown(http: httpx.Client) -> None:
    content = MODELS["plus"]
    listed = {model["name"]: model for model in http.get("/v1/models").json()["models"]}
    assert set(MODELS) <= set(listed)
    plus = listed["plus"]
    assert (plus["versions"], plus["aliases"], plus["ready"], plus["size"]) == ([1], {"latest": 1}, True, len(content))
    shown = http.get("/v1/models/plus").json()
    (version,) = shown["versions"]
    assert version["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "axes": ["n", ""]}]
    assert version["files"] == [
        {"path": "model.onnx", "size": len(content), "digest": hashlib.sha256(content).hexdigest()}
    ]
    assert (version["workers"], version["ready"], version["max_batch_size"]) == (1, True, 512)
    assert version["batching"] == {"max_batch_size": 512, "max_delay_ms": 2.0, "basis": "proven", "reason": ""}
    assert version["publisher"].startswith("key:")
    assert_error(http.get("/v1/models/none"), 404, "model_not_found", "none")
    assert_error(http.get("/v1/models/No"), 400, "bad_name")


def test_a_push_makes_a_version_and_the_same_file_makes_none(served: Served, http: httpx.Client) -> None:
    content = models.padded(3 << 20, seed=5)
    digest = hashlib.sha256(content).hexdigest()
    headers = {"x-tether-sha256": digest.upper(), "x-tether-filename": "big model.onnx"}
    first = http.post("/v1/models/big/versions?max_batch_size=8&max_delay_ms=0.5", content=content, headers=headers)
    assert first.status_code == 201
    made = first.json()
    assert (made["version"], made["digest"], made["size"], made["stored_bytes"]) == (
        1,
        digest,
        len(content),
        len(content),
    )
    again = http.post("/v1/models/big/versions?max_batch_size=8&max_delay_ms=0.5", content=content)
    assert (again.status_code, again.json()["version"], again.json()["stored_bytes"]) == (200, 1, 0)
    other = http.post("/v1/models/big/versions?max_batch_size=4", content=content)
    assert (other.status_code, other.json()["version"], other.json()["aliases"]) == (201, 2, {"latest": 2})
    until(lambda: len(http.get("/v1/models/big").json()["versions"]) == 2, "the gateway knows both versions")
    assert [version["max_batch_size"] for version in http.get("/v1/models/big").json()["versions"]] == [8, 4]


def test_a_push_says_whether_the_version_is_batched_and_why_not(http: httpx.Client) -> None:
    def pushed(query: str) -> dict[str, Any]:
        answer = http.post(f"/v1/models/unproven/versions{query}", content=models.unknown_operator())
        assert answer.status_code == 201
        made: dict[str, Any] = answer.json()["batching"]
        return made

    alone = pushed("")
    assert (alone["max_batch_size"], alone["basis"]) == (0, "")
    assert "--max-batch-size" in alone["reason"]
    declared = pushed("?max_batch_size=4")
    assert (declared["max_batch_size"], declared["basis"]) == (4, "declared")
    until(lambda: len(http.get("/v1/models/unproven").json()["versions"]) == 2, "the gateway knows both versions")
    shown = [version["batching"] for version in http.get("/v1/models/unproven").json()["versions"]]
    assert shown == [alone, declared]
    refused = http.patch("/v1/models/unproven/config", json={"max_batch_size": 8})
    assert_error(refused, 400, "invalid_request", "push a version with --max-batch-size")


def test_a_streamed_push_needs_no_length(http: httpx.Client) -> None:
    content = models.padded(2 << 20, seed=6)

    def parts() -> Iterator[bytes]:
        for start in range(0, len(content), 100_000):
            yield content[start : start + 100_000]

    answer = http.post("/v1/models/streamed/versions", content=parts())
    assert (answer.status_code, answer.json()["digest"]) == (201, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "code", "words"),
    [
        ("m", b"", {}, 400, "invalid_request", ["empty"]),
        ("m", b"not a model", {}, 422, "format_not_allowed", []),
        ("m", models.zipmap(), {}, 422, "model_rejected", []),
        ("m?max_batch_size=4", models.identity("FP32", (4,)), {}, 422, "model_rejected", ["max_batch_size"]),
        ("m", models.add(), {"x-tether-sha256": "0" * 64}, 400, "invalid_request", ["x-tether-sha256"]),
        ("m", models.add(), {"x-tether-sha256": "short"}, 400, "invalid_request", ["x-tether-sha256"]),
        ("m", models.add(), {"x-tether-filename": "m.pt"}, 400, "invalid_request", [".onnx"]),
        ("m", models.add(), {"content-encoding": "gzip"}, 400, "invalid_request", ["Content-Encoding"]),
        ("Not%20a%20name", models.add(), {}, 400, "bad_name", ["name"]),
    ],
)
def test_a_push_that_cannot_be_served_leaves_no_version(
    http: httpx.Client,
    *,
    path: str,
    content: bytes,
    headers: dict[str, str],
    status: int,
    code: str,
    words: list[str],
) -> None:
    name, _, query = path.partition("?")
    answer = http.post(f"/v1/models/{name}/versions?{query}", content=content, headers=headers)
    assert_error(answer, status, code, *words)
    assert http.get("/v1/models/m").status_code == 404


@pytest.mark.parametrize("body", ["", "{}", '{"ready": true}', '{"ready": false}'])
def test_the_index_reads_an_empty_body_too(http: httpx.Client, body: str) -> None:
    entries = http.post("/v2/repository/index", content=body).json()
    assert {"name": "plus", "version": "1", "state": "READY", "reason": ""} in entries


def test_jobs_and_json_answers_agree_with_the_binary_route(http: httpx.Client) -> None:
    body = {"inputs": [tensor(0.1)]}
    plain = http.post("/v2/models/plus/infer", content=json.dumps(body)).json()["outputs"][0]["data"]
    made = submit(http, 0.1)
    ended = http.get(f"/v1/jobs/{made['id']}", params={"wait": 20}).json()["result"]["outputs"][0]["data"]
    simple = http.post("/v1/inference", json={"modelId": "plus", "inputData": [[0.1] * 4]}).json()["output"]["y"][0]
    assert np.float32(plain).tolist() == np.float32(ended).tolist() == np.float32(simple).tolist()
