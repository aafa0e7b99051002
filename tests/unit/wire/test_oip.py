"""Bodies of the Open Inference Protocol: what is read, what is written, what is refused and how it is told."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Tensor, pack_bytes, to_numpy
from tether.errors import BadJson, BadTensor, InvalidRequest, TetherError
from tether.wire import oip

Json = dict[str, Any]


def tensor(data: Any, *, datatype: str = "FP32", shape: tuple[int, ...] | None = None, **more: Any) -> Json:
    shape = tuple(np.shape(data)) if shape is None else shape
    return {"name": "x", "datatype": datatype, "shape": list(shape), "data": data, **more}


def body(*inputs: Json, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def parse(*inputs: Json, **more: Any) -> oip.InferRequest:
    return oip.parse_infer_request(body(*inputs, **more), None)


def binary_body(head: Json, *parts: bytes) -> tuple[bytes, int]:
    encoded = json.dumps(head).encode()
    return encoded + b"".join(parts), len(encoded)


def refused(kind: type[TetherError], *inputs: Json, **more: Any) -> TetherError:
    with pytest.raises(kind) as caught:
        parse(*inputs, **more)
    assert "\n" not in caught.value.message
    return caught.value


# JSON data


@pytest.mark.parametrize("data", [[[1, 2.5], [3, 4]], [1, 2.5, 3, 4]])
def test_json_data_may_be_nested_or_flat(data: Any) -> None:
    request = parse(tensor(data, shape=(2, 2)))
    np.testing.assert_array_equal(to_numpy(request.inputs[0]), np.array([[1, 2.5], [3, 4]], dtype=np.float32))


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("BOOL", [True, False, 1, 0]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 65535]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT16", [-32768, 32767]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP32", [0.5, -3.4028234663852886e38]),
        ("FP64", [0.1, 1.7976931348623157e308]),
    ],
)
def test_every_number_datatype_reads_its_whole_range(datatype: str, data: list[Any]) -> None:
    (read,) = parse(tensor(data, datatype=datatype)).inputs
    np.testing.assert_array_equal(to_numpy(read), np.array(data, dtype=NUMPY_DTYPES[datatype]))


def test_bytes_are_strings_as_utf8() -> None:
    (read,) = parse(tensor(["", "grüß", "\u0000"], datatype="BYTES")).inputs
    assert read.data == pack_bytes([b"", "grüß".encode(), b"\0"])


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", [256]),
        ("UINT8", [-1]),
        ("INT8", [128]),
        ("INT64", [2**63]),
        ("UINT64", [2**64]),
        ("INT32", [1.0]),
        ("INT32", [True]),
        ("INT32", ["1"]),
        ("FP32", ["1"]),
        ("FP32", [True]),
        ("FP32", [None]),
        ("FP32", [1e39]),
        ("BOOL", [2]),
        ("BOOL", [-1]),
        ("BOOL", [10**30]),
        ("BOOL", [1.0]),
        ("BYTES", [1]),
        ("BYTES", [None]),
    ],
)
def test_a_value_that_does_not_fit_its_datatype_is_refused_by_name(datatype: str, data: list[Any]) -> None:
    error = refused(BadTensor, tensor([], shape=(0,), datatype="FP32"), tensor(data, datatype=datatype, shape=(1,)))
    assert error.field == "inputs[1].data"
    assert "'x'" in error.message
    assert datatype in error.message


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ([[1, 2], [3]], (2, 2)),
        ([[1, 2], [3, 4]], (4, 1)),
        ([[1, 2], [3, 4], [5, 6]], (2, 3)),
        ([[[1, 2]]], (1, 2)),
        ([1, 2, 3], (2, 2)),
        ([], (1,)),
        ([[], []], (1,)),
        (1.5, (1,)),
        ({"a": 1}, (1,)),
        ([1, [2]], (2,)),
        (None, (1,)),
        ("1", (1,)),
    ],
)
def test_a_nest_that_is_not_the_shape_is_refused(data: Any, shape: tuple[int, ...]) -> None:
    assert refused(BadTensor, tensor(data, shape=shape)).field == "inputs[0].data"


@pytest.mark.parametrize(("data", "shape"), [([], (0, 3)), ([[], []], (2, 0)), ([[], []], (2, 0, 3)), ([], (0,))])
def test_empty_tensors_are_legal(data: Any, shape: tuple[int, ...]) -> None:
    assert parse(tensor(data, shape=shape)).inputs[0] == Tensor("x", "FP32", shape, b"")


@pytest.mark.parametrize("data", [7, [7]])
def test_a_scalar_may_stand_alone(data: Any) -> None:
    assert parse(tensor(data, shape=(), datatype="UINT8")).inputs[0] == Tensor("x", "UINT8", (), b"\x07")


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_json_form(datatype: str) -> None:
    assert "binary" in refused(BadTensor, tensor([1.0], datatype=datatype)).message


@pytest.mark.parametrize("shape", [[-1], [2**63], [1] * 40, [2**41]])
def test_impossible_shapes_are_refused(shape: list[int]) -> None:
    refused(BadTensor, tensor([1.0], shape=tuple(shape)))


def test_an_unknown_datatype_is_named() -> None:
    assert "FLOAT" in refused(BadTensor, tensor([1.0], datatype="FLOAT")).message


@pytest.mark.parametrize("name", ["", "a\nb", "n" * 1025])
def test_names_nobody_can_read_are_refused(name: str) -> None:
    assert refused(BadTensor, {**tensor([1.0]), "name": name}).field == "inputs[0].name"


def test_a_tensor_without_data_is_refused() -> None:
    refused(BadTensor, {"name": "x", "shape": [1], "datatype": "FP32"})


# the object around the tensors


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff", None),
        (b'{"inputs":[]} x', None),
        (b"{}", None),
        (b'{"inputs":[{"name":1}]}', "inputs[0].name"),
        (b'{"inputs":[{"name":"x","shape":[1.5]}]}', "inputs[0].shape[0]"),
        (b'{"inputs":[],"id":7}', "id"),
        (b'{"inputs":[],"id":"\xff"}', None),
        (b'{"inputs":[],"parameters":{"a":null}}', None),
        (b'{"inputs":[],"x":' + b"[" * 200_000, None),
    ],
)
def test_what_is_no_request_object_is_bad_json(raw: bytes, field: str | None) -> None:
    with pytest.raises(BadJson) as caught:
        oip.parse_infer_request(raw, None)
    if field:
        assert caught.value.field == field


def test_a_key_that_is_given_twice_is_refused() -> None:
    with pytest.raises(BadJson, match="duplicate key 'id'"):
        oip.parse_infer_request(b'{"id":"a","inputs":[],"id":"b"}', None)


def test_unknown_keys_are_ignored() -> None:
    assert parse(tensor([1.0]), novel={"deep": [1]}).inputs[0].name == "x"


def test_requested_outputs_take_the_default_unless_they_say_otherwise() -> None:
    request = parse(
        tensor([1.0]),
        parameters={"binary_data_output": True, "priority": 1},
        outputs=[{"name": "a"}, {"name": "b", "parameters": {"binary_data": False, "classification": 3}}],
    )
    assert request.binary_default
    assert request.parameters["priority"] == 1
    assert request.outputs == (oip.RequestedOutput("a", binary=True), oip.RequestedOutput("b", classification=3))


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"binary_data_output": 1}},
        {"outputs": [{"name": "a", "parameters": {"binary_data": "yes"}}]},
        {"outputs": [{"name": "a", "parameters": {"classification": -1}}]},
        {"outputs": [{"name": "a", "parameters": {"classification": True}}]},
        {"outputs": [{"name": "a", "parameters": {"shared_memory_region": "r"}}]},
    ],
)
def test_parameters_of_the_wrong_type_are_refused(more: Json) -> None:
    assert refused(InvalidRequest, tensor([1.0]), **more).field


def test_shared_memory_is_refused_by_name() -> None:
    refused(BadTensor, {"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"shared_memory_region": "r"}})


# binary data


def head(*sizes: int, datatype: str = "UINT8", shape: tuple[int, ...] | None = None) -> Json:
    inputs = [
        {
            "name": f"x{index}",
            "datatype": datatype,
            "shape": list(shape or (size,)),
            "parameters": {"binary_data_size": size},
        }
        for index, size in enumerate(sizes)
    ]
    return {"inputs": inputs}


def test_binary_inputs_take_their_bytes_in_order_and_json_inputs_none() -> None:
    request_head = head(2, 0, 3)
    request_head["inputs"].insert(1, tensor([9], datatype="UINT8"))
    raw, length = binary_body(request_head, b"ab", b"cde")
    assert [t.data for t in oip.parse_infer_request(raw, length).inputs] == [b"ab", b"\x09", b"", b"cde"]


@pytest.mark.parametrize(
    ("request_head", "rest"),
    [
        (head(3), b"ab"),
        (head(2), b"abc"),
        (head(4, shape=(3,)), b"abcd"),
        (head(4, datatype="BYTES", shape=(1,)), b"\xff\0\0\0"),
        (head(8, datatype="BYTES", shape=(1,)), b"\0\0\0\0\0\0\0\0"),
        (head(-1, shape=(1,)), b""),
    ],
)
def test_binary_sizes_must_fit(request_head: Json, rest: bytes) -> None:
    raw, length = binary_body(request_head, rest)
    with pytest.raises(InvalidRequest):
        oip.parse_infer_request(raw, length)


def test_a_size_that_is_no_whole_number_is_refused() -> None:
    for size in (True, 1.0, "1"):
        request_head = head(1)
        request_head["inputs"][0]["parameters"]["binary_data_size"] = size
        raw, length = binary_body(request_head, b"a")
        with pytest.raises(BadTensor, match="whole number"):
            oip.parse_infer_request(raw, length)


def test_data_and_binary_data_together_are_refused() -> None:
    request_head = head(1)
    request_head["inputs"][0]["data"] = [1]
    raw, length = binary_body(request_head, b"a")
    with pytest.raises(BadTensor, match="both"):
        oip.parse_infer_request(raw, length)


def test_a_missing_length_header_is_named() -> None:
    raw, _ = binary_body(head(1), b"")
    with pytest.raises(BadTensor, match=oip.HEADER_LENGTH):
        oip.parse_infer_request(raw, None)


@pytest.mark.parametrize("length", [-1, 10_000])
def test_a_length_outside_the_body_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        oip.parse_infer_request(body(), length)
    assert caught.value.field == oip.HEADER_LENGTH


# raw requests


def raw_request(spec: TensorSpec, data: bytes) -> Tensor:
    request = oip.parse_infer_request(data, 0, specs={spec.name: spec})
    assert request.binary_default
    (only,) = request.inputs
    return only


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((4,), 4, (4,)), ((-1, 2), 4, (2, 2)), ((-1, -1), 4, (1, 4)), ((2, -1), 4, (2, 2)), ((-1,), 0, (0,))],
)
def test_a_raw_body_is_the_single_input(shape: tuple[int, ...], size: int, expected: tuple[int, ...]) -> None:
    read = raw_request(TensorSpec("x", "UINT8", shape), bytes(size))
    assert read == Tensor("x", "UINT8", expected, bytes(size))


def test_a_raw_body_may_be_one_bytes_element() -> None:
    assert raw_request(TensorSpec("x", "BYTES", (-1,)), b"\xff\0") == Tensor(
        "x", "BYTES", (1,), pack_bytes([b"\xff\0"])
    )


@pytest.mark.parametrize(
    "specs",
    [
        None,
        {},
        {"a": TensorSpec("a", "UINT8", (1,)), "b": TensorSpec("b", "UINT8", (1,))},
        {"a": TensorSpec("a", "UINT8", (2, -1, -1))},
        {"a": TensorSpec("a", "UINT8", (0, -1))},
        {"a": TensorSpec("a", "FP32", (-1,))},
        {"a": TensorSpec("a", "BYTES", (2,))},
    ],
)
def test_a_raw_body_needs_one_input_that_it_can_fill(specs: dict[str, TensorSpec] | None) -> None:
    with pytest.raises(InvalidRequest):
        oip.parse_infer_request(b"abc", 0, specs=specs)


# nothing a stranger sends makes anything but our own errors

SAMPLES = [
    oip.build_infer_request({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(["x", "yz"])}),
    oip.build_infer_request({"a": np.arange(6).reshape(2, 3)}, binary=False, outputs=["a"]),
    (body(tensor([[1, 2], [3, 4]]), tensor("AAA=", datatype="UINT8", shape=(2,), parameters={"base64": True})), None),
]


@settings(max_examples=300)
@given(
    sample=st.sampled_from(SAMPLES),
    cuts=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=4)), max_size=4),
    length=st.one_of(st.just(0), st.none(), st.integers(-2, 500)),
    keep=st.booleans(),
)
def test_torn_and_mutated_bodies_only_raise_our_errors(
    sample: tuple[bytes, int | None], cuts: list[tuple[int, int, bytes]], length: int | None, keep: bool
) -> None:
    raw, own = sample
    for position, width, replacement in cuts:
        raw = raw[:position] + replacement + raw[position + width :]
    specs = {"a": TensorSpec("a", "FP32", (-1, 3))}
    for read in (lambda n: oip.parse_infer_request(raw, n, specs=specs), lambda n: oip.parse_infer_response(raw, n)):
        try:
            read(own if keep else length)
        except TetherError as error:
            assert error.message  # noqa: PT017 - not raising is fine too


@given(raw=st.binary(max_size=64), length=st.none() | st.integers(0, 64))
def test_arbitrary_bytes_only_raise_our_errors(raw: bytes, length: int | None) -> None:
    try:
        oip.parse_infer_request(raw, length)
    except TetherError as error:
        assert error.message  # noqa: PT017 - not raising is fine too
