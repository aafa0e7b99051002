"""How a version is run on a worker, and with what it is warmed up: manifest, configuration and settings together."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tether.domain.job import Job, new_job_id
from tether.domain.manifest import Batching, Manifest, TensorSpec
from tether.domain.tensor import from_numpy
from tether.errors import ModelRejected
from tether.model.config import InstanceKind, ModelConfig, Warmup
from tether.settings import Settings
from tether.worker.models.load_spec import load_spec, run_spec
from tether.worker.runtimes.warmup import warmup_inputs
from tether.worker.scheduling.batching import should_wait_for_more

ONNX, PROGRAM = "onnxruntime_onnx", "python"
SETTINGS = Settings(instance_threads=3, model_device="cpu", max_instances=4, run_timeout_s=60)


def manifest(platform: str = ONNX, batch: int = 8, *inputs: TensorSpec, isolation: str = "") -> Manifest:
    given = inputs or (TensorSpec("x", "FP32", (-1, 4)),)
    return Manifest("m", 1, platform, (), given, (), Batching(batch, basis="proven"), 0.0, "test", isolation=isolation)


def test_the_configuration_goes_before_the_manifest_and_the_settings() -> None:
    usual = load_spec(manifest(), ModelConfig("m"), SETTINGS)
    assert (usual.manifest.isolation, usual.options.threads, usual.options.device, usual.copies) == (
        "thread",
        3,
        "cpu",
        1,
    )
    config = ModelConfig("m", threads=2, kind=InstanceKind.CUDA, isolation="process", instances=64)
    decided = load_spec(manifest(isolation="thread"), config, SETTINGS)
    assert (decided.manifest.isolation, decided.options.threads, decided.options.device) == ("process", 2, "cuda")
    assert decided.copies == 4
    assert usual != decided


def test_a_copy_has_no_more_threads_than_there_are_processors() -> None:
    """Threads of ONNX Runtime spin while they wait for work, and a tenant configures its models."""
    many = ModelConfig("m", threads=256)
    most = os.cpu_count() or 1
    assert load_spec(manifest(), many, Settings()).options.threads == most
    assert load_spec(manifest(), many, Settings(instance_threads=most + 7)).options.threads == most + 7


def test_how_long_a_load_may_take_is_a_setting() -> None:
    patient = Settings(load_timeout_s=1800)
    assert load_spec(manifest(PROGRAM), ModelConfig("m"), patient).options.load_timeout_s == 1800


def test_no_configuration_brings_a_program_into_the_workers_own_process() -> None:
    config = ModelConfig("m", isolation="thread")
    assert load_spec(manifest(PROGRAM, isolation="thread"), config, SETTINGS).manifest.isolation == "process"


@pytest.mark.parametrize(
    ("platform", "compiled"),
    [("pytorch_export", True), ("pytorch_safetensors", True), ("pytorch_libtorch", False), (ONNX, False)],
)
def test_compile_is_told_where_it_can_be_done_and_with_the_shapes_to_compile_for(platform: str, compiled: bool) -> None:
    warmup = (Warmup(rows=4),)
    options = load_spec(manifest(platform), ModelConfig("m", compile=True, warmup=warmup), SETTINGS).options
    assert (options.compile, options.warmup) == (compiled, warmup if compiled else ())
    assert not load_spec(manifest(platform), ModelConfig("m", warmup=warmup), SETTINGS).options.compile


def test_what_needs_no_load_changes_none() -> None:
    config = ModelConfig("m", max_batch_size=2, max_delay_ms=5, run_timeout_s=1, preferred_batch_sizes=(1,))
    assert load_spec(manifest(), config, SETTINGS) == load_spec(manifest(), ModelConfig("m"), SETTINGS)


def test_a_batch_may_only_become_smaller() -> None:
    def rows(batch: int, wanted: int | None) -> int:
        return run_spec(
            manifest(batch=batch), ModelConfig("m", max_batch_size=wanted), SETTINGS
        ).batching.max_batch_size

    assert [rows(8, None), rows(8, 4), rows(8, 100), rows(8, 0), rows(0, 4)] == [8, 4, 8, 0, 0]


def test_a_worker_waits_only_when_told_to_and_only_for_what_can_be_joined() -> None:
    decided = ModelConfig("m", max_delay_ms=5, preferred_batch_sizes=(6, 2, 100))
    assert run_spec(manifest(), ModelConfig("m"), SETTINGS).delay_s == 0
    found = run_spec(manifest(), decided, SETTINGS)
    assert (found.delay_s, found.preferred, found.run_timeout_s) == (0.005, (2, 6), 60)
    assert run_spec(manifest(batch=0), decided, SETTINGS).delay_s == 0


@pytest.mark.parametrize(
    ("rows", "preferred", "more"),
    [
        (1, (), True),
        (8, (), False),
        (9, (), False),
        (1, (2, 6), True),
        (2, (2, 6), False),
        (3, (2, 6), True),
        (7, (2,), False),
    ],
)
def test_a_run_is_begun_when_it_is_full_or_has_a_preferred_size(
    rows: int, preferred: tuple[int, ...], more: bool
) -> None:
    job = Job(new_job_id(), "acme", (from_numpy("x", np.zeros((rows, 4), np.float32)),), 1.0)
    assert should_wait_for_more([job], 8, preferred) is more


def test_warm_up_inputs_fit_the_signature() -> None:
    specs = (
        TensorSpec("x", "FP32", (-1, -1, 4)),
        TensorSpec("ids", "INT64", (-1, 3)),
        TensorSpec("text", "BYTES", (-1,)),
        TensorSpec("half", "BF16", (-1, 2)),
    )
    warmup = Warmup(rows=5, shapes={"x": (7, 4)}, random=True)
    found = warmup_inputs(manifest(ONNX, 8, *specs), warmup)
    assert {name: array.shape for name, array in found.items()} == {
        "x": (5, 7, 4),
        "ids": (5, 3),
        "text": (5,),
        "half": (5, 2),
    }
    assert [from_numpy(name, array).datatype for name, array in found.items()] == ["FP32", "INT64", "BYTES", "BF16"]
    assert found["x"].std() > 0.5
    assert set(found["ids"].ravel()) <= {0, 1}
    zeros = warmup_inputs(manifest(ONNX, 4, *specs), Warmup(rows=100))
    assert zeros["x"].shape == (4, 1, 4)
    assert not zeros["x"].any()
    alone = warmup_inputs(manifest(ONNX, 0, TensorSpec("x", "FP32", (-1, 4))), Warmup(shapes={"x": (9, 4)}))
    assert alone["x"].shape == (9, 4)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": (5,)}, r"input 'x' has shape \[5\]; the model expects \[4\] without the batch axis"),
        ({"x": (4, 4)}, "input 'x' has"),
        ({"y": (4,)}, "has an unknown input 'y'"),
    ],
)
def test_a_warm_up_that_does_not_fit_says_which_input(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ModelRejected, match=words):
        warmup_inputs(manifest(), Warmup(shapes=shapes))
    huge = manifest(ONNX, 8, TensorSpec("x", "FP32", (-1, -1)))
    with pytest.raises(ModelRejected, match="more than 67108864 elements"):
        warmup_inputs(huge, Warmup(rows=8, shapes={"x": (1 << 24,)}))
