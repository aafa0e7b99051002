"""Rules for operators on whole axes: normalisation, reduction, softmax, sorting, cumulative sums."""

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
    axes_given,
    axis_of,
    batch_first,
    broadcast,
    fact,
    flag,
    given,
    needed,
    numbers,
    onto,
    rest_uniform,
    rule,
    uniform,
    whole,
)
from tether.frameworks.row_proof.rules.shape import without_axes
from tether.frameworks.row_proof.sizes import ONE, Size

OVER_ROWS = "works across the rows"


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Softmax; before operator set 13 all axes from ``axis`` on are one."""
    value = needed(inputs, 0)
    if value.rows is not None:
        new = context.opset >= 13
        axis = axis_of(whole(node, "axis", -1 if new else 1), value.rank)
        away_from_rows(value, [axis] if new else range(axis, value.rank), OVER_ROWS)
    return [Fact(value.shape, value.rows)]


_AXES_AS_INPUT = {"ReduceSum": 13}


@rule(
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
def reduce(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN]
    axes = axes_given(node, inputs, 1, as_input=context.opset >= _AXES_AS_INPUT.get(node.kind, 18))
    if not axes:
        if flag(node, "noop_with_empty_axes"):
            return [Fact(value.shape, value.rows)]
        axes = list(range(value.rank))
    return [reduced(value, {axis_of(axis, value.rank) for axis in axes}, keep=flag(node, "keepdims", default=True))]


def reduced(value: Fact, axes: set[int], *, keep: bool) -> Fact:
    away_from_rows(value, axes, OVER_ROWS)
    if not keep:
        return without_axes(value, axes)
    return Fact(tuple(ONE if axis in axes else size for axis, size in enumerate(value.dims)), value.rows)


@rule("ArgMax", "ArgMin")
def arg_max(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN]
    axis = axis_of(whole(node, "axis", 0), value.rank)
    return [reduced(value, {axis}, keep=flag(node, "keepdims", default=True))]


@rule("TopK")
def top_k(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN] * 2
    axis = axis_of(whole(node, "axis", -1), value.rank)
    away_from_rows(value, [axis], OVER_ROWS)
    count = [whole(node, "k", -1)] if context.opset < 10 else numbers(needed(inputs, 1))
    size = Size(count[0]) if count and count[0] > 0 else context.size("k")
    return [fact([*value.dims[:axis], size, *value.dims[axis + 1 :]], value.rows)] * 2


@rule("CumSum", "CumProd", since=11)
def cumulated(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.rows is not None:
        axes = numbers(needed(inputs, 1))
        if axes is None or len(axes) != 1:
            raise Mixes("works along an axis that is computed")
        away_from_rows(value, [axis_of(axes[0], value.rank)], OVER_ROWS)
    return [Fact(value.shape, value.rows)]


@rule("BatchNormalization", since=9)
def batch_normalization(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if flag(node, "training_mode") or any(node.outputs[1:]):
        raise Mixes("takes the mean over all rows, because it was exported in training mode")
    if value.rows is not None:
        away_from_rows(value, [1], OVER_ROWS)
        if value.rank < 2:
            raise Mixes(OVER_ROWS)
    return [Fact(value.shape, value.rows)]


@rule("InstanceNormalization", "GroupNormalization", "LRN")
def instance_normalization(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    batch_first(value)
    return [Fact(value.shape, value.rows)]


@rule("LpNormalization")
def lp_normalization(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.rows is not None:
        away_from_rows(value, [axis_of(whole(node, "axis", -1), value.rank)], OVER_ROWS)
    return [Fact(value.shape, value.rows)]


@rule("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.rows is not None:
        axes = axes_given(node, inputs, 1, as_input=False) or [0, 2, 3]
        away_from_rows(value, [axis_of(axis, value.rank) for axis in axes], OVER_ROWS)
    return [Fact(value.shape, value.rows)]


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
@rule("LayerNormalization", "SimplifiedLayerNormalization", domain=MICROSOFT)
def layer_normalization(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.rows is None:
        return [UNKNOWN if value.shape is None else Fact(value.shape)] + [UNKNOWN] * 2
    axis = axis_of(whole(node, "axis", -1), value.rank)
    away_from_rows(value, range(axis, value.rank), OVER_ROWS)
    found = broadcast([value, *(one for one in inputs[1:] if one is not None)], context.algebra)
    if found.rank != value.rank:
        raise Mixes("scales by more axes than there are")
    means = Fact(tuple(ONE if place >= axis else size for place, size in enumerate(value.dims)), value.rows)
    return [found, means, means]


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Normalise the sum of the first two inputs over the last axis; weights are lists, the fourth output is the sum."""
    rest_uniform(inputs, 2)
    total = onto(needed(inputs, 0), needed(inputs, 1), context.algebra)
    if total.rows is None:
        return [UNKNOWN] * len(node.outputs)
    away_from_rows(total, [total.rank - 1], OVER_ROWS)
    for index in range(2, len(inputs)):
        weights = given(inputs, index)
        if weights is not None and weights.rank != 1:
            raise Mixes("scales by more than one axis")
    means = Fact((*total.dims[:-1], ONE), total.rows)
    return [total, means, means, total]


@rule("ReverseSequence", since=10)
def reverse_sequence(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value, lengths = needed(inputs, 0), needed(inputs, 1)
    batch, time = whole(node, "batch_axis", 1), whole(node, "time_axis", 0)
    if value.rows is None:
        uniform(inputs, 1)
        return [Fact(value.shape)]
    if value.rows.axis != batch or time == batch:
        raise Mixes(OVER_ROWS)
    if lengths.rows is None or lengths.rows != value.rows._replace(axis=0):
        raise Mixes("has lengths that are not those of the rows")
    return [Fact(value.shape, value.rows)]
