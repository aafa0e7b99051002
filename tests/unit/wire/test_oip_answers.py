"""Answers of the Open Inference Protocol, and what survives a journey from client to server and back."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.domain.tensor import NUMPY_DTYPES, Tensor, from_numpy, pack_bytes, to_numpy
from tether.errors import InferenceFailed, InvalidRequest
from tether.wire import oip

Json = dict[str, Any]


# answers


def answer(request: oip.InferRequest, *outputs: Tensor) -> Json:
    encoded, length = oip.build_infer_response(model="m", version=3, request=request, outputs=outputs)
    assert length is None
    return json.loads(encoded)  # type: ignore[no-any-return]


ONE = Tensor("one", "INT64", (1,), struct.pack("<q", 1))
TWO = Tensor("two", "FP32", (1, 2), struct.pack("<2f", 0.5, 2.0))


def test_an_answer_names_model_version_and_every_output() -> None:
    assert answer(oip.InferRequest("", ()), ONE, TWO) == {
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "one", "datatype": "INT64", "shape": [1], "data": [1]},
            {"name": "two", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 2.0]},
        ],
    }


def test_the_id_is_repeated_only_when_it_was_given() -> None:
    assert answer(oip.InferRequest("q7", ()), ONE)["id"] == "q7"
    assert "id" not in answer(oip.InferRequest("", ()), ONE)


def test_outputs_come_in_the_requested_order_each_in_its_form() -> None:
    wanted = (oip.RequestedOutput("two", binary=True), oip.RequestedOutput("one"))
    raw, length = oip.build_infer_response(
        model="m", version="1", request=oip.InferRequest("", (), wanted), outputs=(ONE, TWO)
    )
    assert length is not None
    outputs = json.loads(raw[:length])["outputs"]
    assert [output["name"] for output in outputs] == ["two", "one"]
    assert outputs[0] == {"name": "two", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    assert outputs[1]["data"] == [1]
    assert raw[length:] == TWO.data


def test_an_output_the_model_did_not_answer_is_an_error() -> None:
    with pytest.raises(InferenceFailed):
        answer(oip.InferRequest("", (), (oip.RequestedOutput("three"),)), ONE)


def test_an_empty_output_still_has_data() -> None:
    assert answer(oip.InferRequest("", ()), Tensor("e", "FP32", (0, 2), b""))["outputs"][0]["data"] == []


@pytest.mark.parametrize(
    "output",
    [
        Tensor("y", "FP16", (1,), b"\0\0"),
        Tensor("y", "BF16", (1,), b"\0\0"),
        Tensor("y", "FP32", (2,), struct.pack("<2f", 1, math.nan)),
        Tensor("y", "FP64", (2,), struct.pack("<2d", math.inf, -math.inf)),
        Tensor("y", "BYTES", (1,), pack_bytes([b"\xff"])),
    ],
)
def test_what_json_cannot_carry_is_refused_with_the_way_out_and_travels_as_binary(output: Tensor) -> None:
    with pytest.raises(InvalidRequest, match="binary"):
        answer(oip.InferRequest("", ()), output)
    request = oip.InferRequest("", (), binary_default=True)
    raw, length = oip.build_infer_response(model="m", version="1", request=request, outputs=[output])
    assert length is not None
    assert raw[length:] == output.data


def test_large_finite_numbers_whose_sum_overflows_are_not_taken_for_infinity() -> None:
    big = Tensor("y", "FP64", (2,), struct.pack("<2d", 1.5e308, 1.5e308))
    assert answer(oip.InferRequest("", ()), big)["outputs"][0]["data"] == [1.5e308, 1.5e308]


def test_classification_answers_the_best_classes_best_first() -> None:
    scores = from_numpy("y", np.array([[0.1, 0.7, 0.2], [3.0, 1.0, 3.0]], dtype=np.float32))
    request = oip.InferRequest("", (), (oip.RequestedOutput("y", classification=2),))
    (output,) = answer(request, scores)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["0.700000:1", "0.200000:2", "3.000000:0", "3.000000:2"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16])
def test_classification_knows_every_kind_of_number(dtype: Any) -> None:
    best = oip.classify(from_numpy("y", np.array([1, 5, 3], dtype=dtype)), 9)
    assert [item.decode().split(":")[1] for item in to_numpy(best)] == ["1", "2", "0"]
    assert best.shape == (3,)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_classification_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    assert oip.classify(from_numpy("y", np.zeros(shape, dtype=np.float32)), 2).data == b""


@pytest.mark.parametrize("output", [Tensor("y", "BOOL", (1,), b"\1"), Tensor("y", "FP32", (), bytes(4))])
def test_what_has_no_classes_is_not_classified(output: Tensor) -> None:
    with pytest.raises(InvalidRequest):
        oip.classify(output, 1)


# client and server speak to each other

DATATYPES = ["BYTES", *NUMPY_DTYPES]
JSON_DATATYPES = [name for name in DATATYPES if name not in ("FP16", "BF16")]


@st.composite
def arrays(draw: st.DrawFn, datatypes: list[str] = DATATYPES, *, finite: bool = False) -> np.ndarray[Any, Any]:
    datatype = draw(st.sampled_from(datatypes))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = math.prod(shape)
    if datatype == "BYTES":
        items = draw(st.lists(st.text() if finite else st.binary(), min_size=count, max_size=count))
        array = np.empty(count, dtype=np.object_)
        array[:] = [item.encode() if isinstance(item, str) else item for item in items]
        return array.reshape(shape)
    dtype = NUMPY_DTYPES[datatype]
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if datatype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    found = np.frombuffer(raw, dtype=dtype).reshape(shape)
    return np.where(np.isfinite(found), found, 0).astype(dtype) if finite and datatype in ("FP32", "FP64") else found


def same(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> bool:
    return (first.shape, from_numpy("", first)) == (second.shape, from_numpy("", second))


@given(first=arrays(), second=arrays())
def test_every_datatype_survives_binary_both_ways(first: Any, second: Any) -> None:
    raw, length = oip.build_infer_request({"a": first, "b": second}, id="i")
    request = oip.parse_infer_request(raw, length)
    assert request.id == "i"
    assert [t.name for t in request.inputs] == ["a", "b"]
    answered, length = oip.build_infer_response(model="m", version=1, request=request, outputs=request.inputs)
    response = oip.parse_infer_response(answered, length)
    assert (response.model, response.version, response.id) == ("m", "1", "i")
    assert same(response.outputs["a"], first)
    assert same(response.outputs["b"], second)


@given(array=arrays(JSON_DATATYPES, finite=True))
def test_every_datatype_with_a_json_form_survives_json_both_ways(array: Any) -> None:
    raw, length = oip.build_infer_request({"a": array}, binary=False, outputs=["a"])
    assert length is None
    request = oip.parse_infer_request(raw, None)
    answered, length = oip.build_infer_response(model="m", version=1, request=request, outputs=request.inputs)
    assert length is None
    assert same(oip.parse_infer_response(answered, None).outputs["a"], array)


@given(array=arrays(), compact=st.booleans())
def test_a_job_body_carries_every_tensor_in_json_alone(array: Any, compact: bool) -> None:
    sent = from_numpy("a", array)
    encoded = json.dumps(oip.tensor_to_json(sent, compact=compact))
    (from_object,) = oip.tensors_from_json([json.loads(encoded)])
    (from_raw,) = oip.tensors_from_json([msgspec.Raw(encoded.encode())])
    (from_struct,) = oip.tensors_from_json([msgspec.json.decode(encoded, type=oip.WireTensor)])
    assert from_object == from_raw == from_struct == sent


@pytest.mark.parametrize("data", ["", "AAA", "!!!!", "AAAAAAAA", 7, "\ud800"])
def test_base64_that_is_not_the_tensor_is_refused(data: Any) -> None:
    with pytest.raises(InvalidRequest):
        oip.tensors_from_json(
            [{"name": "x", "datatype": "FP32", "shape": [1], "data": data, "parameters": {"base64": True}}]
        )


def test_objects_that_are_no_tensors_are_refused() -> None:
    for item in ({"name": 1}, {"name": "x", "data": object()}, msgspec.Raw(b"[]")):
        with pytest.raises(InvalidRequest):
            oip.tensors_from_json([item])
