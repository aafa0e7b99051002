"""Rules for operators that look elements up by index."""

from __future__ import annotations

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    axis_of,
    fact,
    needed,
    rule,
    same_rows,
    whole,
)


@rule("Gather")
def gather(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    data, indices = needed(inputs, 0), needed(inputs, 1)
    if data.shape is None or indices.shape is None:
        if data.rows is not None or indices.rows is not None:
            raise Mixes("looks rows up where a shape is not known")
        return [UNKNOWN]
    axis = axis_of(whole(node, "axis", 0), data.rank)
    shape = [*data.dims[:axis], *indices.dims, *data.dims[axis + 1 :]]
    if data.rows is not None and indices.rows is not None:
        raise Mixes("looks up elements of other rows")
    rows = indices.rows and indices.rows._replace(axis=axis + indices.rows.axis)
    if data.rows is not None:
        if data.rows.axis == axis:
            raise Mixes("takes some of the rows")
        rows = data.rows._replace(axis=data.rows.axis + (indices.rank - 1 if data.rows.axis > axis else 0))
    return [fact(shape, rows)]


@rule("GatherElements", since=11)
def gather_elements(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    data, indices = needed(inputs, 0), needed(inputs, 1)
    if data.shape is None and indices.rows is None:
        return [UNKNOWN]
    axis = axis_of(whole(node, "axis", 0), data.rank)
    rows = same_rows([data, indices])
    if data.rank != indices.rank or (rows is not None and rows.axis == axis):
        raise Mixes("looks up elements of other rows")
    return [Fact(indices.shape, rows)]


@rule("ScatterElements", since=11)
def scatter_elements(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    values = [needed(inputs, index) for index in range(3)]
    if all(one.rows is None for one in values):
        return [Fact(values[0].shape)]
    axis = axis_of(whole(node, "axis", 0), values[0].rank)
    rows = same_rows(values)
    if len({one.rank for one in values}) != 1 or (rows is not None and rows.axis == axis):
        raise Mixes("writes to other rows")
    return [Fact(values[0].shape, rows)]


@rule("GatherND", since=11)
def gather_nd(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    data, indices = needed(inputs, 0), needed(inputs, 1)
    leading = whole(node, "batch_dims", 0) if context.opset >= 12 else 0
    if data.rows is None and indices.rows is None:
        return [UNKNOWN]
    last = indices.dims[-1] if indices.dims else None
    if last is None or not last.constant or leading < 0 or leading + last.factor > data.rank:
        raise Mixes("looks up elements of rows that are not known")
    shape = [*indices.dims[:-1], *data.dims[leading + last.factor :]]
    rows = indices.rows
    if rows is None or rows.axis == indices.rank - 1:
        raise Mixes("looks up elements of other rows")
    if data.rows is not None and (data.rows != rows or rows.axis >= leading):
        raise Mixes("looks up elements of other rows")
    if data.rows is None and rows.axis < leading:
        raise Mixes("looks up elements of other rows")
    return [fact(shape, rows)]
