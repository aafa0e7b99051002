"""Rules for operators on single elements, or on aligned elements."""

from __future__ import annotations

import numpy as np

from tether.frameworks.onnx.model import MAX_VALUES, Constant, Node
from tether.frameworks.row_proof.facts import (
    MICROSOFT,
    Context,
    Fact,
    Inputs,
    Mixes,
    broadcast,
    constant,
    elements,
    given,
    needed,
    numbers,
    onto,
    rest_uniform,
    rule,
    whole,
)
from tether.frameworks.row_proof.sizes import ONE, Size


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg",
    "Not", "Reciprocal", "RegexFullMatch", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Cast", "BitCast",
)  # fmt: skip
@rule("Gelu", "QuickGelu", domain=MICROSOFT)
def unary(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    return [Fact(value.shape, value.rows)]


@rule(
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "StringConcat", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
def several(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    return [broadcast([one for one in inputs if one is not None], context.algebra)]


@rule("PRelu")
@rule("BiasGelu", "FastGelu", domain=MICROSOFT)
def with_slope(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value, other = needed(inputs, 0), given(inputs, 1)
    return [value if other is None else onto(value, other, context.algebra)]


@rule("CastLike")
def cast_like(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    return unary(node, inputs, context)


@rule("Clip")
def clip(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    rest_uniform(inputs)
    for index in (1, 2):
        bound = given(inputs, index)
        if bound is not None and not bound.scalar():
            raise Mixes("has a bound that is not one number")
    return unary(node, inputs, context)


@rule("Dropout")
def dropout(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    training = given(inputs, 2)
    if training is not None and numbers(training) != [0]:
        raise Mixes("may drop elements at random")
    return unary(node, inputs, context) * 2


@rule("Constant")
def constant_node(node: Node, _inputs: Inputs, _context: Context) -> list[Fact]:
    for name, value in node.attributes.items():
        if name == "value" and isinstance(value, Constant):
            return [constant(value)]
        if name == "value_int" and isinstance(value, int):
            return [Fact((), None, elements(np.array(value)))]
        if name == "value_float" and isinstance(value, float):
            return [Fact((), None, elements(np.array(value)))]
        if name in ("value_ints", "value_floats", "value_strings") and isinstance(value, list):
            shape = (Size(len(value)),)
            plain = name == "value_strings" or not value or len(value) > MAX_VALUES
            return [Fact(shape) if plain else Fact(shape, None, elements(np.array(value)))]
        if name == "value_string":
            return [Fact(())]
    return [Fact(None)]


@rule("OneHot", since=9)
def one_hot(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    rest_uniform(inputs)
    indices = needed(inputs, 0)
    depth = numbers(needed(inputs, 1))
    size = Size(depth[0]) if depth and depth[0] > 0 else context.size("depth")
    return [with_new_axis(indices, whole(node, "axis", -1), size)]


def with_new_axis(value: Fact, axis: int, size: Size = ONE) -> Fact:
    """Return a value with one more axis, at a position counted in the result."""
    rank = value.rank + 1
    if not -rank <= axis < rank:
        raise Mixes(f"makes an axis {axis} of {rank}")
    place = axis % rank
    shape = (*value.dims[:place], size, *value.dims[place:])
    rows = value.rows
    if rows is not None and rows.axis >= place:
        rows = rows._replace(axis=rows.axis + 1)
    return Fact(shape, rows)
