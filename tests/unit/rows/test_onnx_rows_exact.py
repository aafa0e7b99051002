"""Numbers and attributes of a graph that are not what they seem: no proof rests on one that ONNX Runtime has otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.models.graphs import SEQUENCE, X, attribute, build, node, proof

NONE = np.zeros(0, np.int64)
LEAST = -(1 << 62)


def cast(inputs: str, output: str, to: int) -> Any:
    return node("Cast", inputs, output, to=to)


def folded(nodes: list[Any], weights: Mapping[str, Any], opset: int = 17) -> bytes:
    """The rows in ``k`` parts, which are compared: of one part alone each row is by itself."""
    parts = [
        node("Concat", "k minus", "target", axis=0),
        node("Reshape", "x target", "r"),
        node("Softmax", "r", "p", axis=0),
        node("Shape", "x", "shape"),
        node("Reshape", "p shape", "y"),
    ]
    return build([*nodes, *parts], weights={"minus": np.array([-1]), **weights}, opset=opset)


def by_rows(nodes: list[Any], weights: Mapping[str, Any]) -> bytes:
    """``k`` parts by their first axis, each compared with itself: harmless where ``k`` is the number of rows ``b``."""
    parts = [
        node("Concat", "k minus", "target", axis=0),
        node("Reshape", "x target", "r"),
        node("Softmax", "r", "p", axis=1),
        node("Reshape", "p shape", "y"),
    ]
    start = [node("Shape", "x", "shape"), node("Gather", "shape zero", "b", axis=0)]
    fixed = {"minus": np.array([-1]), "zero": np.array([0]), "one": np.array([1])}
    return build([*start, *nodes, *parts], weights={**fixed, **weights})


TO_ONE_OR_TWO = [node("Min", "wide two", "low"), node("Max", "low one", "m"), node("Sub", "three m", "k")]
"""Of a number at least 2: 1; of one less than that: 2 or 3."""
ONE_TO_THREE = {name: np.array([number]) for name, number in [("one", 1), ("two", 2), ("three", 3)]}


def wrapping(nodes: list[Any], number: int) -> bytes:
    """What is computed from ``a`` in a short type is ``f``."""
    made = [*nodes, cast("f", "wide", TensorProto.INT64), *TO_ONE_OR_TWO]
    return folded(made, {"a": np.array([number]), **ONE_TO_THREE})


WRAPPED = {
    "a product of 32 bits": wrapping([cast("a", "i", TensorProto.INT32), node("Mul", "i i", "f")], 1 << 16),
    "a sum of 8 bits": wrapping([cast("a", "i", TensorProto.INT8), node("Add", "i i", "f")], 100),
    "the least number of 8 bits": wrapping([cast("a", "i", TensorProto.INT8), node("Neg", "i", "f")], -128),
    "a difference below 0 without a sign": folded(
        [
            cast("one", "u", TensorProto.UINT8),
            cast("two", "v", TensorProto.UINT8),
            node("Sub", "u v", "w"),
            cast("w", "wide", TensorProto.INT64),
            node("Min", "wide two", "low"),
            node("Max", "low one", "k"),
        ],
        ONE_TO_THREE,
    ),
    "a whole number that is too long for 16 bits": folded(
        [cast("a", "f", TensorProto.FLOAT16), cast("f", "i", TensorProto.INT64), node("Sub", "more i", "k")],
        {"a": np.array([2049]), "more": np.array([2050])},
    ),
    "a whole number that is too long for BF16": folded(
        [cast("a", "f", TensorProto.BFLOAT16), cast("f", "i", TensorProto.INT64), node("Sub", "more i", "k")],
        {"a": np.array([257]), "more": np.array([258])},
    ),
    "a fraction that is rounded up": folded(
        [cast("a", "f", TensorProto.FLOAT16), cast("f", "k", TensorProto.INT64)], {"a": np.array([1.9999], np.float32)}
    ),
    "rows times much with 32 bits": by_rows(
        [
            cast("b", "i", TensorProto.INT32),
            cast("much", "j", TensorProto.INT32),
            node("Mul", "i j", "p0"),
            node("Mul", "p0 j", "p1"),
            cast("p1", "q", TensorProto.INT64),
            node("Div", "q most", "d"),
            node("Max", "d one", "k"),
        ],
        {"much": np.array([1 << 16]), "most": np.array([1 << 32])},
    ),
    "many rows cut to 32 bits": by_rows(
        [
            node("Mul", "b most", "p0"),
            cast("p0", "p1", TensorProto.INT32),
            cast("p1", "q", TensorProto.INT64),
            node("Div", "q most", "d"),
            node("Max", "d one", "k"),
        ],
        {"most": np.array([1 << 33])},
    ),
    "rows times much with 64 bits": by_rows(
        [node("Mul", "b most", "p0"), node("Div", "p0 most", "d"), node("Max", "d one", "k")],
        {"most": np.array([1 << 62])},
    ),
    "less than no rows, without a sign": by_rows(
        [
            node("Mul", "b less", "p0"),
            cast("p0", "p1", TensorProto.UINT32),
            cast("p1", "q", TensorProto.INT64),
            node("Mul", "q less", "d"),
            node("Max", "d one", "k"),
        ],
        {"less": np.array([-1])},
    ),
    "backwards from before the first": folded(
        [node("Slice", "list start end ax step", "some"), node("Concat", "some one", "both", axis=0), node("Shape", "both", "k")],
        {"list": np.array([7, 8, 9]), "start": np.array([-10]), "end": np.array([LEAST]), "ax": np.array([0]), "step": np.array([-1]), "one": np.array([1])},
    ),
    "backwards in what is not followed": folded(
        [node("Slice", "list start end ax step", "some"), node("Concat", "some one", "both", axis=0), node("Shape", "both", "k")],
        {"list": np.ones(200), "start": np.array([-1000]), "end": np.array([LEAST]), "ax": np.array([0]), "step": np.array([-1]), "one": np.ones(1)},
    ),
    "a size of its own for a picture of the file": folded(
        [
            node("Resize", "picture - - sizes", "larger", mode="nearest", keep_aspect_ratio_policy="not_smaller"),
            node("Shape", "larger", "s"),
            node("Gather", "s three", "k", axis=0),
        ],
        {"picture": np.ones((1, 1, 1, 1)), "sizes": np.array([1, 1, 2, 1]), "three": np.array([3])},
        opset=18,
    ),
    "more columns than the list of columns is long": folded(
        [
            helper.make_node("ArrayFeatureExtractor", ["x", "columns"], ["taken"], domain="ai.onnx.ml"),
            node("Shape", "taken", "s"),
            node("Gather", "s one", "width", axis=0),
            node("Sub", "width one", "k"),
        ],
        {"columns": np.array([[0, 1], [2, 3]]), "one": np.array([1])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRAPPED))
def test_a_number_that_may_be_another_is_not_known(tmp_path: Path, name: str) -> None:
    reason = proof(tmp_path, WRAPPED[name]).reason
    assert "Reshape (output 'r') reshapes" in reason or "derives sizes from one another" in reason


def test_numbers_that_fit_are_known(tmp_path: Path) -> None:
    plain = [
        cast("b", "i", TensorProto.INT32),
        node("Mul", "i n", "j"),
        node("Div", "j n", "l"),
        cast("l", "k", TensorProto.INT64),
    ]
    assert proof(tmp_path, by_rows(plain, {"n": np.array([768], np.int32)})).independent


def referring(**value: int) -> Any:
    made = node("Softmax", "x", "y")
    made.attribute.append(attribute("axis", "along"))
    for name, number in value.items():
        setattr(made.attribute[0], name, number)
    return made


@pytest.mark.parametrize("value", [{}, {"i": 0}])
def test_an_attribute_of_a_function_outside_of_one_is_none(tmp_path: Path, value: dict[str, int]) -> None:
    assert "attribute of a function" in proof(tmp_path, build([referring(**value)])).reason


@pytest.mark.parametrize(("own", "models"), [(13, 12), (17, 11), (11, 17)])
def test_a_function_of_another_operator_set_means_that_of_the_model(tmp_path: Path, own: int, models: int) -> None:
    """Softmax took all axes from the one that it names before operator set 13."""
    made = helper.make_function(
        "own", "Soft", ["a"], ["b"], [node("Softmax", "a", "b", axis=0)], [helper.make_opsetid("", own)]
    )
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]),
        helper.make_node("Soft", ["t"], ["u"], domain="own"),
        node("Transpose", "u", "y", perm=[1, 0, 2]),
    ]
    content = build(nodes, [SEQUENCE], opset=models, functions=[made])
    assert "other operator sets than the model's" in proof(tmp_path, content).reason


@pytest.mark.parametrize("keep", [-1, 2])
def test_a_flag_is_0_or_1(tmp_path: Path, keep: int) -> None:
    """ONNX Runtime drops the axis, and the largest of each row is then taken from every row."""
    nodes = [node("ReduceMax", "x", "most", axes=[-1], keepdims=keep), node("Sub", "x most")]
    assert "neither 0 nor 1" in proof(tmp_path, build(nodes, [("x", "FP32", ("n", 4, 4))])).reason


EMPTY = {
    "squeeze": (
        build([node("Squeeze", "x a", "s"), node("Softmax", "s", axis=-2)], [("x", "FP32", ("n", 1, 3, 4))], weights={"a": NONE}),
        "takes away every axis of size 1",
    ),
    "slice": (
        build([node("Slice", "x b e a s")], weights={"b": np.array([-1]), "e": np.array([LEAST]), "a": NONE, "s": np.array([-1])}),
        "takes some of the rows",
    ),
    "sum": (build([node("ReduceSum", "x a")], weights={"a": NONE}), "across the rows"),
    "pad": (build([node("Pad", "x p - a")], weights={"p": np.array([1, 0, 1, 0]), "a": NONE}, opset=18), "axis of the rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EMPTY))
def test_an_empty_list_of_axes_is_none_given(tmp_path: Path, name: str) -> None:
    content, why = EMPTY[name]
    assert why in proof(tmp_path, content).reason


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_a_constant_has_one_name(tmp_path: Path) -> None:
    """Of two names protobuf takes the last."""
    proto = onnx.load_from_string(build([node("ReduceSum", "x ab")], weights={"ab": np.array([1])}))
    axes = proto.graph.initializer[0]
    axes.ClearField("name")
    stored = axes.SerializeToString() + field(8, b"a") + field(8, b"b")
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString() + field(5, stored)
    proto.ClearField("graph")
    assert "two names" in proof(tmp_path, proto.SerializeToString() + field(7, graph)).reason


def test_a_bias_of_rows_does_not_make_rows(tmp_path: Path) -> None:
    content = build([node("Gemm", "c w x")], weights={"c": np.ones((1, 4)), "w": np.ones((4, 4))})
    assert "joins the rows to a value that has none" in proof(tmp_path, content).reason


def fused(kind: str, inputs: str, **attributes: Any) -> Any:
    made = node(kind, inputs, **attributes)
    made.domain = "com.microsoft"
    return made


TWO = ("x", "FP32", ("n", "t", 4)), ("z", "FP32", ("n", "u", 4))
FUSED = {
    "attention": build([fused("Attention", "x w b", num_heads=2)], [SEQUENCE], weights={"w": np.ones((4, 12)), "b": np.ones(12)}),
    "attention with a mask": build(
        [fused("Attention", "x w b m", num_heads=2)],
        [SEQUENCE, ("m", "INT32", ("n", "t"))],
        weights={"w": np.ones((4, 12)), "b": np.ones(12)},
    ),
    "cross attention": build([fused("MultiHeadAttention", "x z z", num_heads=2)], TWO),
    "skip": build([fused("SkipLayerNormalization", "x x g b c")], [SEQUENCE], weights={name: np.ones(4) for name in "gbc"}),
    "gelu": build([fused("BiasGelu", "x b")], weights={"b": np.ones(4)}),
    "matmul": build([fused("FusedMatMul", "x w", transB=1, alpha=0.5)], weights={"w": np.ones((3, 4))}),
    "convolution": build([fused("FusedConv", "x w", activation=b"Relu")], [("x", "FP32", ("n", 3, 8, 8))], weights={"w": np.ones((5, 3, 3, 3))}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FUSED))
def test_operators_that_onnx_runtime_fuses_keep_rows_apart(tmp_path: Path, name: str) -> None:
    assert proof(tmp_path, FUSED[name]) == (True, "")


@pytest.mark.parametrize("content", [
    build([fused("Attention", "x w b m", num_heads=2)], [SEQUENCE, ("m", "INT32", ("n",))], weights={"w": np.ones((4, 12)), "b": np.ones(12)}),
    build([fused("MultiHeadAttention", "x z z - - p", num_heads=2)], TWO, weights={"p": np.ones((3, 1, 1, 1))}),
    build([fused("SkipLayerNormalization", "x z g")], [SEQUENCE, X], weights={"g": np.ones(4)}),
    build([fused("FusedMatMul", "x w", transA=1)], weights={"w": np.ones((4, 4))}),
])  # fmt: skip
def test_and_where_they_may_not_it_is_told(tmp_path: Path, content: bytes) -> None:
    assert not proof(tmp_path, content).independent
