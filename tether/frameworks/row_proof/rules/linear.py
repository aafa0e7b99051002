"""Rules for matrix products, convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    MICROSOFT,
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    Rows,
    batch_first,
    broadcast,
    fact,
    flag,
    given,
    needed,
    onto,
    rest_uniform,
    rule,
    text,
    whole,
    wholes,
)
from tether.frameworks.row_proof.sizes import ONE, Algebra, Size


def multiplied(a: Fact, b: Fact, algebra: Algebra) -> Fact:
    """Return the matrix product, as ``numpy.matmul``.

    Raises:
        Mixes: it sums over the rows, or pairs each row with every other.
    """
    if a.shape is None or b.shape is None:
        if a.rows is not None or b.rows is not None:
            raise Mixes("multiplies the rows by a value whose shape is not known")
        return UNKNOWN
    if not a.rank or not b.rank or (a.rank == 1 and a.rows) or (b.rank == 1 and b.rows):
        raise Mixes("sums over the rows")
    left = Fact((ONE, *a.dims), None) if a.rank == 1 else a
    right = Fact((*b.dims, ONE), None) if b.rank == 1 else b
    rank = max(left.rank, right.rank)
    kept = [
        *_kept(left, left.rank - 2, left.rank - 1, rank - 2),
        *_kept(right, right.rank - 1, right.rank - 2, rank - 1),
    ]
    stacked = broadcast([_stack(left), _stack(right)], algebra)
    if stacked.rows is not None:
        kept.append(stacked.rows)
    if len(kept) > 1:
        raise Mixes("pairs each row with every other")
    rows = kept[0] if kept else None
    shape = [*stacked.dims, left.dims[-2], right.dims[-1]]
    if a.rank == 1:
        del shape[-2]
        rows = rows and rows._replace(axis=rows.axis - (rows.axis == rank - 1))
    if b.rank == 1:
        del shape[-1]
    return fact(shape, rows)


def _kept(value: Fact, kept: int, summed: int, place: int) -> list[Rows]:
    """Return the row axis of the result for an operand with the rows on its own kept axis."""
    if value.rows is None:
        return []
    if value.rows.axis == summed:
        raise Mixes("sums over the rows")
    return [value.rows._replace(axis=place)] if value.rows.axis == kept else []


def _stack(value: Fact) -> Fact:
    """Return the axes before the matrices."""
    rows = value.rows if value.rows is not None and value.rows.axis < value.rank - 2 else None
    return Fact(value.dims[:-2], rows)


def swapped(value: Fact) -> Fact:
    """Return the value with its last two axes exchanged."""
    if value.shape is None:
        return value
    if value.rank < 2:
        raise Mixes("turns a value that is no matrix")
    first, second = value.rank - 2, value.rank - 1
    rows = value.rows
    if rows is not None and rows.axis >= first:
        rows = rows._replace(axis=second if rows.axis == first else first)
    return Fact((*value.dims[:-2], value.dims[-1], value.dims[-2]), rows)


@rule("MatMul")
def matmul(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    return [multiplied(needed(inputs, 0), needed(inputs, 1), context.algebra)]


@rule("FusedMatMul", domain=MICROSOFT)
def fused_matmul(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    if flag(node, "transBatchA") or flag(node, "transBatchB"):
        raise Mixes("turns the axes before the matrices")
    a, b = needed(inputs, 0), needed(inputs, 1)
    a, b = swapped(a) if flag(node, "transA") else a, swapped(b) if flag(node, "transB") else b
    return [multiplied(a, b, context.algebra)]


@rule("Gemm")
def gemm(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    a, b = needed(inputs, 0), needed(inputs, 1)
    a, b = swapped(a) if flag(node, "transA") else a, swapped(b) if flag(node, "transB") else b
    found = multiplied(a, b, context.algebra)
    bias = given(inputs, 2)
    return [found if bias is None else onto(found, bias, context.algebra)]


@rule("Conv")
@rule("FusedConv", domain=MICROSOFT)
def conv(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value, weights = needed(inputs, 0), needed(inputs, 1)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN]
    batch_first(value)
    kernel = [Size(size) for size in wholes(node, "kernel_shape") or ()]
    channels = context.size("channels")
    if weights.shape is not None:
        kernel = kernel or list(weights.dims[2:])
        channels = weights.dims[0]
    return [fact([value.dims[0], channels, *windows(node, value, kernel, context)], value.rows)]


@rule("ConvTranspose")
def conv_transpose(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value, weights = needed(inputs, 0), needed(inputs, 1)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN]
    batch_first(value)
    channels = context.size("channels")
    if weights.shape is not None and weights.rank > 1:
        per_group, groups = weights.dims[1], whole(node, "group", 1)
        channels = Size(per_group.factor * groups) if per_group.constant else channels
    spatial = [context.size(axis) for axis in range(2, value.rank)]
    return [fact([value.dims[0], channels, *spatial], value.rows)]


@rule("AveragePool", "MaxPool", "LpPool")
def pool(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN] * len(node.outputs)
    batch_first(value, (0, 1))
    if len([name for name in node.outputs if name]) > 1:
        raise Mixes("counts elements of all rows together in its second output")
    kernel = [Size(size) for size in wholes(node, "kernel_shape") or ()]
    return [fact([*value.dims[:2], *windows(node, value, kernel, context)], value.rows)]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN]
    batch_first(value, (0, 1))
    return [fact([*value.dims[:2], *[ONE] * (value.rank - 2)], value.rows)]


def windows(node: Node, value: Fact, kernel: Sequence[Size], context: Context) -> list[Size]:
    """Return sizes of the axes from the third on after a sliding window; symbols if unknown."""
    found = []
    count = value.rank - 2
    for index, size in enumerate(value.dims[2:]):
        known = _window(node, size, kernel[index], index, count) if len(kernel) == count else None
        found.append(known or context.size(index))
    return found


def _window(node: Node, size: Size, kernel: Size, index: int, count: int) -> Size | None:
    lists = {name: wholes(node, name) for name in ("strides", "dilations", "pads")}
    strides, dilations = lists["strides"] or [1] * count, lists["dilations"] or [1] * count
    pads = lists["pads"] or [0] * (2 * count)
    if len(strides) != count or len(dilations) != count or len(pads) != 2 * count:
        return None
    if not (size.constant and kernel.constant) or flag(node, "ceil_mode") or strides[index] < 1:
        return None
    mode = text(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return Size(-(-size.factor // strides[index]))
    if mode == "VALID":
        pads = [0] * (2 * count)
    elif mode != "NOTSET":
        return None
    span = dilations[index] * (kernel.factor - 1) + 1
    left = size.factor + pads[index] + pads[index + count] - span
    return Size(left // strides[index] + 1) if left >= 0 else None
