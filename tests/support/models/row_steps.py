"""The steps of :mod:`support.models.row_graphs`: operators used as exporters use them, and in every other way."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from support.models.row_graphs import ROWS, Draw, Drawn, Step, Unusable, axes_given, some_axis

STEPS: list[Step] = []


def step(function: Step) -> Step:
    STEPS.append(function)
    return function


@step
def unary(found: Drawn, draw: Draw) -> None:
    kind = draw.choice(["Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Identity", "Floor", "Erf", "LeakyRelu", "Sign"])
    found.add(str(kind), [found.pick(draw)])


@step
def with_constant(found: Drawn, draw: Draw) -> None:
    """A constant whose axes are 1 or those of the value, some left out: one may be as long as there are rows."""
    value = found.pick(draw)
    shape = [size if draw.random() < 0.5 else 1 for size in found.values[value].shape][int(draw.integers(0, 2)) :]
    names = [value, found.weight(draw.standard_normal(shape) + 1.5)]
    found.add(str(draw.choice(["Add", "Sub", "Mul", "Max", "Div"])), names if draw.random() < 0.7 else names[::-1])


@step
def pairs(found: Drawn, draw: Draw) -> None:
    found.add(str(draw.choice(["Add", "Sub", "Mul", "Min"])), [found.pick(draw), found.pick(draw)])


@step
def matrix(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 2)
    width = found.values[value].shape[-1 if draw.random() < 0.6 else -2]
    stack = [found.values[value].shape[0]] if draw.random() < 0.2 else []
    weight = found.weight(draw.standard_normal([*stack, width, ROWS if draw.random() < 0.5 else width]))
    found.add("MatMul", [value, weight] if draw.random() < 0.7 else [weight, value])


@step
def matrix_of_values(found: Drawn, draw: Draw) -> None:
    found.add("MatMul", [found.pick(draw, 2), found.pick(draw, 2)])


@step
def gemm(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 2)
    turned = bool(draw.random() < 0.3)
    array = found.values[value].T if turned else found.values[value]
    bias = found.weight(draw.standard_normal([(2,), (ROWS, 2), (1, 2), (1,), (ROWS, 1)][int(draw.integers(5))]))
    weight = found.weight(draw.standard_normal((array.shape[-1], 2)))
    found.add("Gemm", [value, weight, bias], transA=int(turned))


@step
def softmax(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    axis: dict[str, Any] = {} if draw.random() < 0.2 else {"axis": some_axis(draw, found.values[value])}
    found.add(str(draw.choice(["Softmax", "LogSoftmax"])), [value], **axis)


@step
def reduce(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    kind = str(draw.choice(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2"]))
    count = int(draw.integers(0, found.values[value].ndim + 1))
    axes = sorted({some_axis(draw, found.values[value]) % found.values[value].ndim for _ in range(count)})
    more: list[str] = []
    attributes: dict[str, Any] = {"keepdims": int(draw.integers(2))}
    since = 13 if kind == "ReduceSum" else 18
    if axes or draw.random() < 0.5:
        more, named = axes_given(found, axes, since=since)
        attributes |= named if axes else {}
    if found.opset >= since and draw.random() < 0.3:
        attributes["noop_with_empty_axes"] = 1
    found.add(kind, [value, *more], **attributes)


@step
def arg(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    axis: dict[str, Any] = {} if draw.random() < 0.3 else {"axis": some_axis(draw, found.values[value])}
    (index,) = found.add("ArgMax", [value], keepdims=int(draw.integers(2)), **axis)
    found.add("Cast", [index], to=TensorProto.FLOAT)


@step
def top(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    found.add("TopK", [value, found.weight(np.array([1]))], 2, axis=some_axis(draw, found.values[value]))


@step
def running(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    found.add("CumSum", [value, found.weight(np.array(some_axis(draw, found.values[value])))])


@step
def transpose(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 2)
    found.add("Transpose", [value], perm=[int(axis) for axis in draw.permutation(found.values[value].ndim)])


@step
def reshape(found: Drawn, draw: Draw) -> None:
    """To a drawn shape of as many elements, one of them -1, or with zeros for what stays."""
    value = found.pick(draw)
    array = found.values[value]
    left = array.size
    shape: list[int] = []
    while left > 1 and len(shape) < 3:
        size = int(draw.choice([size for size in range(1, left + 1) if left % size == 0]))
        shape.append(size)
        left //= size
    shape = [*shape, left] if left > 1 or not shape else shape
    place = int(draw.integers(len(shape)))
    if draw.random() < 0.7:
        shape[place] = -1
    for axis, size in enumerate(shape):
        if axis < array.ndim and array.shape[axis] == size and draw.random() < 0.5:
            shape[axis] = 0
    found.add("Reshape", [value, found.weight(np.array(shape))])


@step
def reshape_by_rows(found: Drawn, draw: Draw) -> None:
    """With the number of rows taken from a shape, multiplied, and put anywhere."""
    value, of = found.pick(draw, 2), found.pick(draw, 2)
    (shape,) = found.add("Shape", [of])
    (rows,) = found.add("Gather", [shape, found.weight(np.array([int(draw.integers(2))]))])
    if draw.random() < 0.4:
        (rows,) = found.add("Mul", [rows, found.weight(np.array([int(draw.integers(1, 4))]))])
    rest = found.weight(np.array([-1] if draw.random() < 0.6 else [-1, int(draw.integers(1, 4))]))
    (target,) = found.add("Concat", [rows, rest] if draw.random() < 0.7 else [rest, rows], axis=0)
    found.add("Reshape", [value, target])


@step
def flatten(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    found.add("Flatten", [value], axis=some_axis(draw, found.values[value]))


@step
def squeeze(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    ones = [axis for axis, size in enumerate(found.values[value].shape) if size == 1]
    if ones and draw.random() < 0.8:
        more, named = axes_given(found, [int(draw.choice(ones))], since=13)
        found.add("Squeeze", [value, *more], **named)
    else:
        found.add("Squeeze", [value])


@step
def unsqueeze(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    more, named = axes_given(found, [int(draw.integers(0, found.values[value].ndim + 1))], since=13)
    found.add("Unsqueeze", [value, *more], **named)


@step
def concat(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    other = found.pick(draw) if draw.random() < 0.7 else found.weight(draw.standard_normal(found.values[value].shape))
    found.add("Concat", [value, other], axis=some_axis(draw, found.values[value]))


@step
def split(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    axis = some_axis(draw, found.values[value])
    size = found.values[value].shape[axis]
    if size < 2 or found.opset >= 18:
        raise Unusable
    sizes = [1, size - 1]
    if found.opset >= 13:
        found.add("Split", [value, found.weight(np.array(sizes))], 2, axis=axis)
    else:
        found.add("Split", [value], 2, axis=axis, split=sizes)


@step
def slice_(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    bounds = [
        np.array([int(draw.integers(-3, 3))]),
        np.array([int(draw.choice([-1, 1, 2, 3, 4, 1 << 62, -(1 << 62)]))]),
    ]
    bounds += [np.array([some_axis(draw, found.values[value])]), np.array([int(draw.choice([1, 1, 2, -1]))])]
    found.add("Slice", [value, *[found.weight(bound) for bound in bounds[: int(draw.integers(2, 5))]]])


@step
def gather(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    axis = some_axis(draw, found.values[value])
    size = found.values[value].shape[axis]
    index = draw.integers(-size, size, [(), (1,), (2,), (ROWS,)][int(draw.integers(4))])
    found.add("Gather", [value, found.weight(index)], axis=axis)


@step
def lookup(found: Drawn, draw: Draw) -> None:
    """Of a table, by whole numbers made from a value."""
    (clipped,) = found.add("Sigmoid", [found.pick(draw)])
    (index,) = found.add("Cast", [clipped], to=TensorProto.INT64)
    table = found.weight(draw.standard_normal((2, ROWS))) if draw.random() < 0.6 else found.pick(draw)
    found.add("Gather", [table, index], axis=0)


@step
def gather_elements(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    (clipped,) = found.add("Sigmoid", [found.pick(draw)])
    (index,) = found.add("Cast", [clipped], to=TensorProto.INT64)
    found.add("GatherElements", [value, index], axis=some_axis(draw, found.values[value]))


@step
def pad(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    amounts = [int(amount) for amount in draw.integers(0, 2, 2 * found.values[value].ndim)]
    found.add("Pad", [value, found.weight(np.array(amounts))], mode=str(draw.choice(["constant", "edge"])))


@step
def tile(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    found.add("Tile", [value, found.weight(draw.integers(1, 3, found.values[value].ndim))])


@step
def expand(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    shape = [int(draw.choice([1, size, ROWS])) for size in found.values[value].shape]
    found.add("Expand", [value, found.weight(np.array([ROWS, *shape] if draw.random() < 0.3 else shape))])


@step
def expand_by_shape(found: Drawn, draw: Draw) -> None:
    value, of = found.pick(draw), found.pick(draw)
    (shape,) = found.add("Shape", [of])
    found.add("Expand", [value if draw.random() < 0.5 else found.weight(draw.standard_normal((1, 1))), shape])


@step
def divided_by_rows(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    (shape,) = found.add("Shape", [value])
    (size,) = found.add("Gather", [shape, found.weight(np.array(some_axis(draw, found.values[value])))], axis=0)
    (number,) = found.add("Cast", [size], to=TensorProto.FLOAT)
    found.add("Div", [value, number])


@step
def zeros_like(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    (shape,) = found.add("Shape", [value])
    (zeros,) = found.add("ConstantOfShape", [shape])
    found.add("Concat", [value, zeros], axis=some_axis(draw, found.values[value]))


@step
def where(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    (go,) = found.add("Greater", [value, found.weight(np.float32(0.1))])
    found.add("Where", [go, value, found.pick(draw) if draw.random() < 0.5 else found.weight(np.float32(7))])


@step
def batch_norm(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 2)
    size = found.values[value].shape[1]
    weights = [found.weight(draw.random(size) + 0.5) for _ in range(4)]
    found.add("BatchNormalization", [value, *weights])


@step
def layer_norm(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    array = found.values[value]
    axis = some_axis(draw, array)
    if found.opset < 17:
        raise Unusable
    found.add("LayerNormalization", [value, found.weight(draw.random(array.shape[axis:]))], axis=axis, epsilon=0.1)


@step
def convolution(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 3)
    array = found.values[value]
    weight = found.weight(draw.standard_normal((2, array.shape[1], *[1] * (array.ndim - 2))))
    found.add("Conv", [value, weight])


@step
def pooling(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 3)
    kernel = [min(2, size) for size in found.values[value].shape[2:]]
    found.add(str(draw.choice(["MaxPool", "AveragePool"])), [value], kernel_shape=kernel)


@step
def instance_norm(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 3)
    size = found.values[value].shape[1]
    found.add("InstanceNormalization", [value, *[found.weight(draw.random(size) + 0.5) for _ in "ab"]], epsilon=0.1)


@step
def global_pooling(found: Drawn, draw: Draw) -> None:
    found.add("GlobalAveragePool", [found.pick(draw, 3)])


@step
def recurrent(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 3)
    array = found.values[value]
    if array.ndim != 3:
        raise Unusable
    weights = [
        found.weight(draw.standard_normal((1, 6, array.shape[2]))),
        found.weight(draw.standard_normal((1, 6, 2))),
    ]
    start = ["", "", found.weight(draw.standard_normal((1, array.shape[1], 2)))] if draw.random() < 0.3 else []
    found.add("GRU", [value, *weights, *start], 2, hidden_size=2)


@step
def quantised(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    if draw.random() < 0.5:
        whole, scale, zero = found.add("DynamicQuantizeLinear", [value], 3)
        found.add("DequantizeLinear", [whole, scale, zero])
        return
    axis = some_axis(draw, found.values[value])
    shape = () if draw.random() < 0.6 or found.opset < 13 else (found.values[value].shape[axis],)
    scale, zero = found.weight(draw.random(shape) + 0.1), found.weight(np.zeros(shape, np.uint8))
    named: dict[str, Any] = {"axis": axis} if shape else {}
    (whole,) = found.add("QuantizeLinear", [value, scale, zero], **named)
    found.add("DequantizeLinear", [whole, scale, zero], **named)


@step
def einsum(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 2)
    if found.opset < 12 or found.values[value].ndim != 2:
        raise Unusable
    equation = str(
        draw.choice(["ij,jk->ik", "ij,kj->ik", "ij,ij->ij", "ij,ij->i", "ij,ij->j", "ij,jk->ki", "ij,kj->kj"])
    )
    other = (
        found.pick(draw, 2)
        if draw.random() < 0.6
        else found.weight(draw.standard_normal(found.values[value].shape[::-1]))
    )
    found.add("Einsum", [value, other], equation=equation)


@step
def compress(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw)
    axis = some_axis(draw, found.values[value])
    keep = draw.integers(0, 2, found.values[value].shape[axis]).astype(bool)
    found.add("Compress", [value, found.weight(keep)], axis=axis)


@step
def triangle(found: Drawn, draw: Draw) -> None:
    if found.opset < 14:
        raise Unusable
    found.add("Trilu", [found.pick(draw, 2)])


@step
def resize(found: Drawn, draw: Draw) -> None:
    value = found.pick(draw, 2)
    scales = [float(draw.choice([1, 1, 2])) for _ in found.values[value].shape]
    mode = str(draw.choice(["nearest", "linear"]))
    coordinates = str(
        draw.choice(
            ["half_pixel", "asymmetric", "align_corners", "tf_half_pixel_for_nn"][: 4 if found.opset < 13 else 3]
        )
    )
    found.add(
        "Resize", [value, found.weight(np.zeros(0, np.float32)), found.weight(np.array(scales, np.float32))],
        mode=mode, coordinate_transformation_mode=coordinates,
    )  # fmt: skip
