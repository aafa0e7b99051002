"""Models whose rows depend on one another, which trial runs with a few benign rows do not show."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from support.models.graphs import Spec, build, node

_X: Spec = ("x", "FP32", ("n", 3))


def cross_section() -> bytes:
    """Steps less their mean over rows: with one step there is nothing to compare."""
    nodes = [
        node("Slice", "x one end ax", "later"),
        node("Slice", "x zero last ax", "earlier"),
        node("Sub", "later earlier", "r"),
        node("ReduceMean", "r", "m", axes=[0]),
        node("Sub", "r m", "y"),
    ]
    weights = {
        name: np.array([value]) for name, value in [("one", 1), ("end", 1 << 62), ("ax", 1), ("zero", 0), ("last", -1)]
    }
    return build(nodes, [("x", "FP32", ("n", "t"))], [("y", "FP32", ("n", "u"))], weights)


def batch_statistics() -> bytes:
    """A network that was exported in training mode, for images of at least 9 x 9."""
    nodes = [
        node("Conv", "image w", "h"),
        node("ReduceMean", "h", "m", axes=[0, 2, 3]),
        node("Sub", "h m", "d"),
        node("Mul", "d d", "q"),
        node("ReduceMean", "q", "v", axes=[0, 2, 3]),
        node("Add", "v eps", "e"),
        node("Sqrt", "e", "s"),
        node("Div", "d s", "n"),
        node("Relu", "n", "r"),
        node("ReduceMean", "r", "y", axes=[2, 3], keepdims=0),
    ]
    draw = np.random.default_rng(0)
    weights = {"w": draw.standard_normal((4, 3, 9, 9)).astype(np.float32), "eps": 1e-5}
    return build(nodes, [("image", "FP32", ("n", 3, "h", "w0"))], [("y", "FP32", ("n", 4))], weights)


def centred(scale: float = 1e-4) -> bytes:
    """Rows less their mean, in small numbers."""
    nodes = [node("ReduceMean", "x", "m", axes=[0]), node("Sub", "x m", "d"), node("Mul", "d c", "y")]
    return build(nodes, [_X], [("y", "FP32", ("n", 3))], {"c": scale})


def centred_bf16() -> bytes:
    nodes = [
        node("Cast", "x", "f", to=TensorProto.FLOAT),
        node("ReduceMean", "f", "m", axes=[0]),
        node("Sub", "f m", "d"),
        node("Cast", "d", "y", to=TensorProto.BFLOAT16),
    ]
    return build(nodes, [("x", "BF16", ("n", 2))], [("y", "BF16", ("n", 2))])


def outlier_scale() -> bytes:
    """Divided by the largest number of all rows, or 255 if that is larger."""
    nodes = [
        node("Abs", "x", "a"),
        node("ReduceMax", "a", "m", axes=[0, 1]),
        node("Max", "m c", "d"),
        node("Div", "x d", "y"),
    ]
    return build(nodes, [_X], [("y", "FP32", ("n", 3))], {"c": 255.0})


def detector() -> bytes:
    """Boxes that are kept, of all images in one list."""
    nodes = [
        node("NonMaxSuppression", "boxes scores most iou least", "chosen", name="nms"),
        node("Gather", "chosen columns", "where", axis=1),
        node("GatherND", "boxes where", "kept"),
    ]
    weights = {"most": np.array([10]), "iou": np.array([0.5]), "least": np.array([0.25]), "columns": np.array([0, 2])}
    inputs: list[Spec] = [("boxes", "FP32", ("n", "k", 4)), ("scores", "FP32", ("n", 1, "k"))]
    return build(nodes, inputs, [("kept", "FP32", ("d", 4))], weights)


def compressed() -> bytes:
    """Rows whose first number is positive."""
    nodes = [
        node("Slice", "x zero one ax", "first"),
        node("Squeeze", "first ax", "f"),
        node("Greater", "f level", "keep"),
        node("Compress", "x keep", "y", axis=0),
    ]
    weights = {"zero": np.array([0]), "one": np.array([1]), "ax": np.array([1]), "level": 0.0}
    return build(nodes, [_X], [("y", "FP32", ("m", 3))], weights)


def dynamic_quantisation() -> bytes:
    nodes = [node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z")]
    return build(nodes, [_X], [("y", "FP32", ("n", 3))])


def two_first_axes() -> bytes:
    """Every row of one input by every row of the other."""
    nodes = [node("Transpose", "z", "t"), node("MatMul", "x t")]
    return build(nodes, [_X, ("z", "FP32", ("m", 3))], [("y", "FP32", ("n", "m"))])


def longest_text() -> bytes:
    """Texts in parts, filled up to as many as the longest has."""
    nodes = [node("StringSplit", "x", "y c", delimiter=" ")]
    return build(nodes, [("x", "BYTES", ("n",))], [("y", "BYTES", ("n", "m"))], opset=20)


def differences() -> bytes:
    """Each row less the one before it."""
    nodes = [
        node("Slice", "x zero last ax", "rest"),
        node("Pad", "rest pads", "before"),
        node("Sub", "x before", "y"),
    ]
    weights = {"zero": np.array([0]), "last": np.array([-1]), "ax": np.array([0]), "pads": np.array([1, 0, 0, 0])}
    return build(nodes, [_X], [("y", "FP32", ("n", 3))], weights)


MODELS = {
    "cross-section": (cross_section(), "operator ReduceMean (output 'm') works across the rows", True),
    "batch statistics": (batch_statistics(), "operator ReduceMean (output 'm') works across the rows", True),
    "small outputs": (centred(), "operator ReduceMean (output 'm') works across the rows", True),
    "BF16": (centred_bf16(), "operator ReduceMean (output 'm') works across the rows", True),
    "outlier": (outlier_scale(), "operator ReduceMax (output 'm') works across the rows", True),
    "detector": (detector(), "operator NonMaxSuppression (node 'nms') lists boxes of all rows together", True),
    "compressed": (compressed(), "operator Compress (output 'y') keeps as many rows as it likes", True),
    "dynamic quantisation": (
        dynamic_quantisation(),
        "operator DynamicQuantizeLinear (output 'q') takes one scale",
        True,
    ),
    "two first axes": (two_first_axes(), "have first axes of different names", True),
    "texts": (longest_text(), "operator StringSplit (output 'y') may mix rows", True),
    "differences": (differences(), "operator Slice (output 'rest') takes some of the rows", True),
}
"""A file, why it is not batched, and whether trial runs show it too."""
