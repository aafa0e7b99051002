"""Python models that yield their answer in parts of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import bundles

from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.domain.tensor import Array
from tether.errors import InferenceFailed
from tether.worker import runtimes
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime

Load = Callable[..., ProcessRuntime]
CODE = """
import numpy as np


class Model:
    def predict(self, inputs):
        {body}
"""
STEPS = """held = np.empty((2, 4), np.float32)
        for start in range(0, len(inputs["x"]), 2):
            part = inputs["x"][start : start + 2]
            np.add(part, 1, out=held[: len(part)])
            yield {"y": held[: len(part)], "text": [str(start).encode()] * len(part)}
        yield {"y": np.empty((0, 4)), "text": []}"""
TEXT = {"name": "text", "datatype": "BYTES", "shape": [-1]}


def manifest(outputs: list[dict[str, Any]]) -> Manifest:
    file = ModelFile("model.py", 1, "0" * 64, ("0" * 64,), (1,))
    specs = tuple(TensorSpec(spec["name"], spec["datatype"], tuple(spec["shape"])) for spec in outputs)
    return Manifest("m", 1, "python", (file,), (), specs, Batching(8), 0.0, "test")


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    made: list[ProcessRuntime] = []

    def one(body: str, *outputs: dict[str, Any], memory_mb: int = 4096, batch: int = 8) -> ProcessRuntime:
        described = list(outputs) or [{**bundles.FP32, "name": "y"}]
        code = CODE.replace("{body}", body)
        folder = bundles.write(tmp_path / "bundle", code=code, outputs=described, maxBatchSize=batch)
        runtime = runtimes.load(manifest(described), folder, Options(run_timeout_s=30, memory_mb=memory_mb))
        assert isinstance(runtime, ProcessRuntime)
        made.append(runtime)
        return runtime

    yield one
    for runtime in made:
        runtime.close()


def rows(count: int) -> dict[str, Array]:
    return {"x": np.arange(count * 4, dtype=np.float32).reshape(count, 4)}


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_parts_are_joined_in_order_though_they_use_the_same_memory(load: Load, count: int) -> None:
    runtime = load(STEPS, {**bundles.FP32, "name": "y"}, TEXT)
    found, text = runtime.run(rows(count), ())
    np.testing.assert_array_equal(found, rows(count)["x"] + 1)
    assert found.dtype == np.float32
    assert text.tolist() == [str(row // 2 * 2).encode() for row in range(count)]
    (only,) = runtime.run(rows(count), ("text",))
    assert only.tolist() == text.tolist()


def test_a_batch_whose_steps_together_need_too_much_memory_is_worked_on_in_steps(load: Load) -> None:
    whole = """if inputs["x"][0, 0] < 0:
            return {"y": np.broadcast_to(inputs["x"][:, :1], (len(inputs["x"]), 1 << 23)).copy()[:, :4]}
        return self.steps(inputs)

    def steps(self, inputs):
        for row in inputs["x"]:
            yield {"y": np.broadcast_to(row[:1], (1, 1 << 23)).copy()[:, :4]}"""
    runtime = load(whole, memory_mb=1024)
    given = np.ones((64, 4), np.float32)
    with pytest.raises(InferenceFailed, match="ran out of memory"):
        runtime.run({"x": -given}, ())
    (found,) = runtime.run({"x": given}, ())
    np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("yield from ()", r"predict\(\) yielded nothing; yield arrays by name at least once"),
        ("yield {'y': inputs['x']}; yield [1]", r"part 2: predict\(\) yielded list, not arrays by name"),
        ("yield {'z': inputs['x']}", r"part 1: predict\(\) yielded no output 'y'"),
        (
            "yield {'y': inputs['x']}; yield {'y': inputs['x'][:, :2]}",
            r"part 2: output 'y' has shape \[3, 2\], not \[-1, 4\]",
        ),
        ("yield {'y': inputs['x']}; raise KeyError('late')", "the model failed: KeyError: 'late'"),
        ("yield {'y': [['a'] * 4]}", "ValueError: could not convert string to float"),
        ("return iter([1, 2])", r"part 1: predict\(\) yielded int"),
        ("return [1]", r"predict\(\) returned list, not arrays by name"),
    ],
)
def test_a_part_that_is_wrong_is_named_and_the_process_lives_on(load: Load, body: str, words: str) -> None:
    runtime = load(body)
    before = runtime.pid
    with pytest.raises(InferenceFailed, match=words):
        runtime.run(rows(3), ())
    assert runtime.pid == before


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([-1, -1], r"part 2: output 'y' has shape \[3, 2\], and the part before it \[3, 4\]"),
        ([], "output 'y' has no axis to join them on"),
        ([4, 4], r"output 'y' has shape \[5, 4\], not \[4, 4\]"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused(load: Load, shape: list[int], words: str) -> None:
    body = {2: "yield {'y': inputs['x']}; yield {'y': inputs['x'][:, :2]}", 0: "yield {'y': 1.0}"}[len(shape)]
    if shape == [4, 4]:
        body = "yield {'y': inputs['x']}; yield {'y': inputs['x'][:2]}"
    runtime = load(body, {"name": "y", "datatype": "FP32", "shape": shape}, batch=0)
    with pytest.raises(InferenceFailed, match=words):
        runtime.run(rows(3), ())
