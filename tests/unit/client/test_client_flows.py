"""What a client sends and how it takes each answer, driven without a socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.http.drive import BROKEN, REFUSED, Drive, done, job, refusal, reply

from tether.client import operations as flows
from tether.client import split_inference
from tether.client.operations import JobInfo, JobOptions
from tether.client.protocol import NoResponse, Response
from tether.client.pushing import local_model, push
from tether.domain.job import JobState
from tether.domain.tensor import Tensor, from_numpy, pack_bytes
from tether.errors import (
    AttemptsExhausted,
    BadJson,
    BadTensor,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    JobCancelled,
    OutputMisfit,
    ResultConflict,
    TetherError,
)
from tether.wire import oip

# inference


def answer(*outputs: Tensor) -> Response:
    request = oip.InferRequest("", (), binary_default=True)
    body, length = oip.build_infer_response(model="m", version="1", request=request, outputs=outputs)
    headers = {} if length is None else {"inference-header-content-length": str(length)}
    return Response(200, headers, body)


def test_arrays_travel_as_binary_both_ways() -> None:
    drive = Drive(
        [answer(from_numpy("y", np.arange(3, dtype=np.int32)), Tensor("t", "BYTES", (1,), pack_bytes([b"x"])))]
    )
    outputs = drive(
        lambda policy: split_inference.infer(policy, "a.b", {"x": np.ones((1, 2), dtype=np.float32)}, 3, ["y", "t"])
    )
    np.testing.assert_array_equal(outputs["y"], [0, 1, 2])
    assert list(outputs["t"]) == [b"x"]
    (sent,) = drive.sent
    assert (sent.method, sent.path) == ("POST", "/v2/models/a.b/versions/3/infer")
    assert isinstance(sent.content, bytes)
    request = oip.parse_infer_request(sent.content, int(sent.headers[oip.HEADER_LENGTH]))
    assert request.inputs[0] == from_numpy("x", np.ones((1, 2), dtype=np.float32))
    assert request.outputs == (oip.RequestedOutput("y", binary=True), oip.RequestedOutput("t", binary=True))


def test_names_cannot_leave_their_place_in_the_path() -> None:
    drive = Drive([answer()])
    drive(lambda policy: split_inference.infer(policy, "../v1/keys?x", {}, "a/b", []))
    assert drive.sent[0].path == "/v2/models/..%2Fv1%2Fkeys%3Fx/versions/a%2Fb/infer"


def test_lists_take_the_datatype_the_model_declares() -> None:
    spec = {"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]}
    drive = Drive([reply(spec), answer()])
    drive(lambda policy: split_inference.infer(policy, "m", {"x": [1, 0.1]}, None, []))
    assert [send.path for send in drive.sent] == ["/v2/models/m", "/v2/models/m/infer"]
    content = drive.sent[1].content
    assert isinstance(content, bytes)
    request = oip.parse_infer_request(content, int(drive.sent[1].headers[oip.HEADER_LENGTH]))
    assert request.inputs[0].datatype == "FP32"


@pytest.mark.parametrize(
    ("value", "datatype"),
    [([256], "UINT8"), ([0.5], "INT64"), ([1e300], "FP32"), (["a"], "FP32"), ([[1], [2, 3]], "FP32"), ([2], "BOOL")],
)
def test_lists_that_do_not_fit_are_refused_before_anything_is_sent(value: Any, datatype: str) -> None:
    drive = Drive([reply({"inputs": [{"name": "x", "datatype": datatype, "shape": [-1]}]})])
    with pytest.raises(BadTensor, match="'x'"):
        drive(lambda policy: split_inference.infer(policy, "m", {"x": value}, None, []))


def test_a_length_header_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        Drive([reply({}, inference_header_content_length="x")])(
            lambda policy: split_inference.infer(policy, "m", {}, None, [])
        )


TOO_LARGE = refusal("payload_too_large", 413)
SPEC = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [-1]}]}


def part(*values: int) -> Response:
    return answer(from_numpy("y", np.array(values, dtype=np.int32)))


def test_all_parts_of_a_request_are_answered_by_the_version_that_answered_the_first() -> None:
    drive = Drive(
        [
            TOO_LARGE,
            reply({"max_batch_size": 2}),
            reply(SPEC),
            TOO_LARGE,
            part(0, 1),
            part(2, 3),
            TOO_LARGE,
            part(4),
            part(5),
        ]
    )
    values = np.arange(6, dtype=np.int32)
    found = drive(lambda policy: split_inference.infer(policy, "m", {"x": values}, "canary", []))
    assert list(found["y"]) == list(range(6))
    root = "/v2/models/m/versions"
    asked = [send.path for send in drive.sent if send.method == "POST"]
    assert asked == [f"{root}/canary/infer"] * 3 + [f"{root}/1/infer"] * 4


def test_answers_without_a_row_for_each_row_are_not_put_together() -> None:
    drive = Drive([TOO_LARGE, reply({"max_batch_size": 2}), reply(SPEC), part(7), part(7, 8)])
    with pytest.raises(OutputMisfit, match="'y' does not have 2 rows"):
        drive(lambda policy: split_inference.infer(policy, "m", {"x": np.arange(4, dtype=np.int32)}, None, []))


# jobs


X = {"x": np.arange(2, dtype=np.float16)}


def test_a_job_says_what_was_asked_and_repeats_under_one_key() -> None:
    drive = Drive([BROKEN, reply(job(), 202)])
    info = drive(lambda policy: flows.submit(policy, "m", X, JobOptions("2", "high", 1.5), None))
    assert (info.id, info.state, info.ended) == ("j", JobState.QUEUED, False)
    body = drive.body()
    assert (body["model"], body["version"], body["priority"], body["deadline_ms"]) == ("m", 2, "high", 1500)
    assert oip.tensors_from_json(body["inputs"]) == (from_numpy("x", X["x"]),)
    first, second = (send.headers["idempotency-key"] for send in drive.sent)
    assert first == second != ""


def test_a_key_of_the_callers_is_used() -> None:
    drive = Drive([reply(job(), 202)])
    drive(lambda policy: flows.submit(policy, "m", X, JobOptions(), "mine"))
    assert drive.sent[0].headers["idempotency-key"] == "mine"
    assert set(drive.body()) == {"model", "inputs"}


def batches(drive: Drive) -> list[int]:
    return [len(drive.body(index)["jobs"]) for index in range(len(drive.sent))]


def pages(*sizes: int) -> list[Response]:
    return [reply({"jobs": [job(job_id=f"{page}-{n}") for n in range(size)]}, 202) for page, size in enumerate(sizes)]


def test_many_jobs_go_in_batches_and_tell_how_far_they_are() -> None:
    drive = Drive(pages(200, 200, 50))
    told: list[int] = []
    found = drive(lambda policy: flows.submit_many(policy, "m", (X for _ in range(450)), JobOptions(), told.append))
    assert (len(found), told) == (450, [200, 400, 450])
    assert batches(drive) == [200, 200, 50]
    assert len({send.headers["idempotency-key"] for send in drive.sent}) == 3


def test_large_jobs_go_in_smaller_batches() -> None:
    drive = Drive(pages(1, 1, 1))
    big = {"x": np.zeros(1 << 20, dtype=np.uint8)}
    drive(lambda policy: flows.submit_many(policy, "m", [big] * 3, JobOptions(), None))
    assert batches(drive) == [1, 1, 1]


def test_nothing_to_submit_sends_nothing() -> None:
    assert Drive([])(lambda policy: flows.submit_many(policy, "m", [], JobOptions(), None)) == []


def test_the_model_is_asked_once_for_many_lists() -> None:
    drive = Drive([reply({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]}), *pages(3)])
    drive(lambda policy: flows.submit_many(policy, "m", [{"x": [1.0]}] * 3, JobOptions(), None))
    assert len(drive.sent) == 2


def test_waiting_goes_on_until_all_have_ended_and_keeps_the_order() -> None:
    drive = Drive([reply({"jobs": [done("b"), job("running", "a")]}), BROKEN, reply({"jobs": [done("a")]})])
    told: list[int] = []
    found = drive(lambda policy: flows.wait_many(policy, ["a", "b", "a"], None, told.append))
    assert [info.id for info in found] == ["a", "b", "a"]
    assert [send.params["ids"] for send in drive.sent] == ["a,b", "a", "a"]
    assert told == [1, 2]


def test_waiting_ends_with_its_time() -> None:
    drive = Drive([refusal("unavailable", 503, retry_after="6"), reply({"jobs": [job()]})])
    with pytest.raises(DeadlineExceeded, match="1 of 1 jobs"):
        drive(lambda policy: flows.wait_many(policy, ["j"], 5.0, None))


def test_waiting_for_nothing_is_over_at_once() -> None:
    assert Drive([])(lambda policy: flows.wait_many(policy, [], None, None)) == []


def test_a_change_is_the_first_other_state() -> None:
    drive = Drive([reply(job()), reply(job()), reply(job("running"))])
    assert drive(lambda policy: flows.change(policy, "j", JobState.QUEUED)).state is JobState.RUNNING
    assert [send.params for send in drive.sent] == [{"wait": "1.000"}] * 3


def info_of(value: dict[str, Any]) -> JobInfo:
    return Drive([reply(value)])(lambda policy: flows.job(policy, "j", 0.0))


def test_a_job_that_succeeded_has_outputs() -> None:
    info = info_of(done(value=2.5))
    assert info.ended
    np.testing.assert_array_equal(info.outputs()["y"], [2.5])
    assert flows.encoded_job(info)["result"]["outputs"][0]["data"] == [2.5]
    assert flows.encoded_job(info)["submitted_at"] == "2026-01-02T03:04:05.500000Z"


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("failed", InferenceFailed),
        ("cancelled", JobCancelled),
        ("expired", DeadlineExceeded),
        ("dead", AttemptsExhausted),
    ],
)
def test_a_job_that_ended_otherwise_raises_why(state: str, kind: type[TetherError]) -> None:
    with pytest.raises(kind):
        info_of(job(state)).outputs()
    with pytest.raises(BadTensor, match="shape"):
        info_of(job(state, error={"code": "bad_tensor", "message": "shape"})).outputs()


def test_a_job_that_has_not_ended_has_no_outputs() -> None:
    with pytest.raises(InvalidRequest, match="queued"):
        info_of(job()).outputs()


def test_a_result_that_is_none_is_bad_json() -> None:
    with pytest.raises(BadJson):
        info_of(job("succeeded", result={"outputs": 7})).outputs()


def test_cancelling_too_late_is_a_conflict() -> None:
    with pytest.raises(ResultConflict):
        Drive([refusal("result_conflict", 409)])(lambda policy: flows.cancel(policy, "j"))


def test_a_list_of_jobs_is_narrowed_by_what_is_given() -> None:
    drive = Drive([reply({"jobs": [job()], "next_cursor": "c"})])
    page = drive(lambda policy: flows.jobs(policy, {"state": "queued", "limit": 5, "model": None}))
    assert (len(page.jobs), page.next_cursor) == (1, "c")
    assert drive.sent[0].params == {"state": "queued", "limit": "5"}


# models, keys, health


def test_a_push_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "größe.ONNX"
    file.write_bytes(b"abc")
    model = local_model.local_model(file)
    platform, files, _ = model
    assert platform == "onnxruntime_onnx"
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [(item.path, item.digest, item.chunks) for item in files] == [("model.onnx", digest, ((digest, 0, 3),))]
    drive = Drive([reply({"missing": [digest]}), BROKEN, reply({}, 201), BROKEN, reply({"version": 1}, 201)])
    options = {"max_batch_size": 0, "max_delay_ms": None}
    told = drive(lambda policy: push.push(policy, "m", model, options, None))
    assert told == {"version": 1, "stored_bytes": 3}
    paths = [(sent.method, sent.path.removeprefix("/v1/models/m/")) for sent in drive.sent]
    chunk, register = ("PUT", f"chunks/{digest}"), ("POST", "versions:register")
    assert paths == [("POST", "chunks:missing"), chunk, chunk, register, register]
    described = {"path": "model.onnx", "size": 3, "digest": digest, "chunks": [digest], "sizes": [3]}
    assert drive.body() == {"files": [described], "platform": "onnxruntime_onnx", "max_batch_size": 0}


def test_a_file_that_is_not_there_is_told() -> None:
    for name in ("model.onnx", "model.pkl"):
        with pytest.raises(InvalidRequest, match=f"no such file or folder: '/nonexistent/{name}'"):
            local_model.local_model(Path("/nonexistent") / name)


def test_keys_are_made_once_and_revoked() -> None:
    drive = Drive([reply({"id": "k", "key": "tk_k"}, 201), reply({"keys": [{"id": "k"}]}), reply(b"", 204)])
    assert drive(lambda policy: flows.create_key(policy, "t", ["infer"], "n"))["key"] == "tk_k"
    assert drive.body() == {"tenant": "t", "scopes": ["infer"], "name": "n"}
    assert not drive.sent[0].repeatable
    assert drive(lambda policy: flows.get(policy, "/v1/keys", "keys")) == [{"id": "k"}]
    drive(lambda policy: flows.revoke_key(policy, "k"))
    assert drive.sent[-1].path == "/v1/keys/k"


@pytest.mark.parametrize(("got", "expected"), [(reply(b""), True), (reply(b"", 503), False), (REFUSED, False)])
def test_readiness_is_a_plain_yes_or_no(got: Response | NoResponse, expected: bool) -> None:
    drive = Drive([got])
    assert drive(flows.ready) is expected
    assert not drive.pauses
