"""Changes of configurations: what a merge patch does, and which field a refusal names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tether.domain.manifest import Alias, Batching, Manifest, TensorSpec
from tether.errors import InvalidRequest
from tether.model.config import ModelConfig, QueuePolicy, Shadow, VersionPolicy, Warmup
from tether.model.config_patch import check_against, patched, reset

CONFIG = ModelConfig(
    "m", revision=4, max_batch_size=8, queue=QueuePolicy(max_size=10, timeout_ms=50), labels={"a": "1"}
)


def manifest(version: int, most: int = 32) -> Manifest:
    inputs = (TensorSpec("x", "FP32", (-1, 4) if most else (4,)),)
    return Manifest("m", version, "onnxruntime_onnx", (), inputs, (), Batching(most), 0.0, "key:a")


def test_objects_are_merged_and_everything_else_is_replaced() -> None:
    patch = {"queue": {"max_size": 20}, "labels": {"b": "2"}, "preferred_batch_sizes": [2, 4], "kind": "cpu"}
    after = patched(CONFIG, patch)
    assert after.queue == QueuePolicy(max_size=20, timeout_ms=50)
    assert (after.labels, after.preferred_batch_sizes, after.kind.value) == ({"a": "1", "b": "2"}, (2, 4), "cpu")
    assert (after.max_batch_size, after.revision) == (8, 4)


def test_null_is_the_default() -> None:
    after = patched(CONFIG, {"max_batch_size": None, "queue": {"timeout_ms": None}, "labels": {"a": None}})
    assert (after.max_batch_size, after.queue, after.labels) == (None, QueuePolicy(max_size=10), {})
    assert patched(CONFIG, {"queue": None}).queue == QueuePolicy()


def test_a_reset_leaves_a_model_loaded_or_not_as_it_is() -> None:
    assert reset(patched(CONFIG, {"loaded": False})) == ModelConfig("m", revision=4, loaded=False)


@pytest.mark.parametrize(
    ("field", "patch", "words"),
    [
        ("instance", {"instance": 2}, "did you mean 'instances'"),
        ("queue.max_sise", {"queue": {"max_sise": 2}}, "did you mean 'max_size'"),
        ("warmup[1].row", {"warmup": [{}, {"row": 1}]}, "did you mean 'rows'"),
        ("zzz", {"zzz": 2}, "expected one of "),
        ("revision", {"revision": 9}, "the model store writes it"),
        ("instances", {"instances": "two"}, "Expected `int`"),
        ("queue.timeout_action", {"queue": {"timeout_action": "explode"}}, "expected reject or delay"),
        ("kind", {"kind": "tpu"}, "expected auto or cpu or cuda"),
        (
            "load_balancing",
            {"load_balancing": "random"},
            "expected least_connections or round_robin or weighted_round_robin or capacity",
        ),
        ("queue", {"queue": 5}, "Expected `object`"),
        ("instances", {"instances": 10**40}, "1 to 64"),
        ("cache_ttl_s", {"cache_ttl_s": 10**400}, "out of range"),
        ("instances", {"instances": 10**400}, "too large"),
        ("instances", {"instances": 0}, "1 to 64"),
    ],
)
def test_a_refused_patch_names_its_field(field: str, patch: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        patched(CONFIG, patch)
    assert words in refused.value.message
    assert refused.value.field in (field, "config")


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("versions.specific", ModelConfig("m", versions=VersionPolicy(specific=(1, 9)))),
        ("shadows[0].version", ModelConfig("m", shadows=(Shadow(9),))),
        ("shadows[0].alias", ModelConfig("m", shadows=(Shadow(1, alias="nightly"),))),
        ("max_batch_size", ModelConfig("m", max_batch_size=33)),
        ("preferred_batch_sizes", ModelConfig("m", preferred_batch_sizes=(64,))),
        ("warmup[0].shapes.z", ModelConfig("m", warmup=(Warmup(shapes={"z": (4,)}),))),
        ("warmup[0].shapes.x", ModelConfig("m", warmup=(Warmup(shapes={"x": (2, 4)}),))),
        ("compile", ModelConfig("m", compile=True)),
    ],
)
def test_what_does_not_fit_the_versions_is_refused(field: str, config: ModelConfig) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_against(config, ModelConfig("m"), [manifest(1), manifest(2)], [Alias("m", "production", 1)])
    assert refused.value.field == field
    assert field in refused.value.message


def test_what_fits_is_accepted_and_what_was_decided_before_is_not_looked_at_again() -> None:
    config = ModelConfig(
        "m",
        versions=VersionPolicy(specific=(1,)),
        shadows=(Shadow(2, alias="production"),),
        max_batch_size=32,
        warmup=(Warmup(shapes={"x": (4,)}),),
    )
    check_against(config, ModelConfig("m"), [manifest(1), manifest(2)], [Alias("m", "production", 1)])
    check_against(config, config, [manifest(7, most=0)], [])


def test_compile_is_for_models_that_have_a_version_that_can_be_compiled() -> None:
    exported = msgspec.structs.replace(manifest(2), platform="pytorch_export")
    check_against(ModelConfig("m", compile=True), ModelConfig("m"), [manifest(1), exported], [])
    check_against(ModelConfig("m", compile=True, threads=2), ModelConfig("m", compile=True), [manifest(1)], [])
    script = msgspec.structs.replace(manifest(1), platform="pytorch_libtorch")
    with pytest.raises(
        InvalidRequest, match=r"pytorch_export and pytorch_safetensors, but .* for pytorch_libtorch only"
    ):
        check_against(ModelConfig("m", compile=True), ModelConfig("m"), [script], [])
