"""Joining and cutting jobs, and what happens when a model does not keep the rows of a run apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import pytest
from support.platform.tickets import put, work_off

from tether.domain.job import Job, new_job_id
from tether.domain.manifest import Batching, Finding, Manifest
from tether.domain.tensor import Array, Tensor, from_numpy, to_numpy
from tether.errors import InferenceFailed, TetherError, by_code
from tether.model.config import ModelConfig
from tether.model.run_settings import effective_batching, effective_isolation
from tether.worker.scheduling import batching
from tether.worker.scheduling.batching import Result, Run
from tether.worker.scheduling.job_turns import RunQueue


class Model:
    """A runtime with one output that is a function of its one input, and remembers the rows of each run."""

    output_names = ("y",)

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self._function = function
        self.runs: list[int] = []

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        del outputs
        self.runs.append(len(inputs["x"]))
        return [self._function(inputs["x"])]

    def close(self) -> None: ...


def job(*values: float, width: int = 1) -> Job:
    column = np.repeat(np.array(values, np.float32).reshape(-1, 1), width, axis=1)
    return Job(new_job_id(), "acme", (from_numpy("x", column),), 1.0)


def run_all(model: Model, jobs: Sequence[Job], limit: int) -> tuple[list[Result], str]:
    """How jobs of one message end; one result each, in order."""
    queue = RunQueue(0.0, 0.0)
    put(queue, 2, *jobs)
    outcomes, mixed = work_off(queue, model, limit)
    ended = {
        one.job: one.outputs if one.error is None else by_code(one.error.code, one.error.message) for one in outcomes
    }
    assert len(outcomes) == len(ended) == len(jobs)
    return [ended[one.id] for one in jobs], mixed


def planned(jobs: Sequence[Job], limit: int) -> list[Run]:
    queue, runs = RunQueue(0.0, 0.0), []
    put(queue, 2, *jobs)
    while queue:
        runs.append(queue.take(2, limit, 0.0).run)
    return runs


def rows(result: Result) -> list[float]:
    assert isinstance(result, tuple)
    found: list[float] = to_numpy(result[0]).ravel().tolist()
    return found


def test_small_jobs_share_runs_and_get_their_own_rows() -> None:
    model = Model(lambda x: x * 2)
    found, mixed = run_all(model, [job(1), job(2, 3), job(4), job(5, 6, 7)], limit=4)
    assert [rows(one) for one in found] == [[2], [4, 6], [8], [10, 12, 14]]
    assert (model.runs, mixed) == ([4, 3], "")


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 32])
def test_a_job_with_more_rows_than_a_run_takes_is_cut_and_answered_whole(limit: int) -> None:
    model = Model(lambda x: x + 1)
    values = list(range(50))
    found, mixed = run_all(model, [job(*values), job(99)], limit)
    assert [rows(one) for one in found] == [[value + 1 for value in values], [100]]
    assert (max(model.runs), sum(model.runs), mixed) == (limit, 51, "")
    assert len(model.runs) == -(-51 // limit)


def test_text_is_cut_and_put_together() -> None:
    words = np.array([[f"w{number}"] for number in range(5)], dtype=np.object_)
    one = Job(new_job_id(), "acme", (from_numpy("x", words),), 1.0)
    found, _ = run_all(Model(lambda x: x), [one], limit=2)
    assert isinstance(found[0], tuple)
    assert found[0][0] == Tensor("y", "BYTES", (5, 1), one.inputs[0].data)


def test_an_empty_job_is_run() -> None:
    found, mixed = run_all(Model(lambda x: x), [job()], limit=2)
    assert (rows(found[0]), mixed) == ([], "")


def test_an_error_of_one_part_fails_its_job_and_no_other() -> None:
    def refuse(x: Array) -> Array:
        if (x == 6).any():
            raise InferenceFailed("six")
        return x

    found, mixed = run_all(Model(refuse), [job(1, 2, 3), job(4, 5, 6), job(7)], limit=2)
    assert isinstance(found[1], InferenceFailed)
    assert ([rows(found[0]), rows(found[2])], mixed) == ([[1, 2, 3], [7]], "")


def detections(x: Array) -> Array:
    """As non-maximum suppression does: one row for each positive value, wherever it came from."""
    return x[x > 0].reshape(-1, 1)


@pytest.mark.parametrize(
    "function",
    [detections, lambda x: x.sum(axis=0, keepdims=True), lambda x: x.ravel().sum(), lambda x: np.concatenate([x, x])],
    ids=["detections", "reduction", "scalar", "doubled"],
)
@pytest.mark.parametrize("limit", [2, 3, 8])
def test_a_model_whose_outputs_are_not_its_rows_is_found_out_and_answers_as_by_itself(
    function: Callable[[Array], Array], limit: int
) -> None:
    jobs = [job(1, -1), job(-2), job(3, 4, 5), job(-6, -7)]
    found, mixed = run_all(Model(function), jobs, limit)
    expected = [np.asarray(function(to_numpy(one.inputs[0]))) for one in jobs]
    assert [rows(one) for one in found] == [array.ravel().tolist() for array in expected]
    assert "output 'y' had the shape" in mixed


def test_a_single_job_shows_it_too_and_keeps_its_answer() -> None:
    found, mixed = run_all(model := Model(detections), [job(1, -1)], limit=4)
    assert (rows(found[0]), model.runs) == ([1], [2])
    assert mixed == "output 'y' had the shape [1, 1] in a run of 2 rows"


def test_once_one_run_mixed_rows_a_total_that_matches_by_chance_is_not_believed() -> None:
    """Two runs: in the second the detections are as many as the rows, and of one job only."""

    def twice(x: Array) -> Array:
        return np.repeat(x[x > 0], 2).reshape(-1, 1)

    jobs = [job(1), job(2), job(3), job(-4)]
    found, mixed = run_all(Model(twice), jobs, limit=2)
    assert [rows(one) for one in found] == [[1, 1], [2, 2], [3, 3], []]
    assert mixed


def test_parts_that_do_not_fit_together_are_run_whole() -> None:
    def padded(x: Array) -> Array:
        return np.zeros((len(x), int(x.max())), np.float32)

    found, mixed = run_all(Model(padded), [job(1, 1, 3)], limit=2)
    assert isinstance(found[0], tuple)
    assert (found[0][0].shape, mixed) == ((3, 3), "output 'y' had rows of the shapes [1] and [3]")


def test_jobs_of_other_shapes_or_outputs_are_not_joined() -> None:
    model = Model(lambda x: x)
    other = msgspec.structs.replace(job(3), outputs=("y",))
    found, _ = run_all(model, [job(1), job(2, width=2), other], limit=8)
    assert ([rows(one) for one in found], model.runs) == ([[1], [2, 2], [3]], [1, 1, 1])


def test_inputs_that_share_no_first_axis_are_run_as_they_came() -> None:
    uneven = Job(new_job_id(), "acme", (*job(1, 2).inputs, Tensor("z", "FP32", (), b"\0" * 4)), 1.0)
    (only,) = planned([uneven], 8)
    assert (only.batched, only.rows, batching.rows_of(uneven)) == (False, 1, 1)


def test_without_batching_a_run_is_one_job_and_counts_as_one_row() -> None:
    runs = planned([job(1, 2), job(3)], 0)
    assert [(one.rows, one.jobs, one.own) for one in runs] == [(1, 1.0, True)] * 2
    found, mixed = run_all(Model(detections), [job(1, -2), job(3)], limit=0)
    assert ([rows(one) for one in found], mixed) == ([[1], [3]], "")


def test_a_part_counts_as_its_part_of_a_job() -> None:
    runs = planned([job(*range(8)), job(9)], 6)
    assert [(one.rows, one.jobs) for one in runs] == [(6, 0.75), (3, 1.25)]


def test_every_way_of_failing_ends_in_one_result_a_job() -> None:
    def broken(_: Array) -> Array:
        raise InferenceFailed("no")

    found, _ = run_all(Model(broken), [job(*range(5)), job(1), job(2)], limit=2)
    assert [isinstance(one, TetherError) for one in found] == [True] * 3


# what counts just now

PROVEN = Batching(8, 1.5, "proven")
OLD = Batching(8, 1.5)


@pytest.mark.parametrize(
    ("own", "wanted", "finding", "expected"),
    [
        (PROVEN, None, Finding(), (8, "proven", "")),
        (PROVEN, 4, Finding(), (4, "proven", "")),
        (PROVEN, 100, Finding(), (8, "proven", "")),
        (PROVEN, 0, Finding(), (0, "", "configuration")),
        (PROVEN, 4, Finding(mixed="seen"), (0, "", "seen")),
        (PROVEN, None, Finding(crashed="signal"), (8, "proven", "")),
        (Batching(8, 1.5, "declared", "a trial"), None, Finding(), (8, "declared", "a trial")),
        (Batching(0, 1.5, "", "NonZero"), 4, Finding(proven=True), (0, "", "NonZero")),
        (OLD, None, Finding(), (0, "", "no worker has checked it")),
        (OLD, None, Finding(unproven="it has NonZero"), (0, "", "it has NonZero")),
        (OLD, None, Finding(proven=True), (8, "proven", "")),
        (OLD, 4, Finding(proven=True), (4, "proven", "")),
        (OLD, None, Finding(proven=True, mixed="seen"), (0, "", "seen")),
    ],
)
def test_rows_are_joined_only_with_a_basis_that_nothing_speaks_against(
    own: Batching, wanted: int | None, finding: Finding, expected: tuple[int, str, str]
) -> None:
    manifest = Manifest("m", 1, "onnxruntime_onnx", (), (), (), own, 0.0, "test")
    found = effective_batching(manifest, ModelConfig("m", max_batch_size=wanted), finding)
    assert (found.max_batch_size, found.basis) == expected[:2]
    assert expected[2] in found.reason
    assert bool(found.reason) >= (not found.max_batch_size)
    assert found.max_delay_ms == 1.5


def test_what_is_not_judged_is_batched_only_if_its_description_declares_it() -> None:
    def basis(platform: str) -> str:
        manifest = Manifest("m", 1, platform, (), (), (), OLD, 0.0, "test")
        return effective_batching(manifest, ModelConfig("m")).basis

    assert [basis(name) for name in ("python", "onnxruntime_onnx", "pytorch_export", "brought")] == [
        "declared",
        "",
        "",
        "",
    ]


@pytest.mark.parametrize(
    ("platform", "own", "wanted", "crashed", "expected"),
    [
        ("onnxruntime_onnx", "", "", "", "thread"),
        ("onnxruntime_onnx", "", "process", "", "process"),
        ("onnxruntime_onnx", "process", "thread", "", "thread"),
        ("onnxruntime_onnx", "thread", "thread", "signal", "process"),
        ("python", "thread", "thread", "", "process"),
    ],
)
def test_what_has_ended_a_worker_and_every_program_run_in_a_process_of_their_own(
    platform: str, own: str, wanted: str, crashed: str, expected: str
) -> None:
    manifest = Manifest("m", 1, platform, (), (), (), Batching(), 0.0, "test", isolation=own)
    config = ModelConfig("m", isolation=wanted)
    assert effective_isolation(manifest, config, Finding(crashed=crashed)) == expected


def test_what_was_found_out_first_stays() -> None:
    first, second = Finding(mixed="one", proven=True), Finding(mixed="two", crashed="signal 8")
    assert first | second == Finding("one", proven=True, crashed="signal 8")
    assert first | Finding() == first
