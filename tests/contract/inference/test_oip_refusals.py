"""What an infer request must not be: refused with a status and a message that the client can show."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import tritonclient.http as triton
from support.http.oip_cases import VALUES, assert_same, given, refused
from support.http.served import Served
from tritonclient.utils import InferenceServerException

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
        ([given("x", VALUES["FP32"]), given("x", VALUES["FP32"])], ("'x'", "more than once")),
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
        ([1, 4], "FP32", 16, b"\0" * 20, ("4 unexpected bytes",)),
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
