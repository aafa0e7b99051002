"""An unmodified ``tritonclient[http]`` against the gateway: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import models
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from onnx import helper
from served import Served
from tritonclient.utils import InferenceServerException

Array = npt.NDArray[Any]

VALUES: dict[str, Array] = {
    "BOOL": np.array([[True, False, True, False], [False, True, True, False]]),
    "UINT8": np.array([[0, 1, 2, 255], [9, 8, 7, 6]], np.uint8),
    "UINT16": np.array([[0, 1, 2, 65535], [9, 8, 7, 6]], np.uint16),
    "UINT32": np.array([[0, 1, 2, 2**32 - 1], [9, 8, 7, 6]], np.uint32),
    "UINT64": np.array([[0, 1, 2, 2**64 - 1], [9, 8, 7, 6]], np.uint64),
    "INT8": np.array([[0, -1, 127, -128], [9, 8, 7, 6]], np.int8),
    "INT16": np.array([[0, -1, 32767, -32768], [9, 8, 7, 6]], np.int16),
    "INT32": np.array([[0, -1, 2**31 - 1, -(2**31)], [9, 8, 7, 6]], np.int32),
    "INT64": np.array([[0, -1, 2**63 - 1, -(2**63)], [9, 8, 7, 6]], np.int64),
    "FP16": np.array([[0, -1.5, 65504, 1e-7], [9, 8, 7, 6]], np.float16),
    "BF16": np.array([[0, -1.5, 3e38, 1e-7], [9, 8, 7, 6]], ml_dtypes.bfloat16),
    "FP32": np.array([[0, -1.5, 3.4e38, 1e-30], [9, 8, 7, 6]], np.float32),
    "FP64": np.array([[0, -1.5, 1.7e308, 1e-300], [9, 8, 7, 6]], np.float64),
    "BYTES": np.array([["", "a", "grüße", "汉字"], ["9", "8", "7", "6" * 300]], np.object_),
}
BINARY_ONLY = ("FP16", "BF16")


def two_outputs() -> bytes:
    """``total = a + b`` and ``left = a``, from two inputs."""
    nodes = [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Identity", ["a"], ["left"])]
    inputs = [models.value(name, "FP32", ["n", 3]) for name in ("a", "b")]
    outputs = [models.value(name, "FP32", ["n", 3]) for name in ("total", "left")]
    return models.to_bytes(models.model(nodes, inputs, outputs))


MODELS = {
    **{f"same-{datatype.lower()}": models.identity(datatype) for datatype in VALUES},
    "two": two_outputs(),
    "classifier": models.classifier(),
    "fixed": models.identity("FP32", (4,)),
}


@pytest.fixture(scope="module")
def oip(served: Served) -> Served:
    for name, content in MODELS.items():
        served.push(name, content)
    return served


@pytest.fixture
def client(oip: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(oip.url.removeprefix("http://"), network_timeout=60) as made:
        yield made


@pytest.fixture
def headers(oip: Served) -> dict[str, str]:
    return dict(oip.headers)


def given(name: str, array: Array, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def texts(array: Array) -> list[bytes]:
    return [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]


def assert_same(datatype: str, got: Array, sent: Array) -> None:
    assert got.shape == sent.shape
    if datatype == "BYTES":
        assert texts(got) == texts(sent)
    else:
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(got, sent)


def two_inputs() -> list[triton.InferInput]:
    return [given("a", np.full((2, 3), 1.5, np.float32)), given("b", np.full((2, 3), 2.0, np.float32))]


def refused(work: Any, *words: str, status: str = "400") -> None:
    """``work`` fails with this status, and the client can show our own message."""
    with pytest.raises(InferenceServerException) as caught:
        work()
    text = str(caught.value)
    assert f"[{status}]" in text, text
    for word in words:
        assert word in text, text


# datatypes


@pytest.mark.parametrize("datatype", VALUES)
def test_every_datatype_goes_both_ways_as_binary(
    client: triton.InferenceServerClient, headers: dict[str, str], datatype: str
) -> None:
    sent = VALUES[datatype]
    answer = client.infer(f"same-{datatype.lower()}", [given("x", sent, datatype)], headers=headers)
    assert_same(datatype, answer.as_numpy("y"), sent)


@pytest.mark.parametrize("datatype", [name for name in VALUES if name not in BINARY_ONLY])
def test_every_datatype_that_json_can_carry_goes_both_ways_as_json(
    client: triton.InferenceServerClient, headers: dict[str, str], datatype: str
) -> None:
    sent = VALUES[datatype]
    answer = client.infer(
        f"same-{datatype.lower()}",
        [given("x", sent, datatype, binary=False)],
        outputs=[triton.InferRequestedOutput("y", binary_data=False)],
        headers=headers,
    )
    assert "data" in answer.get_output("y")
    assert_same(datatype, answer.as_numpy("y"), sent)


@pytest.mark.parametrize("datatype", BINARY_ONLY)
def test_datatypes_without_a_json_form_are_refused_as_json_output(
    client: triton.InferenceServerClient, headers: dict[str, str], datatype: str
) -> None:
    outputs = [triton.InferRequestedOutput("y", binary_data=False)]
    inputs = [given("x", VALUES[datatype], datatype)]
    refused(lambda: client.infer(f"same-{datatype.lower()}", inputs, outputs=outputs, headers=headers), datatype, "'y'")


def test_bytes_that_are_not_utf8_are_refused_where_onnx_needs_text(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    sent = np.array([[b"\xff\xfe", b"", b"\x00", b"ok"]], np.object_)
    refused(
        lambda: client.infer("same-bytes", [given("x", sent, "BYTES")], headers=headers), "'x'", "UTF-8", status="500"
    )


@pytest.mark.parametrize("binary", [True, False])
def test_a_tensor_without_elements_has_an_answer_without_elements(
    client: triton.InferenceServerClient, headers: dict[str, str], binary: bool
) -> None:
    sent = np.zeros((0, 4), np.float32)
    outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
    answer = client.infer("same-fp32", [given("x", sent, binary=binary)], outputs=outputs, headers=headers)
    assert answer.get_output("y")["shape"] == [0, 4]


# outputs


def test_binary_and_json_outputs_mix_in_one_answer_in_the_order_asked_for(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    outputs = [
        triton.InferRequestedOutput("left", binary_data=False),
        triton.InferRequestedOutput("total", binary_data=True),
    ]
    answer = client.infer("two", two_inputs(), outputs=outputs, headers=headers)
    told = answer.get_response()["outputs"]
    assert [item["name"] for item in told] == ["left", "total"]
    assert "data" in told[0]
    assert told[1]["parameters"]["binary_data_size"] == 24
    np.testing.assert_array_equal(answer.as_numpy("total"), np.full((2, 3), 3.5, np.float32))
    np.testing.assert_array_equal(answer.as_numpy("left"), np.full((2, 3), 1.5, np.float32))


def test_without_requested_outputs_all_come_in_the_models_order(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    answer = client.infer("two", two_inputs(), headers=headers)
    assert [item["name"] for item in answer.get_response()["outputs"]] == ["total", "left"]


def test_only_the_outputs_asked_for_come_back(client: triton.InferenceServerClient, headers: dict[str, str]) -> None:
    outputs = [triton.InferRequestedOutput("left")]
    answer = client.infer("two", two_inputs(), outputs=outputs, headers=headers)
    assert [item["name"] for item in answer.get_response()["outputs"]] == ["left"]
    assert answer.as_numpy("total") is None


def test_inputs_may_come_in_another_order_than_the_models(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    answer = client.infer("two", two_inputs()[::-1], headers=headers)
    np.testing.assert_array_equal(answer.as_numpy("left"), np.full((2, 3), 1.5, np.float32))


def test_the_id_comes_back_and_only_when_there_was_one(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    inputs = [given("x", VALUES["FP32"])]
    with_id = client.infer("same-fp32", inputs, request_id="my-id", headers=headers).get_response()
    without = client.infer("same-fp32", inputs, headers=headers).get_response()
    assert with_id["id"] == "my-id"
    assert "id" not in without
    assert (with_id["model_name"], with_id["model_version"]) == ("same-fp32", "1")


@pytest.mark.parametrize("binary", [True, False])
def test_classification_answers_the_best_classes_as_bytes(
    client: triton.InferenceServerClient, headers: dict[str, str], binary: bool
) -> None:
    sent = np.array([[1, 2, 3, 4], [-4, 3, -2, 1]], np.float32)
    plain = client.infer("classifier", [given("X", sent)], headers=headers).as_numpy("probabilities")
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
    answer = client.infer("classifier", [given("X", sent)], outputs=outputs, headers=headers)
    assert answer.get_output("probabilities")["datatype"] == "BYTES"
    found = answer.as_numpy("probabilities")
    assert found.shape == (2, 2)
    for row, told in zip(plain, found, strict=True):
        best = np.argsort(-row, kind="stable")[:2]
        parts = [item.decode() if isinstance(item, bytes) else item for item in told]
        assert [int(part.split(":")[1]) for part in parts] == list(best)
        np.testing.assert_allclose([float(part.split(":")[0]) for part in parts], row[best], atol=1e-5)


def test_the_client_may_ask_for_a_shorter_time_and_name_a_priority(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    inputs = [given("x", VALUES["FP32"])]
    answer = client.infer("same-fp32", inputs, timeout=10_000_000, priority=1, headers=headers)
    assert_same("FP32", answer.as_numpy("y"), VALUES["FP32"])


# compression


@pytest.mark.parametrize("asked", ["gzip", "deflate"])
@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
@pytest.mark.parametrize("binary", [True, False])
def test_bodies_are_compressed_both_ways(
    client: triton.InferenceServerClient, headers: dict[str, str], sent: str | None, asked: str, binary: bool
) -> None:
    array = np.arange(4000, dtype=np.float32).reshape(-1, 4)[:500]
    answer = client.infer(
        "same-fp32",
        [given("x", array, binary=binary)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
        request_compression_algorithm=sent,
        response_compression_algorithm=asked,
        headers=headers,
    )
    np.testing.assert_array_equal(answer.as_numpy("y"), array)


@pytest.mark.parametrize(("encoding", "unpack"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_the_compressed_answer_says_so_and_is_smaller(oip: Served, encoding: str, unpack: Any) -> None:
    body = {"inputs": [{"name": "x", "shape": [400, 4], "datatype": "FP32", "data": [0.0] * 1600}]}
    with (
        oip.client() as http,
        http.stream("POST", "/v2/models/same-fp32/infer", json=body, headers={"accept-encoding": encoding}) as answer,
    ):
        raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == encoding
        assert int(answer.headers["content-length"]) == len(raw) < 1000
        assert json.loads(unpack(raw))["outputs"][0]["data"] == [0.0] * 1600


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_body_that_is_not_what_its_encoding_says_is_refused(oip: Served, encoding: str) -> None:
    with oip.client() as http:
        answer = http.post("/v2/models/same-fp32/infer", content=b"{}", headers={"content-encoding": encoding})
    assert answer.status_code == 400
    assert "Content-Encoding" in answer.json()["error"]


def test_a_body_that_unpacks_to_more_than_the_limit_is_refused(oip: Served) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    with oip.client() as http:
        answer = http.post("/v2/models/same-fp32/infer", content=bomb, headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


# what is refused


def test_an_unknown_model_or_version_is_not_found(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    inputs = [given("x", VALUES["FP32"])]
    refused(lambda: client.infer("nothing", inputs, headers=headers), "nothing", status="404")
    refused(lambda: client.infer("same-fp32", inputs, model_version="9", headers=headers), "version '9'", status="404")
    refused(lambda: client.get_model_metadata("nothing", headers=headers), "nothing", status="404")
    refused(lambda: client.get_model_config("same-fp32", "9", headers=headers), "version", status="404")


@pytest.mark.parametrize("name", ["Not Allowed", "../../etc", "%2e", "ü", "a" * 65])
def test_a_name_no_model_can_have_is_refused(
    client: triton.InferenceServerClient, headers: dict[str, str], name: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(name, [given("x", VALUES["FP32"])], headers=headers)
    assert str(caught.value).startswith(("[400]", "[404]"))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([given("x", np.zeros((2, 5), np.float32))], ("'x'", "[2, 5]", "[-1, 4]")),
        ([given("x", np.zeros(4, np.float32))], ("'x'", "[4]", "[-1, 4]")),
        ([given("x", np.zeros((2, 4), np.float64), "FP64")], ("'x'", "FP64", "FP32")),
        ([given("wrong", np.zeros((2, 4), np.float32))], ("'wrong'", "'x'")),
        ([given("x", VALUES["FP32"]), given("more", VALUES["FP32"])], ("'more'",)),
        ([given("x", VALUES["FP32"]), given("x", VALUES["FP32"])], ("'x'", "twice")),
        ([], ("'x'", "missing")),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(
    client: triton.InferenceServerClient,
    headers: dict[str, str],
    inputs: Sequence[triton.InferInput],
    words: tuple[str, ...],
) -> None:
    refused(lambda: client.infer("same-fp32", list(inputs), headers=headers), *words)


def test_an_unknown_output_is_refused_by_name(client: triton.InferenceServerClient, headers: dict[str, str]) -> None:
    outputs = [triton.InferRequestedOutput("z")]
    refused(lambda: client.infer("same-fp32", [given("x", VALUES["FP32"])], outputs=outputs, headers=headers), "'z'")


def body_of(shape: Sequence[int], datatype: str, size: int, content: bytes) -> tuple[bytes, int]:
    head = json.dumps(
        {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}]}
    ).encode()
    return head + content, len(head)


@pytest.mark.parametrize(
    ("shape", "datatype", "size", "content", "words"),
    [
        ([1, 4], "FP32", 16, b"\0" * 15, ("binary_data_size", "'x'")),
        ([1, 4], "FP32", 12, b"\0" * 12, ("'x'", "12 bytes", "16")),
        ([1, 4], "FP32", 16, b"\0" * 20, ("4 bytes",)),
        ([1, 4], "FP33", 16, b"\0" * 16, ("FP33", "FP32")),
        ([1, -4], "FP32", 16, b"\0" * 16, ("'x'", "negative")),
        ([2**40, 2**40], "FP32", 16, b"\0" * 16, ("'x'",)),
        ([1] * 40, "FP32", 4, b"\0" * 4, ("'x'", "axes")),
    ],
)
def test_sizes_and_shapes_that_cannot_be_are_refused(
    oip: Served, *, shape: Sequence[int], datatype: str, size: int, content: bytes, words: tuple[str, ...]
) -> None:
    body, length = body_of(shape, datatype, size, content)
    with oip.client() as http:
        answer = http.post(
            "/v2/models/same-fp32/infer", content=body, headers={"inference-header-content-length": str(length)}
        )
    assert answer.status_code == 400
    for word in words:
        assert word in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1e3", "", "9" * 30])
def test_a_header_length_outside_the_body_is_refused(oip: Served, length: str) -> None:
    body, _ = body_of([1, 4], "FP32", 16, b"\0" * 16)
    with oip.client() as http:
        answer = http.post(
            "/v2/models/same-fp32/infer", content=body, headers={"inference-header-content-length": length}
        )
    assert answer.status_code == 400
    assert "inference-header-content-length" in answer.json()["error"].lower()


def test_binary_data_without_the_header_is_refused_with_its_name(oip: Served) -> None:
    body, length = body_of([1, 4], "FP32", 16, b"")
    with oip.client() as http:
        answer = http.post("/v2/models/same-fp32/infer", content=body[:length])
    assert answer.status_code == 400
    assert "inference-header-content-length" in answer.json()["error"]


# raw requests


def test_a_raw_request_is_the_only_input_and_gets_binary_back(oip: Served) -> None:
    sent = np.arange(4, dtype=np.float32)
    with oip.client() as http:
        answer = http.post(
            "/v2/models/same-fp32/infer",
            content=sent.tobytes(),
            headers={"inference-header-content-length": "0", "content-type": "application/octet-stream"},
        )
    assert answer.status_code == 200
    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert json.loads(answer.content[:length])["outputs"][0]["shape"] == [1, 4]
    np.testing.assert_array_equal(np.frombuffer(answer.content[length:], np.float32), sent)


@pytest.mark.parametrize(("model", "content"), [("two", b"\0" * 12), ("same-fp32", b"\0" * 7), ("fixed", b"\0" * 12)])
def test_a_raw_request_that_does_not_fit_the_model_is_refused(oip: Served, model: str, content: bytes) -> None:
    with oip.client() as http:
        answer = http.post(
            f"/v2/models/{model}/infer", content=content, headers={"inference-header-content-length": "0"}
        )
    assert answer.status_code == 400
    assert answer.json()["code"] in ("bad_tensor", "invalid_request")


# about server and models


def test_the_server_tells_what_it_is_and_how_it_is(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    told = client.get_server_metadata()
    assert told["name"] == "tether"
    assert {"binary_tensor_data", "classification", "model_configuration"} <= set(told["extensions"])


@pytest.mark.parametrize("version", ["", "1", "latest"])
def test_a_model_tells_its_signature(
    client: triton.InferenceServerClient, headers: dict[str, str], version: str
) -> None:
    told = client.get_model_metadata("two", version, headers=headers)
    assert told == {
        "name": "two",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": name, "datatype": "FP32", "shape": [-1, 3]} for name in ("a", "b")],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, 3]} for name in ("total", "left")],
    }
    assert client.is_model_ready("two", version, headers=headers)


def test_an_unknown_model_is_not_ready(client: triton.InferenceServerClient, headers: dict[str, str]) -> None:
    assert not client.is_model_ready("nothing", headers=headers)


def test_the_configuration_has_tritons_names(client: triton.InferenceServerClient, headers: dict[str, str]) -> None:
    batched = client.get_model_config("same-bytes", headers=headers)
    assert (batched["backend"], batched["platform"]) == ("onnxruntime", "onnxruntime_onnx")
    assert batched["max_batch_size"] > 0
    assert batched["input"] == [{"name": "x", "data_type": "TYPE_STRING", "dims": [4]}]
    assert batched["dynamic_batching"] == {"max_queue_delay_microseconds": 2000}
    fixed = client.get_model_config("fixed", headers=headers)
    assert fixed["max_batch_size"] == 0
    assert fixed["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}]
    assert "dynamic_batching" not in fixed


def test_the_index_lists_every_version_with_its_state(
    client: triton.InferenceServerClient, headers: dict[str, str]
) -> None:
    told = {(entry["name"], entry["version"]): entry for entry in client.get_model_repository_index(headers=headers)}
    assert told["two", "1"] == {"name": "two", "version": "1", "state": "READY", "reason": ""}
    assert {(name, "1") for name in MODELS} <= set(told)


# keys


@pytest.mark.parametrize("sent", [{}, {"x-api-key": "tk_wrong"}, {"authorization": "Bearer nothing"}])
def test_without_a_valid_key_nothing_is_told(client: triton.InferenceServerClient, sent: dict[str, str]) -> None:
    inputs = [given("x", VALUES["FP32"])]
    refused(lambda: client.infer("same-fp32", inputs, headers=sent), "Invalid API key", status="401")
    refused(lambda: client.infer("nothing", inputs, headers=sent), "Invalid API key", status="401")
    refused(lambda: client.get_model_metadata("same-fp32", headers=sent), "Invalid API key", status="401")
    refused(lambda: client.get_model_repository_index(headers=sent), "Invalid API key", status="401")


def test_a_key_may_come_as_a_bearer_token_and_does_what_its_scopes_say(
    oip: Served, client: triton.InferenceServerClient
) -> None:
    sent = {"Authorization": f"Bearer {oip.new_key('infer')}"}
    answer = client.infer("same-fp32", [given("x", VALUES["FP32"])], headers=sent)
    assert_same("FP32", answer.as_numpy("y"), VALUES["FP32"])
    refused(lambda: client.get_model_metadata("same-fp32", headers=sent), "models:read", status="403")


# the other clients


def test_async_requests_of_the_blocking_client_are_answered(oip: Served, headers: dict[str, str]) -> None:
    address = oip.url.removeprefix("http://")
    with triton.InferenceServerClient(address, concurrency=4, network_timeout=60) as client:
        pending = [
            client.async_infer("same-fp32", [given("x", np.full((1, 4), value, np.float32))], headers=headers)
            for value in range(12)
        ]
        for value, request in enumerate(pending):
            np.testing.assert_array_equal(request.get_result().as_numpy("y"), np.full((1, 4), value, np.float32))


async def test_the_asyncio_client_gets_the_same_answers(oip: Served, headers: dict[str, str]) -> None:
    async with triton_aio.InferenceServerClient(oip.url.removeprefix("http://")) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("two", headers=headers)
        answer = await client.infer(
            "two",
            two_inputs(),
            outputs=[triton_aio.InferRequestedOutput("left", binary_data=False)],
            request_id="aio",
            request_compression_algorithm="gzip",
            response_compression_algorithm="deflate",
            headers=headers,
        )
        assert answer.get_response()["id"] == "aio"
        np.testing.assert_array_equal(answer.as_numpy("left"), np.full((2, 3), 1.5, np.float32))
        with pytest.raises(InferenceServerException, match=r"\[404\].*nothing"):
            await client.infer("nothing", two_inputs(), headers=headers)
        with pytest.raises(InferenceServerException, match="Invalid API key"):
            await client.get_model_metadata("two")
