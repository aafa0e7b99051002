"""Models that made-up inputs do not suit are taken, as not tried; real inputs of the publisher try them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.models import bundles, graphs

from tether.domain.manifest import Batching, Manifest, TensorSpec
from tether.domain.tensor import from_numpy
from tether.errors import InspectionLimitExceeded, ModelRejected
from tether.model import sample
from tether.modelstore.inspection.inspector import Inspection, InspectionLimits, inspect
from tether.sandbox import plan
from tether.sandbox.trial import tried
from tether.wire.oip_json import tensor_to_json

LIMITS = InspectionLimits(memory_mb=3072, cpu_s=20, wall_s=40)
Shape = list[int | str]


def made(
    nodes: list[Any],
    inputs: dict[str, tuple[str, Shape]],
    output: tuple[str, Shape] = ("FP32", ["n", "k"]),
    constants: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    ir: int = 10,
) -> bytes:
    """A graph with the output ``out``; constants that are inputs as well are optional ones."""
    given = [(name, kind, shape) for name, (kind, shape) in inputs.items()]
    return graphs.build(nodes, given, [("out", *output)], constants, opset=opset, ir=ir)


def node(kind: str, inputs: str, **attributes: Any) -> Any:
    return graphs.node(kind, inputs, "out", **attributes)


X: tuple[str, Shape] = ("FP32", ["n", 4])
IMAGE: tuple[str, Shape] = ("FP32", ["n", 1, 4, 4])
Real = dict[str, Any]


def real(**arrays: tuple[str, Any]) -> Real:
    return {name: np.array(value, np.dtype(kind)) for name, (kind, value) in arrays.items()}


ROWS = ("f4", [[1, 2, 3, 4], [5, 6, 7, 8]])
SEVEN: tuple[str, Shape] = ("FP32", ["n", 7])
MODELS: dict[str, tuple[Callable[[], bytes], Real]] = {
    "sizes of a Resize": (
        lambda: made(
            [node("Resize", "x - - s", mode="nearest")],
            {"x": IMAGE, "s": ("INT64", [4])},
            ("FP32", ["n", "c", "h", "w"]),
        ),
        real(x=("f4", np.ones((2, 1, 4, 4))), s=("i8", [2, 1, 8, 8])),
    ),
    "scales of a Resize": (
        lambda: made(
            [node("Resize", "x - s", mode="linear")], {"x": IMAGE, "s": ("FP32", [4])}, ("FP32", ["n", "c", "h", "w"])
        ),
        real(x=("f4", np.ones((1, 1, 4, 4))), s=("f4", [1, 1, 2, 2])),
    ),
    "depth of a OneHot": (
        lambda: made(
            [node("OneHot", "x d v")],
            {"x": ("INT64", ["n"]), "d": ("INT64", [])},
            constants={"v": np.array([0, 1], "f4")},
        ),
        real(x=("i8", [0, 2]), d=("i8", 3)),
    ),
    "step of a Slice": (
        lambda: made(
            [node("Slice", "x a b i s")], {"x": X, "s": ("INT64", [1])}, constants={"a": [0], "b": [4], "i": [1]}
        ),
        real(x=ROWS, s=("i8", [2])),
    ),
    "a Range": (
        lambda: made([node("Range", "a b s")], {name: ("INT64", []) for name in "abs"}, ("INT64", ["k"])),
        real(a=("i8", 0), b=("i8", 9), s=("i8", 3)),
    ),
    "a target shape": (
        lambda: made([node("Reshape", "x s")], {"x": SEVEN, "s": ("INT64", [2])}),
        real(x=("f4", np.ones((2, 7))), s=("i8", [7, 2])),
    ),
    "a shape to expand to": (
        lambda: made([node("Expand", "x s")], {"x": X, "s": ("INT64", [2])}),
        real(x=("f4", [[1, 2, 3, 4]]), s=("i8", [3, 4])),
    ),
    "how many of the best": (
        lambda: made([helper.make_node("TopK", ["x", "k"], ["out", "i"])], {"x": X, "k": ("INT64", [1])}),
        real(x=ROWS, k=("i8", [2])),
    ),
    "indices": (
        lambda: made(
            [node("Gather", "w x")],
            {"x": ("INT64", ["n"])},
            ("FP32", ["n"]),
            {"w": np.array([5], "f4")},
        ),
        real(x=("i8", [0, 0])),
    ),
    "lengths of a sequence": (
        lambda: made([node("ReverseSequence", "x l", time_axis=1, batch_axis=0)], {"x": X, "l": ("INT64", ["n"])}),
        real(x=ROWS, l=("i8", [3, 4])),
    ),
    "parts of a Split": (
        lambda: made([helper.make_node("Split", ["x", "p"], ["out", "rest"], axis=1)], {"x": X, "p": ("INT64", [2])}),
        real(x=ROWS, p=("i8", [1, 3])),
    ),
    "an axis": (
        lambda: made([node("CumSum", "x a")], {"x": ("FP32", ["n", 4]), "a": ("INT32", [])}),
        real(x=ROWS, a=("i4", 1)),
    ),
    "text that is a number": (
        lambda: made([node("Cast", "x", to=TensorProto.FLOAT)], {"x": ("BYTES", ["n", 2])}),
        {"x": np.array([[b"1", b"2.5"]], np.object_)},
    ),
}


_SPECS = (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("s", "INT64", (1,)))
SIGNED = Manifest("m", 1, "onnxruntime_onnx", (), _SPECS, (), Batching(), 0.0, "")


def write(folder: Path, content: bytes, real: Real | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    if real is not None:
        tensors = [tensor_to_json(from_numpy(name, array), compact=True) for name, array in real.items()]
        (folder / sample.PATH).write_text(json.dumps({"inputs": tensors}))
    return folder


async def look(folder: Path) -> Inspection:
    return await inspect(folder, "onnx", LIMITS)


@pytest.mark.parametrize("name", list(MODELS))
async def test_a_model_is_taken_whether_or_not_made_up_inputs_suit_it_and_a_sample_tries_it(
    tmp_path: Path, name: str
) -> None:
    build, inputs = MODELS[name]
    found = await look(write(tmp_path / "m", build()))
    assert {spec.name for spec in found.inputs} == set(inputs)
    assert not found.untried or found.untried.startswith("the trial run with made-up inputs failed: ")
    assert "/" not in found.untried
    tried = await look(write(tmp_path / "m", build(), inputs))
    assert tried.untried == ""


async def test_what_is_not_tried_says_why_and_is_batched_only_if_that_is_proven(tmp_path: Path) -> None:
    shape = await look(write(tmp_path / "a", MODELS["a target shape"][0]()))
    assert "Reshape" in shape.untried
    assert (shape.max_batch_size, shape.refuted) == (0, False)
    proven = await look(write(tmp_path / "b", MODELS["text that is a number"][0]()))
    assert (proven.untried, proven.max_batch_size) == ("", 512)  # a kind of made-up text is numbers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"s": np.array([0, 1, 8, 8])}, "the model fails on the sample: "),
        ({"s": np.array([1.5, 1, 8, 8])}, "'s' has values that are not of INT64"),
        ({"s": np.array([2, 1, 8])}, r"input 's' has shape \[3\]; the model expects \[4\]"),
        ({"z": np.zeros(1)}, "has no input 'z'"),
    ],
    ids=["a value", "a type", "a shape", "a name"],
)
async def test_a_sample_that_the_model_does_not_take_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    build, inputs = MODELS["sizes of a Resize"]
    with pytest.raises(ModelRejected, match=words) as caught:
        await look(write(tmp_path / "m", build(), {**inputs, **change}))
    assert caught.value.field == "sample"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"inputs": [{}]}',
        '{"x": [[1], [2, 3]], "s": [1]}',
        '{"x": "a", "s": [1]}',
        '{"z": [[1], [2, 3]]}',
        '{"x": ' + "[" * 5000,
    ],
    ids=["nothing", "a list", "no tensor", "ragged", "text", "ragged and unknown", "deep"],
)
def test_a_sample_that_is_none_is_refused_with_the_reason(tmp_path: Path, text: str) -> None:
    (tmp_path / sample.PATH).write_text(text)
    with pytest.raises(ModelRejected, match="the sample") as caught:
        sample.read(tmp_path, SIGNED)
    assert caught.value.field == "sample"


@pytest.mark.parametrize(
    "text",
    [
        '{"x": [[1, 2, 3, 4]], "s": [2]}',
        json.dumps(
            {
                "inputs": [
                    {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]},
                    {"name": "s", "shape": [1], "datatype": "INT64", "data": [2]},
                ]
            }
        ),
    ],
    ids=["values", "tensors"],
)
async def test_a_sample_may_be_values_by_name_or_tensors(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "m", MODELS["step of a Slice"][0]())
    (folder / sample.PATH).write_text(text)
    assert (await look(folder)).untried == ""


async def test_rows_of_the_sample_are_compared_too(tmp_path: Path) -> None:
    """Only rows whose first number is about 7 are mixed, and no made-up row has that."""
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"]),
        helper.make_node("Sub", ["first", "seven"], ["far"]),
        helper.make_node("Abs", ["far"], ["from"]),
        helper.make_node("Less", ["from", "near"], ["is"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["less"]),
        helper.make_node("Where", ["is", "less", "x"], ["out"]),
    ]
    content = made(
        nodes,
        {"x": X},
        ("FP32", ["n", 4]),
        {"zero": np.array([0]), "one": np.array([1]), "seven": np.array([[7]], "f4"), "near": np.array([[0.01]], "f4")},
    )
    assert not (await look(write(tmp_path / "m", content))).refuted
    inputs = real(x=("f4", [[7, 1, 2, 3], [7, 9, 8, 6]]))
    assert (await look(write(tmp_path / "m", content, inputs))).refuted


# Python


async def bundle(folder: Path, code: str, limits: InspectionLimits = LIMITS, **changes: Any) -> Inspection:
    bundles.write(folder, code=code, **changes)
    return await inspect(folder, "python_bundle", limits)


TEMPORARY = """
import tempfile
from pathlib import Path

class Model:
    def load(self, directory):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "weights").write_bytes(bytes(SIZE))
            self.size = Path(folder, "weights").stat().st_size

    def predict(self, inputs):
        with tempfile.TemporaryFile() as file:
            file.write(bytes(self.size))
        return {"y": inputs["x"]}
"""


@pytest.mark.skipif(not tried(plan.REQUIRED, 1).scratch, reason="the kernel gives no folder in memory here")
async def test_a_bundle_writes_temporary_files_at_its_inspection_as_in_a_worker(tmp_path: Path) -> None:
    wish = plan.ConfinementRequest(scratch_mb=1, file_mb=1)
    small = bundles.write(tmp_path / "small", code=TEMPORARY.replace("SIZE", "500_000"))
    assert not (await inspect(small, "python_bundle", LIMITS, confined=wish)).untried
    large = bundles.write(tmp_path / "large", code=TEMPORARY.replace("SIZE", "1_500_000"))
    with pytest.raises(ModelRejected, match="OSError"):
        await inspect(large, "python_bundle", LIMITS, confined=wish)
    with pytest.raises(ModelRejected, match=r"FileNotFoundError|OSError|PermissionError"):
        await inspect(small, "python_bundle", LIMITS)


async def test_a_bundle_that_refuses_made_up_inputs_is_taken(tmp_path: Path) -> None:
    code = "class Model:\n    def predict(self, inputs):\n        raise ValueError('no face in the picture')\n"
    found = await bundle(tmp_path / "m", code)
    assert found.untried == "the trial run with made-up inputs failed: ValueError: no face in the picture"
    assert found.max_batch_size == 8  # which its description declares


async def test_a_bundle_may_write_into_its_inputs_and_gets_text_as_bytes(tmp_path: Path) -> None:
    code = (
        "class Model:\n    def predict(self, inputs):\n        x = inputs['x']\n        x += 1\n"
        "        assert all(type(one) is bytes for one in inputs['t'].ravel())\n        return {'y': x}\n"
    )
    text = {"name": "t", "datatype": "BYTES", "shape": [-1]}
    assert (await bundle(tmp_path / "m", code, inputs=[bundles.FP32, text])).untried == ""


ENDS: dict[str, tuple[str, str]] = {
    "asleep": (
        "import time\ntime.sleep(1000)\nclass Model: ...\n",
        r"importing model\.py took longer than 12 s; something at the top level",
    ),
    "busy": ("while True: pass\nclass Model: ...\n", r"importing model\.py took longer than 4 s"),
    "load": (
        "import time\nclass Model:\n    def load(self, folder): time.sleep(1000)\n    def predict(self, inputs): ...\n",
        r"making the class of model\.py and its load\(\) took longer than 12 s",
    ),
    "predict": (
        "import time\nclass Model:\n    def predict(self, inputs): time.sleep(1000)\n",
        "the trial run with made-up inputs took longer than 12 s; .*--sample",
    ),
    "exit": ("import os\nos._exit(3)\n", r"importing model\.py killed its process \(exit status 3\)"),
    "abort": ("import os\nos.abort()\n", r"importing model\.py killed its process \(signal 6\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENDS))
async def test_what_a_bundle_was_doing_when_it_did_not_come_to_an_end_is_told(tmp_path: Path, name: str) -> None:
    code, words = ENDS[name]
    wall_s = 12.0 if "sleep" in code else 90.0
    with pytest.raises(InspectionLimitExceeded, match=words):
        await bundle(tmp_path / "m", code, InspectionLimits(memory_mb=3072, cpu_s=4, wall_s=wall_s))


async def test_a_model_whose_first_run_crashes_is_not_tried_and_one_that_ran_once_is(tmp_path: Path) -> None:
    crash = "import ctypes\nclass Model:\n    def predict(self, inputs):\n        ctypes.string_at(0)\n"
    found = await bundle(tmp_path / "a", crash)
    assert found.crashed
    assert "signal 11" in found.untried


async def test_an_answer_that_is_not_what_is_declared_is_still_refused(tmp_path: Path) -> None:
    code = "class Model:\n    def predict(self, inputs):\n        return {'y': inputs['x'][:, :1]}\n"
    with pytest.raises(ModelRejected, match=r"output 'y' has shape \[1, 1\]"):
        await bundle(tmp_path / "m", code)


# signatures


async def test_optional_inputs_and_names_of_axes_are_in_the_signature(tmp_path: Path) -> None:
    content = made(
        [node("Mul", "x w")],
        {"x": ("FP32", ["rows", "seq"]), "w": ("FP32", [1])},
        ("FP32", ["rows", "seq"]),
        {"w": np.array([2], "f4")},
    )
    found = await look(write(tmp_path / "m", content))
    assert [(spec.name, spec.axes, spec.optional) for spec in found.inputs] == [
        ("x", ("rows", "seq"), False),
        ("w", (), True),
    ]
    assert found.max_batch_size > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"opset": 99},
            r"it uses opset 99 of 'ai\.onnx', but at most \d+ is supported here; export it with opset_version=\d+ or less",
        ),
        ({"ir": 99}, r"it has ONNX IR version 99, but at most \d+ is supported here; .*model\.ir_version = \d+"),
        ({"opset": 1}, r"ONNX Runtime lacks operator 'Neg' \(of opset 1\) for these types on the processor"),
    ],
    ids=["opset", "IR", "old operator"],
)
async def test_what_is_too_new_or_too_old_is_told_with_the_fix(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    content = made([node("Neg", "x")], {"x": X}, ("FP32", ["n", 4]), **change)
    with pytest.raises(ModelRejected, match=words):
        await look(write(tmp_path / "m", content))


async def test_an_operator_of_a_newer_opset_is_told_with_the_fix(tmp_path: Path) -> None:
    content = made([node("Gelu", "x")], {"x": X}, ("FP32", ["n", 4]), opset=17)
    with pytest.raises(
        ModelRejected, match="no operator 'Gelu' in opset 17, which it declares; export it with a newer"
    ):
        await look(write(tmp_path / "m", content))
