"""TensorFlow Lite files: hostile ones are refused with the reason, and one caller's run leaves nothing for the next one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import frameworks

from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.errors import InferenceFailed, ModelRejected
from tether.modelstore.inspection.inspector import Inspection, InspectionLimits, inspect
from tether.worker import runtimes
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime

frameworks.need("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema  # noqa: E402 - likewise
from support.models import lite  # noqa: E402 - only where LiteRT is

from tether.frameworks import litert  # noqa: E402 - likewise

INPUTS, OUTPUTS = (TensorSpec("x", "FP32", (1, 2)),), (TensorSpec("y", "FP32", (1, 2)),)
GOOD = lite.written(lite.recurrent())


def changed(change: Callable[[schema.ModelT], object]) -> bytes:
    model = lite.recurrent()
    change(model)
    return lite.written(model)


def needs(operator: bytes) -> bytes:
    def change(model: schema.ModelT) -> None:
        (code,) = model.operatorCodes
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
        code.customCode = operator

    return changed(change)


def elsewhere(model: schema.ModelT) -> None:
    group = schema.ExternalBufferGroupT()
    group.name = "/etc/passwd"
    model.externalBufferGroups = [group]


def text(model: schema.ModelT) -> None:
    model.subgraphs[0].tensors[0].type = schema.TensorType.STRING


def absent(model: schema.ModelT) -> None:
    model.subgraphs[0].operators[0].inputs = [0, 1, 2, 3, 99]


def endless(model: schema.ModelT) -> None:
    model.subgraphs[0].tensors[0].shape = [1 << 15, 1 << 15]


async def looked_at(folder: Path, content: bytes) -> Inspection:
    folder.mkdir(exist_ok=True)
    (folder / "model.tflite").write_bytes(content)
    return await inspect(folder, "litert", InspectionLimits(cpu_s=20, wall_s=60))


HOSTILE = {
    "empty": (b"", "not a TensorFlow Lite model"),
    "another format": (b"PK\x03\x04" + bytes(64), "not a TensorFlow Lite model"),
    "only a header": (GOOD[:8], "damaged"),
    "cut": (GOOD[: len(GOOD) // 2], "damaged|killed its process|refused"),
    "root beyond the end": (b"\xff\xff\xff\x7f" + GOOD[4:], "damaged"),
    "random": (b"\x10\0\0\0TFL3" + random.Random(7).randbytes(4096), "damaged|has no graph"),
    "flex": (needs(b"FlexReadFile"), "needs the operator 'FlexReadFile', which LiteRT does not have"),
    "custom": (needs(b"Mine\x1b[2J"), r"needs the operator 'Mine\[2J'"),
    "no graph": (changed(lambda model: model.subgraphs.clear()), "has no graph"),
    "weights elsewhere": (changed(elsewhere), "weights in other files"),
    "text": (changed(text), "'x' holds .*; only numbers can be served"),
    "a tensor that is not there": (changed(absent), "refused|killed its process"),
    "too large to try": (changed(endless), "more than 67108864 elements|refused"),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_file_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    content, words = HOSTILE[kind]
    with pytest.raises(ModelRejected, match=words) as caught:
        await looked_at(tmp_path / "m", content)
    assert "/" not in caught.value.message
    assert caught.value.message.isprintable()


async def test_a_file_without_signatures_is_served_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    content = changed(lambda model: model.signatureDefs.clear())
    found = await looked_at(tmp_path / "m", content)
    assert (found.signature, found.signatures, found.untried) == ("", (), "")
    assert [spec.shape for spec in (*found.inputs, *found.outputs)] == [spec.shape for spec in (*INPUTS, *OUTPUTS)]
    runtime = litert.load(tmp_path / "m")
    given = {found.inputs[0].name: np.ones((1, 2), np.float32)}
    np.testing.assert_array_equal(runtime.run(given, ()), litert_model_answers(tmp_path, given))
    with pytest.raises(ModelRejected, match="has no signature 'serving_default'; it has: none"):
        litert.load(tmp_path / "m", signature="serving_default")


def litert_model_answers(folder: Path, given: dict[str, Any]) -> list[Any]:
    """What the same file with its signature answers."""
    (folder / "signed").mkdir()
    (folder / "signed" / "model.tflite").write_bytes(GOOD)
    signed = litert.load(folder / "signed")
    return signed.run(dict(zip([spec.name for spec in signed.inputs], given.values(), strict=True)), ())


async def test_whatever_bytes_are_wrong_there_is_an_inspection_or_a_refusal(tmp_path: Path) -> None:
    refused = 0  # the bytes are drawn with the seed of the whole run, which pytest prints
    for _ in range(12):
        content = bytearray(GOOD)
        for _ in range(random.randrange(1, 9)):
            content[random.randrange(8, len(content))] = random.randrange(256)
        try:
            await looked_at(tmp_path / "m", bytes(content))
        except ModelRejected:
            refused += 1
    assert refused


async def test_what_recurrent_layers_keep_is_not_the_next_callers(tmp_path: Path) -> None:
    found = await looked_at(tmp_path / "m", GOOD)
    assert (found.inputs, found.outputs, found.max_batch_size) == (INPUTS, OUTPUTS, 0)
    file = ModelFile("model.tflite", len(GOOD), "0" * 64, ("0" * 64,), (1,))
    manifest = Manifest("m", 1, "tensorflow_lite", (file,), INPUTS, OUTPUTS, Batching(0), 0.0, "test")
    with pytest.raises(ModelRejected, match="run on the processor"):
        runtimes.load(manifest, tmp_path / "m", Options(device="cuda"))
    runtime = runtimes.load(manifest, tmp_path / "m", Options())
    assert isinstance(runtime, ProcessRuntime)
    try:
        ones = np.ones((1, 2), np.float32)
        for _ in range(3):
            np.testing.assert_array_equal(runtime.run({"x": ones}, ()), [ones])
        before = runtime.pid
        with pytest.raises(InferenceFailed, match="the model failed"):
            runtime.run({"x": np.ones((1, 3), np.float32)}, ())
        np.testing.assert_array_equal(runtime.run({"x": ones}, ("y",)), [ones])
        assert runtime.pid == before
    finally:
        runtime.close()
