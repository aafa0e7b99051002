"""Large JSON bodies are read and written beside the event loop, and mean what small ones mean."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from support.http.served import Served
from support.models import models

from tether import Client
from tether.gateway_http.api.route_spec import RouteSpec
from tether.gateway_http.api.route_table import table
from tether.gateway_http.bodies import simple_bodies
from tether.gateway_http.bodies.large_bodies import LARGE
from tether.gateway_http.jobs.output_budget import ANSWER_BYTES
from tether.wire import oip, oip_json

ROWS = 100_000


@pytest.fixture(scope="module", autouse=True)
def pushed(served: Served) -> None:
    served.push("large-add", models.add())
    served.push("large-wide", models.repeating(100_000))
    served.share("large-wide")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each JSON body, and elements of each tensor, that the gateway's own process turned into the other."""
    sizes: list[int] = []

    def noted(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            sizes.append(size(*args))
            return function(*args, **more)

        return call

    for module in (oip, oip_json):
        monkeypatch.setattr(module, "parse_body", noted(oip_json.parse_body, lambda _, data: len(data)))
        monkeypatch.setattr(module, "json_values", noted(oip_json.json_values, lambda tensor: len(tensor.data)))
    monkeypatch.setattr(simple_bodies, "read_input", noted(simple_bodies.read_input, lambda data, *_: len(data)))
    monkeypatch.setattr(simple_bodies, "nested", noted(simple_bodies.nested, lambda tensor: len(tensor.data)))
    yield sizes
    assert not sizes or max(sizes) < LARGE, "a large body was read or written in the event loop"


def body(rows: int = ROWS, **more: Any) -> dict[str, Any]:
    data = [number % 1000 for number in range(4 * rows)]
    return {"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": data}], **more}


def test_a_large_request_and_its_answer(http: httpx.Client, parsed: list[int]) -> None:
    answer = http.post("/v2/models/large-add/infer", json=body(id="large"))
    assert answer.status_code == 200, answer.text[:300]
    assert answer.json()["id"] == "large"
    assert answer.json()["outputs"][0]["data"] == [number % 1000 + 1 for number in range(4 * ROWS)]
    assert http.post("/v2/models/large-add/infer", json=body(1)).status_code == 200
    assert parsed, "the small one was read here"


def test_a_large_answer_in_the_form_that_was_asked_for(http: httpx.Client, parsed: list[int]) -> None:
    asked = body(1, outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    binary = http.post("/v2/models/large-wide/infer", json=asked)
    found = oip.parse_infer_response(binary.content, int(binary.headers["inference-header-content-length"]))
    plain = http.post("/v2/models/large-wide/infer", json=body(1)).json()["outputs"][0]
    assert np.array_equal(found.outputs["y"].ravel(), np.array(plain["data"], np.float32))


def test_what_is_wrong_with_a_large_body_is_said_as_of_a_small_one(http: httpx.Client, parsed: list[int]) -> None:
    def refused(content: bytes) -> tuple[int, str, str | None]:
        answer = http.post("/v2/models/large-add/infer", content=content)
        return answer.status_code, answer.json()["code"], answer.json().get("field")

    for rows in (1, ROWS):
        good = json.dumps(body(rows)).encode()
        assert refused(good[:-5]) == (400, "bad_json", None)
        assert refused(good.replace(b'"shape": [', b'"shape": [9, ')) == (400, "bad_tensor", None)
        assert refused(good.replace(b'"name"', b'"name": "x", "name"')) == (400, "bad_json", None)


def test_a_large_request_and_its_answer_on_the_simple_route(http: httpx.Client, parsed: list[int]) -> None:
    def asked(rows: int) -> httpx.Response:
        nest = [[4 * row % 1000, 1, 2, 3] for row in range(rows)]
        return http.post("/v1/inference", json={"modelId": "large-add", "inputData": nest})

    answer = asked(ROWS)
    assert answer.status_code == 200, answer.text[:300]
    output = answer.json()["output"]["y"]
    assert (len(output), output[10]) == (ROWS, [41, 2, 3, 4])
    assert asked(1).json()["output"]["y"] == [[1, 2, 3, 4]]
    assert parsed, "the small one was read here"


def test_a_large_body_of_the_simple_route_is_refused_as_a_small_one(http: httpx.Client, parsed: list[int]) -> None:
    def refused(content: bytes) -> tuple[int, str]:
        answer = http.post("/v1/inference", content=content)
        return answer.status_code, answer.json()["code"]

    for rows in (1, ROWS):
        good = json.dumps({"modelId": "large-add", "inputData": {"x": [[1, 2, 3, 4]] * rows}}).encode()
        assert refused(good[:-5]) == (400, "bad_json")
        assert refused(good.replace(b"[[1", b"[" * ROWS + b"[[1")) == (400, "bad_json")
        assert refused(good.replace(b'"x"', b'"no"')) == (400, "bad_tensor")
        assert refused(good.replace(b'"modelId"', b'"modelId": "x", "modelId"')) == (400, "bad_json")
        assert refused(good.replace(b"[1, 2, 3, 4]", b"[1, 2, 3]", 1)) == (400, "bad_tensor")
        many = b'"parameters": {' + b", ".join(b'"%d": 1' % number for number in range(300)) + b'}, "modelId"'
        assert refused(good.replace(b'"modelId"', many)) == (400, "invalid_request")


def test_a_version_of_many_chunks_is_read_beside_the_loop(http: httpx.Client, parsed: list[int]) -> None:
    digests = [f"{number:064x}" for number in range(3000)]
    told = http.post("/v1/models/large-add/chunks:missing", json={"chunks": digests})
    assert told.json()["missing"] == digests

    def refused(chunks: list[str], **more: Any) -> tuple[int, str]:
        file = {"path": "model.onnx", "size": len(chunks), "digest": "", "chunks": chunks, "sizes": [1] * len(chunks)}
        answer = http.post("/v1/models/large-add/versions:register", json={"files": [{**file, **more}]})
        return answer.status_code, answer.json()["code"]

    for some in (digests[:10], digests):
        assert refused(some)[1] == "corrupt_chunk"
        assert refused(some[:-1], sizes=[1] * len(some)) == (400, "invalid_request")
        assert refused([*some[:-1], "0" * 63]) == (400, "invalid_request")


SMALL = [row for row in table() if row.body is not None and row.handler is not None and not row.large]


@pytest.mark.parametrize("row", SMALL, ids=[f"{row.method} {row.path}" for row in SMALL])
def test_a_route_that_needs_no_large_body_reads_none(http: httpx.Client, row: RouteSpec) -> None:
    path = row.path.translate(str.maketrans("{}", "xx"))
    answer = http.request(row.method, path, content=b" " * LARGE + b"{}")
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
    assert f"{LARGE} bytes" in answer.json()["error"]
    assert f"{row.method} {row.path}" in answer.json()["error"]


def test_large_jobs_and_their_results(http: httpx.Client, parsed: list[int]) -> None:
    one = http.post("/v1/jobs", json={"model": "large-add", **body(), "priority": "low"})
    assert (one.status_code, one.json()["priority"]) == (202, "low")
    many = http.post("/v1/jobs:batch", json={"jobs": [{"model": "large-add", **body(ROWS // 4)} for _ in range(3)]})
    ids = [job["id"] for job in many.json()["jobs"]]
    ended = http.get("/v1/jobs", params={"ids": ",".join([one.json()["id"], *ids]), "wait": 50}).json()["jobs"]
    assert [len(job["result"]["outputs"][0]["data"]) for job in ended] == [4 * ROWS, ROWS, ROWS, ROWS]


def test_an_answer_about_many_jobs_has_results_up_to_a_bound(served: Served, http: httpx.Client) -> None:
    """Each result is 1.6 MB. What finds no room is had one by one, which the client library does by itself."""
    fits = ANSWER_BYTES // 1_600_000
    key = served.new_key("jobs", tenant="many-results")
    with httpx.Client(base_url=served.url, headers={"x-api-key": key}, timeout=60, trust_env=False) as own:
        jobs = [{"model": "large-wide", **body(1)} for _ in range(fits + 3)]
        submitted = own.post("/v1/jobs:batch", json={"jobs": jobs})
        assert submitted.status_code == 202, submitted.text
        ids = [job["id"] for job in submitted.json()["jobs"]]
        for query in (f"ids={','.join(ids)}&wait=50", "limit=1000"):
            shown = own.get(f"/v1/jobs?{query}").json()["jobs"]
            assert [job["state"] for job in shown] == ["succeeded"] * len(ids)
            assert [("result" in job, job.get("result_left_out", False)) for job in shown] == [(True, False)] * fits + [
                (False, True)
            ] * 3
        assert "result" in own.get(f"/v1/jobs/{ids[-1]}").json()
    with Client(served.url, key) as sdk:
        assert [job.outputs()["y"].size for job in sdk.wait_many(ids)] == [400_000] * len(ids)


def test_a_process_that_was_ended_is_started_again(served: Served, http: httpx.Client) -> None:
    assert http.post("/v2/models/large-add/infer", json=body()).status_code == 200
    process = served.services.gateway.large_bodies._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert http.post("/v2/models/large-add/infer", json=body()).status_code == 200
