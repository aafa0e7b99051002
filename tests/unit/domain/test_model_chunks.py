"""Cutting, windows and file descriptions: what needs no broker."""

from __future__ import annotations

import asyncio

import pytest

from tether.domain.chunking import LARGEST
from tether.domain.manifest import FIXED_CHUNK, Batching, Manifest, ModelFile, PushAnswer, PushRequest, TensorSpec
from tether.errors import BadEncoding, ModelRejected, QueueFull
from tether.modelstore.inspection.inspector import Inspection, InspectionLimits
from tether.modelstore.inspection.trial_runs import automatic_batch
from tether.modelstore.registration.manifest_builder import batching
from tether.storage.chunk_store import BoundedTaskGroup
from tether.storage.model_files import check_file, version_digest
from tether.wire import codec

DIGEST = "ab" * 32
FILE = ModelFile("model.onnx", 3, DIGEST, (DIGEST,))


async def test_a_window_never_runs_more_than_its_size() -> None:
    running = most = 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    async with BoundedTaskGroup(4) as window:
        for _ in range(20):
            await window.start(work())
    assert (most, running) == (4, 0)


async def test_the_first_error_of_a_window_ends_the_rest() -> None:
    ended: list[str] = []

    async def fails() -> None:
        raise QueueFull("full")

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    with pytest.raises(QueueFull):  # noqa: PT012 - the error comes at the next start or at the end
        async with BoundedTaskGroup(8) as window:
            await window.start(waits())
            await window.start(fails())
    assert ended == ["cancelled"]


@pytest.mark.parametrize(
    "file",
    [
        ModelFile("../model.onnx", 3, DIGEST, (DIGEST,)),
        ModelFile(".hidden", 3, DIGEST, (DIGEST,)),
        ModelFile("a//b", 3, DIGEST, (DIGEST,)),
        ModelFile("a/../b", 3, DIGEST, (DIGEST,)),
        ModelFile("/a", 3, DIGEST, (DIGEST,)),
        ModelFile("a/", 3, DIGEST, (DIGEST,)),
        ModelFile("model.onnx\n", 3, DIGEST, (DIGEST,)),
        ModelFile("model.onnx", 0, DIGEST, (DIGEST,)),
        ModelFile("model.onnx", 0, DIGEST, (DIGEST,), (0,)),
        ModelFile("model.onnx", 3, DIGEST, ()),
        ModelFile("a\\b", 3, DIGEST, (DIGEST,)),
        ModelFile("a\u202eb", 3, DIGEST, (DIGEST,)),
        ModelFile("x" * 129, 3, DIGEST, (DIGEST,)),
        ModelFile("語" * 67, 3, DIGEST, (DIGEST,)),
        ModelFile("/".join("abcdefghi"), 3, DIGEST, (DIGEST,)),
        ModelFile("a\udc80", 3, DIGEST, (DIGEST,)),
        ModelFile("model.onnx", FIXED_CHUNK + 1, DIGEST, (DIGEST,)),
        ModelFile("model.onnx", 3, DIGEST, (DIGEST,), (4,)),
        ModelFile("model.onnx", 3, DIGEST, (DIGEST,), (1, 2)),
        ModelFile("model.onnx", 3, DIGEST, (DIGEST, DIGEST), (3, 0)),
        ModelFile("model.onnx", LARGEST + 1, DIGEST, (DIGEST,), (LARGEST + 1,)),
        ModelFile("model.onnx", 3, DIGEST.upper(), (DIGEST,)),
        ModelFile("model.onnx", 3, DIGEST, ("*",)),
    ],
)
def test_a_description_that_could_reach_elsewhere_is_refused(file: ModelFile) -> None:
    with pytest.raises(BadEncoding):
        check_file(file)
    check_file(FILE)


@pytest.mark.parametrize(
    "path", ["my weights (1).npy", "größe+ß.bin", "日本語/モデル.onnx", "-v", "a,b;c=d", "x" * 128, "__init__.py"]
)
def test_whatever_else_a_file_is_called_it_may_be_stored(path: str) -> None:
    check_file(ModelFile(path, 3, DIGEST, (DIGEST,)))


def test_a_file_may_be_empty() -> None:
    check_file(ModelFile("pkg/__init__.py", 0, DIGEST, ()))
    assert ModelFile("pkg/__init__.py", 0, DIGEST, ()).sized_chunks() == []


def test_a_refusal_names_the_file() -> None:
    with pytest.raises(BadEncoding, match=r"the file '\.gitattributes' cannot be stored: .*starts with a dot"):
        check_file(ModelFile(".gitattributes", 3, DIGEST, (DIGEST,)))


def test_files_from_before_content_defined_cutting_keep_their_chunks() -> None:
    old = ModelFile("model.onnx", FIXED_CHUNK + 5, DIGEST, (DIGEST, DIGEST))
    check_file(old)
    assert [size for _, size in old.sized_chunks()] == [FIXED_CHUNK, 5]
    new = ModelFile("model.onnx", 12, DIGEST, (DIGEST, DIGEST), (5, 7))
    assert [size for _, size in new.sized_chunks()] == [5, 7]


def manifest(version: int) -> Manifest:
    spec = (TensorSpec("x", "FP32", (-1, 4)),)
    return Manifest("m", version, "onnxruntime_onnx", (FILE,), spec, spec, Batching(8), 1.5, "gateway")


def test_versions_with_the_same_files_share_a_cache_entry() -> None:
    assert version_digest(manifest(1)) == version_digest(manifest(2))


def test_pushes_and_answers_cross_the_wire_whole() -> None:
    request = PushRequest("m", (FILE,), 8, 1.0, "alice")
    answer = PushAnswer(manifest(1), created=True, aliases={"latest": 1})
    assert codec.decode(codec.encode(request), PushRequest) == request
    assert codec.decode(codec.encode(answer), PushAnswer) == answer


ROWS = (TensorSpec("x", "FP32", (-1, 4)),)


def joined(wanted: int, most: int, *, platform: str = "onnxruntime_onnx", **rest: object) -> tuple[int, str]:
    found = Inspection(**{"inputs": ROWS, "outputs": ROWS, "max_batch_size": most, **rest})  # type: ignore[arg-type]
    made = batching(PushRequest("m", (FILE,), wanted, platform=platform), found)
    assert bool(made.basis) == bool(made.max_batch_size)
    assert made.max_batch_size or made.reason
    return made.max_batch_size, made.basis


def test_an_onnx_model_is_batched_when_it_is_proven_or_declared() -> None:
    assert [joined(wanted, 64) for wanted in (-1, 0, 7, 100)] == [
        (64, "proven"),
        (0, ""),
        (7, "proven"),
        (100, "proven"),
    ]
    assert [joined(wanted, 0, note="it mixes rows") for wanted in (-1, 0, 1)] == [(0, "")] * 3
    assert joined(7, 0, note="it mixes rows") == (7, "declared")


@pytest.mark.parametrize("platform", ["pytorch_export", "tensorflow_savedmodel", "tensorflow_lite", "brought"])
def test_other_frameworks_are_batched_only_when_the_push_declares_it(platform: str) -> None:
    assert [joined(wanted, 64, platform=platform) for wanted in (-1, 1)] == [(0, "")] * 2
    assert joined(8, 64, platform=platform) == (8, "declared")


def test_a_python_bundle_declares_its_rows_in_its_description() -> None:
    assert joined(-1, 64, platform="python") == (64, "declared")
    assert joined(-1, 0, platform="python", note="its description sets no maxBatchSize") == (0, "")
    assert joined(0, 64, platform="python") == (0, "")


@pytest.mark.parametrize("shape", [(), (4,), (1, 4)])
def test_a_model_without_a_free_first_axis_cannot_be_declared(shape: tuple[int, ...]) -> None:
    fixed = (TensorSpec("fixed", "FP32", shape),)
    for side in ("inputs", "outputs"):
        with pytest.raises(ModelRejected, match="'fixed' has the shape"):
            joined(2, 0, **{side: fixed})  # type: ignore[arg-type]
    assert joined(-1, 0, inputs=fixed) == (0, "")


def test_a_manifest_from_before_there_was_a_basis_is_read() -> None:
    old = {"max_batch_size": 8, "max_delay_ms": 2.0}
    assert codec.decode(codec.pack(old), Batching) == Batching(8)


@pytest.mark.parametrize(
    ("shape", "rows"), [((-1, 64), 512), ((-1, 3, 224, 224), 8), ((-1, -1), 32), ((-1, 1 << 24), 1)]
)
def test_an_automatic_batch_stays_small_in_bytes(shape: tuple[int, ...], rows: int) -> None:
    spec = TensorSpec("x", "FP32", shape)
    assert automatic_batch((spec,), (TensorSpec("y", "FP32", (-1, 10)),)) == rows


def test_limits_grow_with_the_file_and_end() -> None:
    small, large = InspectionLimits.for_size(1 << 10), InspectionLimits.for_size((2 << 30) - 1)
    assert small.memory_mb < large.memory_mb
    assert large.wall_s <= 240
