"""Ways in which operators mix rows: none of them is taken for independent, and each is told by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.models import models
from support.models.graphs import IMAGE, LSTM, SEQUENCE, W44, X, build, node, proof, shape_chain

MIXED = {
    "softmax of rows": (build([node("Softmax", axis=0)]), "operator Softmax (output 'y') works across the rows"),
    "old softmax of all": (build([node("Softmax", axis=0)], opset=11), "across the rows"),
    "old softmax of two axes": (build([node("Transpose", "x", "t", perm=[1, 0, 2]), node("Softmax", "t", axis=1)], [SEQUENCE], opset=11), "across"),
    "mean of all": (build([node("ReduceMean")]), "across the rows"),
    "mean of rows": (build([node("ReduceMean", axes=[-2])]), "across the rows"),
    "sum over axes that are computed": (
        build([node("Cast", "f", "a", to=TensorProto.INT64), node("ReduceSum", "x a")], weights={"f": np.array([0.3])}),
        "across the rows",
    ),
    "no axes": (build([node("ReduceSum", "x a")], weights={"a": np.zeros(0, np.int64)}), "across the rows"),
    "the largest row": (build([node("ArgMax")]), "across the rows"),
    "the first rows": (build([node("TopK", "x k", "y i", axis=0)], weights={"k": np.array([1])}), "across the rows"),
    "running sum of rows": (build([node("CumSum", "x a")], weights={"a": np.array(0)}), "across the rows"),
    "a difference of rows": (
        build([node("Slice", "x a b", "p"), node("Sub", "x p", "y")], weights={"a": np.array([0]), "b": np.array([1])}),
        "takes some of the rows",
    ),
    "parts of rows to a number that a run may reach": (
        build([node("Reshape", "x t", "r"), node("Slice", "r a b")], weights={"t": np.array([-1, 2]), "a": np.array([0]), "b": np.array([1 << 16])}),
        "takes some of the rows",
    ),
    "rows backwards": (
        build([node("Slice", "x a b c d")], weights={"a": np.array([-1]), "b": np.array([-(1 << 62)]), "c": np.array([0]), "d": np.array([-1])}),
        "takes some of the rows",
    ),
    "a matrix that fits three rows": (build([node("Add", "x c")], weights={"c": np.ones((3, 4))}), "other elements along"),
    "a bias that fits three rows": (
        build([node("Gemm", "x w b")], weights={"w": W44, "b": np.ones((3, 4))}), "other elements along",
    ),
    "rows by rows": (build([node("Transpose", "x", "t"), node("MatMul", "x t")]), "pairs each row"),
    "columns by columns": (build([node("Transpose", "x", "t"), node("MatMul", "t x")]), "sums over the rows"),
    "a row for each column": (
        build([node("Squeeze", "z a", "v"), node("Add", "x v")], [X, ("z", "FP32", ("n", 1))], weights={"a": np.array([1])}),
        "different axes",
    ),
    "squeeze everything": (build([node("Squeeze", "x")]), "with one row"),
    "squeeze the rows": (build([node("Squeeze", "x a")], weights={"a": np.array([0])}), "takes away the axis of the rows"),
    "a shape that fits one row": (build([node("Reshape", "x s")], weights={"s": np.array([1, 4])}), "axis of their own"),
    "pairs of numbers of all rows": (
        build([node("Reshape", "x s")], [("x", "FP32", ("n", 3))], weights={"s": np.array([-1, 2])}), "axis of their own",
    ),
    "an open axis cut in twos": (
        build([node("Reshape", "x s")], [("x", "FP32", ("n", "t"))], weights={"s": np.array([-1, 2])}), "axis of their own",
    ),
    "columns before rows": (
        build([node("Transpose", "x", "t"), node("Reshape", "t s")], weights={"s": np.array([-1, 4])}),
        "several rows may lie together",
    ),
    "all in one": (build([node("Reshape", "x s")], weights={"s": np.array([-1])}), "one for one"),
    "time first": (build([node("Transpose")]), "one for one"),
    "rows joined": (build([node("Concat", "x x", axis=0)]), "along the axis of the rows"),
    "a row more": (build([node("Concat", "x c", axis=0)], weights={"c": np.ones((1, 4))}), "same for all rows"),
    "rows split": (build([node("Split", "x", "y z", axis=0)]), "splits the rows"),
    "rows padded": (build([node("Pad", "x p")], weights={"p": np.array([0, 0, 1, 0])}), "axis of the rows"),
    "rows repeated": (build([node("Tile", "x r")], weights={"r": np.array([2, 1])}), "one for one"),
    "one row": (build([node("Gather", "x i")], weights={"i": np.array([0])}), "takes some of the rows"),
    "rows by number": (build([node("Gather", "x z")], [X, ("z", "INT64", ("n",))]), "other rows"),
    "rows looked up": (build([node("GatherElements", "x z")], [X, ("z", "INT64", ("n", 4))]), "other rows"),
    "the number of rows": (
        build(shape_chain(node("Cast", "b0", "f", to=TensorProto.FLOAT), node("Div", "x f")), [SEQUENCE]),
        "number of rows",
    ),
    "one row or more": (
        build(
            shape_chain(
                node("Equal", "b0 one", "go"),
                helper.make_node(
                    "If",
                    ["go"],
                    ["y"],
                    then_branch=helper.make_graph([node("Neg", "x", "p")], "a", [], [models.value("p", "FP32", None)]),
                    else_branch=helper.make_graph([node("Abs", "x", "q")], "b", [], [models.value("q", "FP32", None)]),
                ),
            ),
            [SEQUENCE],
        ),
        "number of rows",
    ),
    "training": (
        build([node("BatchNormalization", "x a b c d", "y e f", training_mode=1)], [IMAGE], weights={n: np.ones(3) for n in "abcd"}),
        "training mode",
    ),
    "rows as channels": (
        build([node("BatchNormalization", "x a b c d")], [("x", "FP32", ("n",))], weights={n: np.ones(1) for n in "abcd"}),
        "across the rows",
    ),
    "layer norm of rows": (build([node("LayerNormalization", "x a", axis=0)], weights={"a": np.ones(4)}), "across the rows"),
    "convolution of rows": (
        build([node("Transpose", "x", "t", perm=[1, 2, 0]), node("Conv", "t w")], [("x", "FP32", ("n", 4, 4))], weights={"w": np.ones((1, 4, 1))}),
        "rows on an axis that it mixes",
    ),
    "rows resized": (
        build([node("Resize", "x - s", mode="nearest")], [IMAGE], weights={"s": np.array([2.0, 1, 1, 1])}), "number of rows",
    ),
    "a mode that is off by one": (
        build(
            [node("Resize", "x - s", mode="nearest", coordinate_transformation_mode="tf_half_pixel_for_nn")],
            [IMAGE], weights={"s": np.array([1.0, 1, 2, 2])}, opset=11,
        ),
        "tf_half_pixel_for_nn",
    ),
    "rows as time": (build([node("LSTM", "x w r", "y", hidden_size=3)], [SEQUENCE], weights=LSTM), "as if they were time"),
    "a state for one row": (
        build(
            [node("Transpose", "x", "s", perm=[1, 0, 2]), node("LSTM", "s w r - - h", "a y", hidden_size=3)],
            [SEQUENCE], weights={**LSTM, "h": np.ones((1, 1, 3))},
        ),
        "states that are not those of the rows",
    ),
    "dynamic quantisation": (
        build([node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z")]), "one scale from all rows",
    ),
    "a scale for each row": (
        build([node("QuantizeLinear", "x s", "q", axis=0), node("DequantizeLinear", "q t")], weights={"s": np.ones(3), "t": 1.0}),
        "scale for each row",
    ),
    "scales from the rows": (build([node("QuantizeLinear", "x z", "y")], [X, ("z", "FP32", ("n",))]), "from the rows"),
    "einsum over rows": (build([node("Einsum", "x x", equation="bi,bj->ij")]), "sums over the rows"),
    "einsum of pairs": (build([node("Einsum", "x x", equation="ai,bi->ab")]), "pairs each row"),
    "non-zero elements": (build([node("NonZero")], outputs=[("y", "INT64", ("r", "c"))]), "lists elements of all rows"),
    "unique": (build([node("Unique")]), "compares all rows"),
    "random": (build([node("RandomNormalLike", "x", "r"), node("Add", "x r")]), "draws random numbers"),
    "the same noise": (build([node("RandomNormal", "", "r", shape=[1, 4]), node("Add", "x r")]), "draws random numbers"),
    "dropout in training": (
        build([node("Dropout", "x r t")], weights={"r": 0.5, "t": np.array(True)}), "at random",
    ),
    "text cut to the longest": (
        build([node("StringSplit", "x", "y c", delimiter=",")], [("x", "BYTES", ("n",))], [("y", "BYTES", ("n", "m"))], opset=20),
        "may mix rows",
    ),
    "scatter": (
        build([node("ScatterND", "x i u")], weights={"i": np.zeros((1, 1), np.int64), "u": np.ones((1, 4))}), "may mix rows",
    ),
    "a loop as long as the rows say": (
        build(
            [
                node("ReduceSum", "x", "sum", keepdims=0),
                node("Cast", "sum", "rounds", to=TensorProto.INT64),
                helper.make_node(
                    "Loop", ["rounds", "", "x"], ["y"],
                    body=helper.make_graph(
                        [node("Identity", "go", "on"), node("Sin", "s", "u")], "body",
                        [models.value("i", "INT64", []), models.value("go", "BOOL", []), models.value("s", "FP32", None)],
                        [models.value("on", "BOOL", []), models.value("u", "FP32", None)],
                    ),
                ),
            ]
        ),
        "across the rows",
    ),
    "two first axes": (build([node("MatMul", "x z")], [X, ("z", "FP32", ("m", 4))]), "first axes of different names"),
    "a threshold beside": (build([node("Add", "x z")], [X, ("z", "FP32", (1,))]), "input 'z' has no free first axis"),
    "a square of rows": (build([node("Relu")], [("x", "FP32", ("n", "n"))]), "another of its axes"),
    "fixed rows": (build([node("Relu")], [("x", "FP32", (2, 4))]), "no free first axis"),
    "a constant out": (build([node("Identity", "c")], weights={"c": np.ones((1, 4))}), "same for all rows"),
    "what the file says of rows": (
        build([node("Relu", "x", "r"), node("Neg", "r")], declared=[("r", "FP32", (1, 4))]), "as many rows whatever comes in",
    ),
    "a newer operator set": (build([node("Relu")], opset=99), "operator set ai.onnx 99 is not known"),
    "an older operator set": (build([node("Relu")], opset=6), "operator set ai.onnx 6 is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MIXED))
def test_rows_that_mix_or_may_are_told(tmp_path: Path, name: str) -> None:
    content, why = MIXED[name]
    independent, reason = proof(tmp_path, content)
    assert not independent
    assert why in reason
