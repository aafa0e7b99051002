"""Cutting, windows and file descriptions: what needs no broker."""

from __future__ import annotations

import asyncio

import pytest

from tether import codec
from tether.bus.chunks import Window
from tether.bus.model_files import check_file, version_digest
from tether.errors import BadEncoding, ModelRejected, QueueFull
from tether.model import FIXED_PIECE, Batching, Manifest, ModelFile, PushAnswer, PushRequest, TensorSpec
from tether.modelstore.assemble import batching
from tether.modelstore.inspection import Inspection, Limits
from tether.modelstore.warmup import automatic_batch
from tether.pieces import LARGEST

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

    async with Window(4) as window:
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
        async with Window(8) as window:
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
        ModelFile("model.onnx", 0, DIGEST, ()),
        ModelFile("model.onnx", FIXED_PIECE + 1, DIGEST, (DIGEST,)),
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


def test_files_from_before_content_defined_cutting_keep_their_pieces() -> None:
    old = ModelFile("model.onnx", FIXED_PIECE + 5, DIGEST, (DIGEST, DIGEST))
    check_file(old)
    assert [size for _, size in old.pieces()] == [FIXED_PIECE, 5]
    new = ModelFile("model.onnx", 12, DIGEST, (DIGEST, DIGEST), (5, 7))
    assert [size for _, size in new.pieces()] == [5, 7]


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


def test_batching_is_what_the_push_wants_and_the_model_can() -> None:
    def made(wanted: int, **rest: object) -> int:
        found = Inspection(**{"inputs": (), "outputs": (), "max_batch_size": 64, **rest})  # type: ignore[arg-type]
        return batching(PushRequest("m", (FILE,), wanted), found).max_batch_size

    assert [made(-1), made(0), made(7)] == [64, 0, 7]
    assert [made(-1, max_batch_size=0), made(1, max_batch_size=0)] == [0, 0]
    assert made(7, max_batch_size=0, unproven=True) == 7
    with pytest.raises(ModelRejected, match="push it with max_batch_size 0"):
        made(2, max_batch_size=0, note="it mixes rows")


@pytest.mark.parametrize(
    ("shape", "rows"), [((-1, 64), 512), ((-1, 3, 224, 224), 8), ((-1, -1), 32), ((-1, 1 << 24), 1)]
)
def test_an_automatic_batch_stays_small_in_bytes(shape: tuple[int, ...], rows: int) -> None:
    spec = TensorSpec("x", "FP32", shape)
    assert automatic_batch((spec,), (TensorSpec("y", "FP32", (-1, 10)),)) == rows


def test_limits_grow_with_the_file_and_end() -> None:
    small, large = Limits.for_size(1 << 10), Limits.for_size((2 << 30) - 1)
    assert small.memory_mb < large.memory_mb
    assert large.wall_s <= 240
