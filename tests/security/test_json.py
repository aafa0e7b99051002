"""JSON and tensors that are meant to hurt: refused with 400 and the field, before anything is queued (S12, S14)."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http.served import Served

from tether.domain.tensor import Tensor, check, element_count
from tether.errors import BadJson, BadTensor, InvalidRequest
from tether.process import metrics
from tether.wire import json_duplicates, oip

INFER = "/v2/models/bump/infer"
TENSOR = '{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}'
KEY = '{"tenant": "acme", "scopes": ["infer"], "name": %s}'

BODIES = [
    (INFER, "[" * 100_000),
    (INFER, '{"inputs": ' + "[" * 100_000),
    (
        INFER,
        '{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ' + "[" * 5000 + "]" * 5000 + "}]}",
    ),
    (INFER, f'{{"id": "a", "id": "b", "inputs": [{TENSOR}]}}'),
    (INFER, f'{{"id": "a", "\\u0069d": "b", "inputs": [{TENSOR}]}}'),
    (INFER, f'{{"inputs": [{TENSOR}], "inputs": [{TENSOR}]}}'),
    (INFER, '{{"inputs": [{}]}}'.format(TENSOR.replace('"data"', '"data": [9, 9, 9, 9], "data"'))),
    (INFER, f'{{"inputs": [{TENSOR}], "parameters": {{"timeout": 1, "timeout": 2}}}}'),
    (INFER, f'{{"inputs": [{TENSOR}], "unknown": {{"a": {{"b": 1, "b": 2}}}}}}'),
    (INFER, f'{{"inputs": [{TENSOR}], "parameters": {{"timeout": 1e999}}}}'),
    (INFER, f'{{"id": "\\ud800", "inputs": [{TENSOR}]}}'),
    (INFER, f'{{"id": "\\udc00\\ud800", "inputs": [{TENSOR}]}}'),
    (INFER, f'{{"id": NaN, "inputs": [{TENSOR}]}}'),
    (INFER, f'{{"inputs": [{TENSOR}]}} trailing'),
    (INFER, ""),
    (INFER, "null"),
    ("/v1/jobs", f'{{"model": "bump", "model": "bump", "inputs": [{TENSOR}]}}'),
    ("/v1/jobs", f'{{"model": "bump", "deadline_ms": 1e999, "inputs": [{TENSOR}]}}'),
    ("/v1/jobs:batch", '{"jobs": [{"model": "bump", "inputs": []}], "jobs": []}'),
    ("/v1/inference", '{"modelId": "bump", "inputData": {"x": [[1, 2, 3, 4]], "x": [[1, 2, 3, 4]]}}'),
    ("/v1/inference", '{"modelId": "bump", "inputData": ' + "[" * 100_000),
    ("/v1/keys", KEY % '"\\ud800"'),
    ("/v1/keys", KEY % '"a", "tenant": "other"'),
    ("/v2/repository/index", '{"ready": true, "ready": false}'),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[f"{path} {body[:60]}" for path, body in BODIES])
def test_hostile_json_is_refused(target: Served, path: str, body: str) -> None:
    with target.client() as http:
        answer = http.post(path, content=body.encode(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_json"), answer.text[:300]
    assert len(answer.json()["error"]) < 1000
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe{}", b'{"id": "\xed\xa0\x80", "inputs": []}', b'{"\xff": 1}', b"\xef\xbb\xbf{}"]
)
def test_json_that_is_no_utf_8_is_refused(target: Served, raw: bytes) -> None:
    with target.client() as http:
        answer = http.post(INFER, content=raw)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_json")


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


TENSORS = [
    tensor(shape=[1, 3]),
    tensor(shape=[1, -4]),
    tensor(shape=[-1, -4]),
    tensor(shape=[1 << 62, 4]),
    tensor(shape=[1 << 32, 1 << 32]),
    tensor(shape=[(1 << 63) - 1, 2]),
    tensor(shape=[0, (1 << 63) - 1], data=[]),
    tensor(shape=[1] * 1000),
    tensor(shape=[1] * 100_000),
    tensor(datatype="OBJECT"),
    tensor(datatype="object"),
    tensor(datatype="FP32\n"),
    tensor(datatype=""),
    tensor(datatype="BYTES"),
    tensor(data=[1, 2, 3]),
    tensor(data=[1, 2, 3, "4"]),
    tensor(data=[1, 2, 3, None]),
    tensor(data=[1, 2, 3, 1e39]),
    tensor(data=[[1, 2], [3, 4]]),
    tensor(data={}),
    tensor(data=[[[[1, 2, 3, 4]]]]),
    tensor(name="", data=[1, 2, 3, 4]),
    tensor(name="x" * 300),
    tensor(name="x\r\nNats-Rollup: all"),
    tensor(name="y"),
    tensor(parameters={"binary_data_size": -1}),
    tensor(parameters={"binary_data_size": 1 << 62}),
    tensor(parameters={"shared_memory_region": "/psm_1"}, data=None),
    tensor(parameters={"base64": True}, data="AAAA"),
    tensor(parameters={"base64": True}, data="not base64"),
]


@pytest.mark.parametrize("sent", TENSORS, ids=[str(sent)[:80] for sent in TENSORS])
@pytest.mark.parametrize("route", ["infer", "jobs"])
def test_a_tensor_that_does_not_add_up_is_refused_before_it_is_queued(
    target: Served, sent: dict[str, Any], route: str
) -> None:
    body = {"inputs": [sent]} if route == "infer" else {"model": "bump", "inputs": [sent]}
    bundles = metrics.BUNDLE_JOBS.labels("infer")._sum.get()
    with target.client() as http:
        answer = http.post(INFER if route == "infer" else "/v1/jobs", json=body)
        jobs = http.get("/v1/jobs").json()["jobs"]
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_tensor"), answer.text[:300]
    assert len(answer.json()["error"]) < 1000
    assert jobs == []
    assert metrics.BUNDLE_JOBS.labels("infer")._sum.get() == bundles


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"inputs": [tensor()] * 1025}, "inputs"),
        ({"inputs": [tensor()], "outputs": [{"name": "y"}] * 1025}, "outputs"),
        ({"inputs": [tensor()], "parameters": {str(number): 1 for number in range(257)}}, "parameters"),
        ({"inputs": [tensor(parameters={str(number): 1 for number in range(257)})]}, "inputs[0].parameters"),
        (
            {"inputs": [tensor()], "outputs": [{"name": "y", "parameters": {str(n): 1 for n in range(257)}}]},
            "outputs[0].parameters",
        ),
    ],
)
def test_more_parts_than_any_model_has_are_refused_by_name(target: Served, body: dict[str, Any], field: str) -> None:
    with target.client() as http:
        answer = http.post(INFER, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{field} has ")


def test_six_megabytes_of_empty_tensors_cost_no_more_than_reading_them() -> None:
    body = b'{"inputs": [' + b",".join([b'{"name":""}'] * 500_000) + b"]}"
    began = time.monotonic()
    with pytest.raises(BadTensor, match="500000"):
        oip.parse_infer_request(body, None)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("shape", [(1 << 63, 2), (0, 1 << 62), (0, 1 << 40, 1 << 40), (1 << 21, 1 << 21)])
def test_a_product_that_no_machine_holds_is_refused_also_beside_a_zero(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadTensor):
        element_count(shape, name="x")


@given(st.lists(st.one_of(st.integers(-3, 40), st.integers(-(2**64), 2**64)), max_size=40), st.binary(max_size=64))
def test_what_passes_the_check_numpy_can_hold(shape: list[int], data: bytes) -> None:
    made = Tensor("x", "UINT8", tuple(shape), data)
    try:
        check(made)
    except BadTensor:
        return
    assert np.frombuffer(data, np.uint8).reshape(shape).nbytes == len(data)


scalars = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from([":", '"', "\\", ": ", '":'])
)
keys = st.text(max_size=3) | st.sampled_from(["name", ":x", 'a"', "\\", "{", "}", "é", "\\u0061"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_a_text_whose_keys_are_all_different_passes(value: Any, ascii_only: bool, indent: int | None) -> None:
    json_duplicates.refuse_duplicates(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode())


@given(
    value=values,
    key=keys.filter(lambda key: not key.startswith(":")),
    one=scalars,
    two=scalars,
    ascii_only=st.booleans(),
    depth=st.integers(0, 3),
)
def test_a_key_that_is_said_twice_is_found_wherever_it_is(
    *, value: Any, key: str, one: Any, two: Any, ascii_only: bool, depth: int
) -> None:
    said = json.dumps(key, ensure_ascii=ascii_only)
    text = f'{{{said}: {json.dumps(one)}, "between": {json.dumps(value)}, {said}: {json.dumps(two)}}}'
    for _ in range(depth):
        text = f'[{json.dumps(value)}, {{"around": {text}}}]'
    if key in ("between", "around"):
        return
    with pytest.raises(BadJson, match="duplicate key"):
        json_duplicates.refuse_duplicates(text.encode())


def test_nan_and_infinity_travel_as_binary_and_never_as_json() -> None:
    """JSON has no word for them, as in Triton; a binary tensor may hold them, and a model may want them."""
    for word in (b"NaN", b"Infinity", b"-Infinity", b'"NaN"'):
        body = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [%b]}]}' % word
        with pytest.raises(InvalidRequest):
            oip.parse_infer_request(body, None)
    sent, length = oip.build_infer_request({"x": np.array([np.nan, np.inf], np.float32)})
    (found,) = oip.parse_infer_request(sent, length).inputs
    assert np.isnan(np.frombuffer(found.data, np.float32)[0])


@pytest.mark.parametrize(
    "data", [b'{"a": 1, "\\u00zz": 1, "b": 1}', b'{"a": 1, "a\xff": "\\\\"}', b'"a": "\\\\"', b"}}\\"]
)
def test_what_a_parser_passed_over_is_read_with_the_same_error(data: bytes) -> None:
    with pytest.raises(BadJson):
        json_duplicates.refuse_duplicates(data)
