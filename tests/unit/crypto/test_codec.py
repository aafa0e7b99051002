"""msgpack to values: what survives, and that everything else is one error with the raw bytes."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.domain.job import AttemptNote, Failure, Job, JobId, JobRecord, JobState, Outcome, Priority
from tether.domain.manifest import Batching, Heartbeat, Manifest, ModelFile, ModelRef, TensorSpec
from tether.domain.tensor import Tensor
from tether.errors import BadEncoding
from tether.wire import codec

names = st.text(max_size=8)
times = st.floats(0, 2e9)
tensors = st.builds(
    Tensor,
    names,
    st.sampled_from(["FP32", "BYTES"]),
    st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    st.binary(max_size=16),
)
jobs = st.builds(
    Job,
    id=names.map(JobId),
    tenant=names,
    inputs=st.lists(tensors, max_size=2).map(tuple),
    deadline=times,
    outputs=st.lists(names, max_size=2).map(tuple),
    request_id=names,
    traceparent=names,
)
outcomes = st.builds(
    Outcome,
    job=names.map(JobId),
    state=st.sampled_from(JobState),
    outputs=st.lists(tensors, max_size=2).map(tuple),
    error=st.none() | st.builds(Failure, names, names),
    attempts=st.integers(0, 9),
    worker=names,
    started_at=times,
    finished_at=times,
)

RECORD = JobRecord(JobId("j"), "t", "m", 3, Priority.HIGH, 1.5, 2.5, "d", "b", "r")
MANIFEST = Manifest(
    "m",
    1,
    "onnx_onnxv1",
    (ModelFile("m.onnx", 9, "ff", ("ff", "ee")),),
    (TensorSpec("x", "FP32", (-1, 4)),),
    (TensorSpec("y", "FP32", (-1,)),),
    Batching(8, 2),
    1.0,
    "modelstore",
)
BEAT = Heartbeat("w", 2, "local", (ModelRef("m", 1),), (("n:1", "too big"),), 3, 4, 5.0)


@given(st.lists(jobs, max_size=4))
def test_jobs_survive(sent: list[Job]) -> None:
    assert codec.decode_jobs(codec.encode_jobs(sent), [job.id for job in sent]) == sent


@given(st.lists(outcomes, max_size=4))
def test_outcomes_survive(sent: list[Outcome]) -> None:
    assert codec.decode_outcomes(codec.encode_outcomes(sent)) == sent


@pytest.mark.parametrize(
    "value", [RECORD, MANIFEST, BEAT, AttemptNote(1, "w", 2.0)], ids=lambda value: type(value).__name__
)
def test_control_values_survive(value: Any) -> None:
    assert codec.decode(codec.encode(value), type(value)) == value


def test_records_and_notes_have_their_own_names() -> None:
    assert codec.decode_record(codec.encode_record(RECORD)) == RECORD
    assert codec.decode_note(codec.encode(AttemptNote(2, "w", 1.0))) == AttemptNote(2, "w", 1.0)


def test_the_number_of_ids_must_be_the_number_of_jobs() -> None:
    body = codec.encode_jobs([Job(JobId("a"), "t", (), 1.0)])
    for ids in ([], ["a", "b"]):
        with pytest.raises(BadEncoding):
            codec.decode_jobs(body, ids)


JOB = ("t", 1.0, "", "", (), ())
OUTCOME = ("j", "succeeded", (), None, 1, "w", 1.0, 2.0)
WRONG = [None, 7, 1.5, "text", b"raw", True, {"a": 1}, ("FP32",) * 4]
WRONG_IN_JOB = [(place, wrong) for place in range(len(JOB)) for wrong in WRONG if type(wrong) is not type(JOB[place])]
WRONG_IN_OUTCOME = [
    (place, wrong)
    for place in range(len(OUTCOME))
    for wrong in WRONG
    if type(wrong) is not type(OUTCOME[place]) or (place == 1 and wrong == "text")
]


@pytest.mark.parametrize(("place", "wrong"), WRONG_IN_JOB)
def test_a_job_with_a_field_of_another_type_is_refused(place: int, wrong: Any) -> None:
    row = [*JOB[:place], wrong, *JOB[place + 1 :]]
    with pytest.raises(BadEncoding) as caught:
        codec.decode_jobs(raw := codec.pack([row]), ["j"])
    assert caught.value.raw == raw


@pytest.mark.parametrize(("place", "wrong"), WRONG_IN_OUTCOME)
def test_an_outcome_with_a_field_of_another_type_is_refused(place: int, wrong: Any) -> None:
    row = [*OUTCOME[:place], wrong, *OUTCOME[place + 1 :]]
    with pytest.raises(BadEncoding):
        codec.decode_outcomes(codec.pack([row]))


@pytest.mark.parametrize(
    "row",
    [
        ("x", "FP32", (1,), "text"),
        ("x", "FP32", (True,), b""),
        ("x", "FP32", (1.0,), b""),
        (1, "FP32", (1,), b""),
        ("x", "FP32", "1", b""),
    ],
)
def test_a_tensor_with_a_field_of_another_type_is_refused(row: Any) -> None:
    with pytest.raises(BadEncoding):
        codec.decode_outcomes(codec.pack([("j", "succeeded", (row,), None, 1, "w", 1.0, 2.0)]))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\x01\x02",
        b"\xa1\xff",
        msgpack.packb(msgpack.ExtType(5, b"")),
        msgpack.packb(msgpack.ExtType(5, b"abc")),
        msgpack.packb(msgpack.Timestamp(1)),
    ],
)
def test_what_is_not_exactly_one_plain_value_is_refused(raw: bytes) -> None:
    with pytest.raises(BadEncoding):
        codec.unpack(raw)


@given(st.binary(max_size=64))
def test_arbitrary_bytes_only_raise_bad_encoding(raw: bytes) -> None:
    for read in (
        codec.unpack,
        codec.decode_outcomes,
        codec.decode_record,
        lambda data: codec.decode_jobs(data, ["a"]),
        lambda data: codec.decode(data, Manifest),
    ):
        try:
            read(raw)
        except BadEncoding as error:
            assert error.message  # noqa: PT017 - not raising is fine too


@given(st.lists(outcomes, min_size=1, max_size=2), st.data())
def test_torn_outcomes_are_refused(sent: list[Outcome], data: st.DataObject) -> None:
    raw = codec.encode_outcomes(sent)
    with pytest.raises(BadEncoding):
        codec.decode_outcomes(raw[: data.draw(st.integers(0, len(raw) - 1))])
