"""An unmodified ``tritonclient[http]`` against the gateway: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from support.http.oip_cases import BINARY_ONLY, MODELS, VALUES, assert_same, given, refused, two_inputs
from support.http.served import Served
from tritonclient.utils import InferenceServerException

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
        lambda: client.infer("same-bytes", [given("x", sent, "BYTES")], headers=headers), "'x'", "UTF-8", status="422"
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
