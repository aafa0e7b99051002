"""A request against a version's signature: what fits, and that each misfit names itself."""

from __future__ import annotations

import json

import msgspec
import pytest

from tether.domain import manifest
from tether.domain.job import (
    JobState,
    Outcome,
    Sealed,
    as_it_counts,
    idempotency_digest,
    new_durable_job_id,
    new_job_id,
    new_keyed_job_id,
    record_key,
    tenant_mark,
)
from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.domain.signature import chosen
from tether.domain.tensor import Tensor
from tether.errors import BadTensor, ModelRejected, TetherError, all_errors, by_code

BATCHED = Manifest(
    "m",
    2,
    "onnx_onnxv1",
    (ModelFile("a", 3, "", ()), ModelFile("b", 4, "", ())),
    (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("mask", "BOOL", (-1,))),
    (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "INT64", (-1,))),
    Batching(8),
    1.0,
    "modelstore",
)
SINGLE = msgspec.structs.replace(BATCHED, batching=Batching(), inputs=(TensorSpec("x", "FP32", (2, -1)),))


def x(*shape: int, datatype: str = "FP32", name: str = "x") -> Tensor:
    return Tensor(name, datatype, shape, b"")


def mask(rows: int) -> Tensor:
    return x(rows, datatype="BOOL", name="mask")


def test_inputs_of_a_batched_model_share_their_first_axis_and_may_have_more_rows_than_a_run() -> None:
    manifest.check_inputs(BATCHED, (x(3, 4), mask(3)), run_rows=8)
    manifest.check_inputs(BATCHED, (mask(80), x(80, 4)), run_rows=8)


def test_first_axes_of_a_model_without_batches_are_its_own() -> None:
    manifest.check_inputs(SINGLE, (x(2, 99),), run_rows=0)
    manifest.check_inputs(BATCHED, (x(2, 4), mask(3)), run_rows=0)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((), "'x' is required"),
        ((x(1, 4),), "'mask' is required"),
        ((x(1, 4), mask(1), x(1, 4)), "'x' is given more than once"),
        ((x(1, 4), mask(1), x(1, name="w")), "no input 'w'"),
        ((x(1, 4, datatype="FP64"), mask(1)), "datatype FP64; the model expects FP32"),
        ((x(1, 5), mask(1)), "shape [1, 5]; the model expects [-1, 4] (-1: any length)"),
        ((x(4), mask(1)), "shape [4]"),
        ((x(), mask(1)), "shape []"),
        ((x(2, 4), mask(3)), "3 rows, but another input has 2"),
        ((x(32_769, 4), mask(32_769)), "at most 32768 in one request, which are 4096 runs of 8"),
    ],
)
def test_what_does_not_fit_is_named(inputs: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(BadTensor) as caught:
        manifest.check_inputs(BATCHED, inputs, run_rows=8)
    assert words in caught.value.message
    assert caught.value.field


NAMED = msgspec.structs.replace(
    SINGLE,
    inputs=(
        TensorSpec("x", "FP32", (-1, -1), ("n", "seq")),
        TensorSpec("mask", "BOOL", (-1,), ("seq",)),
        TensorSpec("w", "FP32", (-1,), ("seq",), optional=True),
    ),
)


def test_axes_of_one_name_have_one_length_and_optional_inputs_may_be_left_out() -> None:
    manifest.check_inputs(NAMED, (x(2, 3), mask(3)), run_rows=0)
    manifest.check_inputs(NAMED, (x(3, name="w"), mask(3), x(2, 3)), run_rows=0)
    manifest.check_inputs(
        msgspec.structs.replace(BATCHED, inputs=NAMED.inputs), (x(3, 3), mask(3), x(3, name="w")), run_rows=8
    )
    for inputs in ((x(2, 3), mask(2)), (mask(2), x(2, 3)), (x(2, 3), mask(3), x(1, name="w"))):
        with pytest.raises(BadTensor, match=r"on axis \d \('seq'\).*they must be equal") as caught:
            manifest.check_inputs(NAMED, inputs, run_rows=0)
        assert caught.value.field == f"{inputs[-1].name}.shape"
    described = manifest.metadata(NAMED, (1,))["inputs"]
    assert described[1:] == [
        {"name": "mask", "datatype": "BOOL", "shape": [-1]},
        {"name": "w", "datatype": "FP32", "shape": [-1], "optional": True},
    ]


UNNAMED = msgspec.structs.replace(
    SINGLE,
    inputs=(
        TensorSpec("x", "FP32", (-1, -1), ("?", "?")),
        TensorSpec("mask", "BOOL", (-1,), ("?",)),
        TensorSpec("w", "FP32", (-1, -1), ("size", "size"), optional=True),
    ),
)


def test_a_name_that_says_nothing_and_axes_of_one_input_bind_no_lengths() -> None:
    manifest.check_inputs(UNNAMED, (x(2, 3), mask(5)), run_rows=0)
    manifest.check_inputs(UNNAMED, (x(2, 3), mask(5), x(4, 6, name="w")), run_rows=0)


def test_a_model_without_inputs_says_that_it_has_none() -> None:
    none = msgspec.structs.replace(BATCHED, inputs=(), batching=Batching())
    manifest.check_inputs(none, (), run_rows=0)
    with pytest.raises(BadTensor, match="has no input 'x'; it has none"):
        manifest.check_inputs(none, (x(1),), run_rows=0)


@pytest.mark.parametrize(
    ("known", "wanted", "served"),
    [
        (("a", "serving_default"), "", "serving_default"),
        (("a", "serving_default"), "a", "a"),
        (("a",), "", "a"),
        (("a", "b"), "b", "b"),
    ],
)
def test_the_signature_that_is_served(known: tuple[str, ...], wanted: str, served: str) -> None:
    assert chosen(known, wanted) == served


@pytest.mark.parametrize(
    ("known", "wanted", "words"),
    [
        (
            ("b", "a"),
            "",
            "no signature 'serving_default', and not exactly one other; it has: 'a', 'b'; choose one with --signature",
        ),
        (("b", "a"), "c", "no signature 'c'; it has: 'a', 'b'"),
        ((), "", "it has: none; save it with signatures"),
    ],
)
def test_a_signature_that_is_not_there_is_told_with_those_that_are(
    known: tuple[str, ...], wanted: str, words: str
) -> None:
    with pytest.raises(ModelRejected, match=words):
        chosen(known, wanted)


def test_only_the_models_outputs_can_be_asked_for() -> None:
    manifest.check_outputs(BATCHED, ())
    manifest.check_outputs(BATCHED, ("z", "y"))
    with pytest.raises(BadTensor, match=r"'w'.*'y', 'z'"):
        manifest.check_outputs(BATCHED, ("y", "w"))


def test_metadata_is_the_protocols_object() -> None:
    assert json.loads(json.dumps(manifest.metadata(BATCHED, (1, 2)))) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "onnx_onnxv1",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 4]},
            {"name": "mask", "datatype": "BOOL", "shape": [-1]},
        ],
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "z", "datatype": "INT64", "shape": [-1]},
        ],
    }


def test_a_version_is_as_large_as_its_files() -> None:
    assert BATCHED.size == 7


# the error tree and ids


@pytest.mark.parametrize("kind", list(all_errors()), ids=lambda kind: kind.__name__)
def test_every_error_is_rebuilt_from_its_code(kind: type[TetherError]) -> None:
    rebuilt = by_code(kind.code, "why")
    assert type(rebuilt) is kind
    assert rebuilt.message == str(rebuilt) == "why"


def test_codes_are_unique_and_an_unknown_one_is_the_base() -> None:
    codes = [kind.code for kind in all_errors()]
    assert len(codes) == len(set(codes))
    assert type(by_code("from_the_future", "why")) is TetherError


def test_job_ids_are_unguessable_and_never_the_same() -> None:
    assert len({new_job_id() for _ in range(100)}) == 100
    digest = idempotency_digest("t", "key")
    assert digest == idempotency_digest("t", "key")
    assert len({digest, idempotency_digest("u", "key"), idempotency_digest("tk", "ey")}) == 3
    assert idempotency_digest("a", "b") != idempotency_digest("a\0b", "")
    keyed = {new_keyed_job_id(digest) for _ in range(100)}
    assert len(keyed) == 100
    assert {record_key(job) for job in keyed} == {record_key(digest)}
    plain = {new_durable_job_id("t") for _ in range(100)}
    assert len(plain) == 100
    assert {len(job) for job in (*keyed, *plain, new_job_id())} == {32}
    assert {job[:8] for job in keyed | plain} == {tenant_mark("t")}
    assert {record_key(job).partition(".")[0] for job in keyed | plain} == {tenant_mark("t")}
    assert tenant_mark("t") != tenant_mark("u")


def test_states_are_the_closed_set() -> None:
    assert set(JobState) == {"scheduled", "queued", "running", "succeeded", "failed", "cancelled", "expired", "dead"}


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD])
def test_what_ends_after_its_deadline_is_expired(state: JobState) -> None:
    end = Outcome(new_job_id(), state, (), None, 2, "w", 5.0, 10.0, Sealed(b"k", b"box"))
    assert as_it_counts(end, 10.0, 12.0) == end
    for late in (as_it_counts(end, 9.9), as_it_counts(end, 10.0, 12.1)):
        assert (late.state, late.attempts, late.sealed, late.outputs) == (JobState.EXPIRED, 2, None, ())
        assert late.error is not None
        assert late.error.code == "deadline_exceeded"


def test_a_cancellation_counts_after_the_deadline_too() -> None:
    for state in (JobState.CANCELLED, JobState.EXPIRED):
        end = Outcome(new_job_id(), state, finished_at=10.0)
        assert as_it_counts(end, 5.0, 20.0) == end
