"""Rules for quantised numbers with constant scales. A scale computed from the values mixes rows."""

from __future__ import annotations

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    MICROSOFT,
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    away_from_rows,
    axis_of,
    batch_first,
    broadcast,
    fact,
    given,
    needed,
    rest_uniform,
    rule,
    uniform,
    whole,
)
from tether.frameworks.row_proof.rules.linear import multiplied, windows
from tether.frameworks.row_proof.rules.norm import OVER_ROWS


def one_number(inputs: Inputs, *indices: int) -> None:
    """Raise unless these inputs are omitted or one constant for all elements."""
    uniform(inputs, *indices)
    for index in indices:
        found = given(inputs, index)
        if found is not None and not found.scalar():
            raise Mixes("has a scale for each part of an axis")


@rule("QuantizeLinear", "DequantizeLinear", since=10)
@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def quantize_linear(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.rows is not None and not needed(inputs, 1).scalar():
        if whole(node, "block_size", 0) or needed(inputs, 1).rank != 1:
            raise Mixes("has scales for blocks of elements")
        away_from_rows(value, [axis_of(whole(node, "axis", 1), value.rank)], "has a scale for each row")
    return [Fact(value.shape, value.rows)]


@rule("MatMulInteger", since=10)
def matmul_integer(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    one_number(inputs, 2)
    uniform(inputs, 3)
    if needed(inputs, 1).rows is not None:
        one_number(inputs, 3)
    return [multiplied(needed(inputs, 0), needed(inputs, 1), context.algebra)]


@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    one_number(inputs, 2, 4)
    rest_uniform(inputs)
    bias = given(inputs, 6)
    if bias is not None and bias.rank != 1:
        raise Mixes("adds more than one value to each column")
    return [multiplied(needed(inputs, 0), needed(inputs, 1), context.algebra)]


@rule("QLinearMatMul", since=10)
def qlinear_matmul(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    one_number(inputs, 1, 2, 6, 7)
    uniform(inputs, 4, 5)
    if needed(inputs, 3).rows is not None:
        one_number(inputs, 4, 5)
    return [multiplied(needed(inputs, 0), needed(inputs, 3), context.algebra)]


@rule("QLinearConv", "ConvInteger", since=10)
def qlinear_conv(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value, weights = needed(inputs, 0), needed(inputs, 3 if node.kind == "QLinearConv" else 1)
    rest_uniform(inputs)
    one_number(inputs, *((1, 2, 6, 7) if node.kind == "QLinearConv" else (2,)))
    if value.shape is None or weights.shape is None:
        if value.rows is None:
            return [UNKNOWN]
        raise Mixes("has weights whose shape is not known")
    batch_first(value)
    return [fact([value.dims[0], weights.dims[0], *windows(node, value, list(weights.dims[2:]), context)], value.rows)]


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_elementwise(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    one_number(inputs, 1, 2, 4, 5, 6, 7)
    return [broadcast([needed(inputs, 0), needed(inputs, 3)], context.algebra)]


@rule("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_unary(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    one_number(inputs, 1, 2, 3, 4)
    return [Fact(value.shape, value.rows)]


@rule("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    one_number(inputs, 1, 2, 3, 4)
    if value.rows is not None:
        axis = axis_of(whole(node, "axis", -1), value.rank)
        away_from_rows(value, range(axis, value.rank), OVER_ROWS)
    return [Fact(value.shape, value.rows)]
