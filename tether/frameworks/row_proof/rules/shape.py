"""Rules for operators that reshape or repeat elements."""

from __future__ import annotations

from collections.abc import Sequence

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    Rows,
    axes_given,
    axis_of,
    fact,
    flag,
    needed,
    numbers,
    product,
    rule,
    same_rows,
    uniform,
    whole,
    wholes,
)
from tether.frameworks.row_proof.rules.elementwise import with_new_axis
from tether.frameworks.row_proof.sizes import BATCH, ONE, ROWS, Element, Size, depends, over


@rule("Reshape", sizes=(1,))
def reshape(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value, target = needed(inputs, 0), needed(inputs, 1)
    uniform(inputs, 1)
    if target.content is None or target.content.ndim != 1:
        if value.rows is None:
            return [UNKNOWN]
        raise Mixes("reshapes to a shape that is not known")
    if value.shape is None:
        return [UNKNOWN]
    zero_copies = not flag(node, "allowzero")
    wanted: list[Element] = [
        value.dims[axis] if size == Size(0) and zero_copies and axis < value.rank else size
        for axis, size in enumerate(target.content)
    ]
    return [reshaped(value, wanted, context)]


def reshaped(value: Fact, wanted: Sequence[Element], context: Context) -> Fact:
    """Return the value with other axes, of which one may be -1: the remainder.

    Rows stay rows if their elements lie together: the elements before those of a row's block, and of the
    block itself, must be the same in both shapes, for any number of rows.
    """
    sizes = [size if isinstance(size, Size) else None for size in wanted]
    if any(depends(size) for size in wanted) and any(size is None for size in wanted):
        raise Mixes("reshapes to a shape that depends on the number of rows")
    open_axes = [axis for axis, size in enumerate(sizes) if size == Size(-1)]
    if any(size is None for size in sizes) or len(open_axes) > 1:
        raise Mixes("reshapes to a shape that is not known")
    plain = [size for size in sizes if size is not None]
    unknown = -1
    if open_axes:
        rest = over(product(*value.dims), product(*(size for size in plain if size != Size(-1))))
        if rest is None:
            unknown = open_axes[0]
            plain[unknown] = context.size("rest")
        else:
            plain[open_axes[0]] = rest
    if value.rows is None:
        return fact(plain)
    places = [axis for axis, size in enumerate(plain) if BATCH in size.symbols]
    if len(places) != 1 or plain[places[0]].batches != 1 or plain[places[0]].factor < 1:
        raise Mixes("reshapes so that the rows are not an axis of their own")
    return fact(plain, _placed(value.dims, value.rows, plain, places[0], unknown))


def _placed(dims: Sequence[Size], rows: Rows, wanted: Sequence[Size], place: int, unknown: int) -> Rows:
    """Return the row axis in the new shape; ``unknown`` is the axis of unknown size, or -1."""
    if not 0 <= unknown < place:
        outer = over(product(*dims[: rows.axis], rows.outer), product(*wanted[:place]))
        inner = None if outer is None else over(wanted[place], product(outer, ROWS))
        if outer is not None and inner is not None:
            return Rows(place, outer, inner)
    # Both shapes have equally many elements, or the run fails: if a row's block is the same, so are those
    # before it.
    if unknown <= place:
        inner = over(product(rows.inner, *dims[rows.axis + 1 :]), product(*wanted[place + 1 :]))
        outer = None if inner is None else over(wanted[place], product(ROWS, inner))
        if outer is not None and inner is not None:
            return Rows(place, outer, inner)
    raise Mixes("reshapes so that elements of several rows may lie together")


@rule("Flatten")
def flatten(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN]
    axis = whole(node, "axis", 1)
    axis = axis + value.rank if axis < 0 else axis
    return [reshaped(value, [product(*value.dims[:axis]), product(*value.dims[axis:])], context)]


@rule("Transpose")
def transpose(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN]
    order = wholes(node, "perm") or list(reversed(range(value.rank)))
    if sorted(order) != list(range(value.rank)):
        raise Mixes("has an order of axes that is none")
    rows = value.rows and value.rows._replace(axis=order.index(value.rows.axis))
    return [Fact(tuple(value.dims[axis] for axis in order), rows)]


@rule("Squeeze")
def squeeze(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    axes = axes_given(node, inputs, 1, as_input=context.opset >= 13)
    if value.shape is None:
        return [UNKNOWN]
    if axes is None:
        if value.rows is not None or not all(size.constant for size in value.dims):
            raise Mixes("takes away every axis of size 1, so with one row that of the rows too")
        axes = [axis for axis, size in enumerate(value.dims) if size == ONE]
    gone = {axis_of(axis, value.rank) for axis in axes}
    return [without_axes(value, gone)]


def without_axes(value: Fact, gone: set[int]) -> Fact:
    """Return the value without some axes, which must not include the row axis."""
    rows = value.rows
    if rows is not None:
        if rows.axis in gone:
            raise Mixes("takes away the axis of the rows")
        rows = rows._replace(axis=rows.axis - sum(axis < rows.axis for axis in gone))
    return Fact(tuple(size for axis, size in enumerate(value.dims) if axis not in gone), rows)


@rule("Unsqueeze")
def unsqueeze(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    axes = axes_given(node, inputs, 1, as_input=context.opset >= 13)
    if axes is None:
        raise Mixes("names no axes")
    if value.shape is None:
        return [UNKNOWN]
    rank = value.rank + len(axes)
    for axis in sorted(axis_of(one, rank) for one in axes):
        value = with_new_axis(value, axis)
    return [value]


@rule("Concat")
def concat(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    values = [one for one in inputs if one is not None]
    if any(one.shape is None for one in values) and all(one.rows is None for one in values):
        return [UNKNOWN]
    rank = values[0].rank
    if any(one.rank != rank for one in values):
        raise Mixes("joins values of different ranks")
    axis = axis_of(whole(node, "axis", 0), rank)
    rows = same_rows(values)
    if rows is not None and rows.axis == axis:
        raise Mixes("joins values along the axis of the rows")
    shape = list(values[0].dims)
    total = Size(0)
    for one in values:
        added = context.algebra.apply("Add", (total, one.dims[axis]))
        total = added if isinstance(added, Size) else context.size("joined")
    shape[axis] = total
    return [fact(shape, rows)]


@rule("Expand", sizes=(1,))
def expand(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value, target = needed(inputs, 0), needed(inputs, 1)
    uniform(inputs, 1)
    if value.shape is None or target.content is None:
        if value.rows is not None:
            raise Mixes("expands to a shape that is not known")
        return [UNKNOWN]
    wanted: list[Element] = list(target.content.flat)
    rank = max(value.rank, len(wanted))
    own = [ONE] * (rank - value.rank) + list(value.dims)
    wanted = [*[ONE] * (rank - len(wanted)), *wanted]
    rows = value.rows and value.rows._replace(axis=value.rows.axis + rank - value.rank)
    shape: list[Size | None] = []
    for axis, (size, to) in enumerate(zip(own, wanted, strict=True)):
        if not isinstance(to, Size):
            raise Mixes("expands to a size that depends on the number of rows")
        if rows is not None and axis == rows.axis:
            if to not in (ONE, size):
                raise Mixes("expands the axis of the rows")
        elif to.batches:
            if size != ONE or rows is not None or to.batches != 1 or to.factor < 1:
                raise Mixes("expands to a size that depends on the number of rows")
            rows = Rows(axis, ONE, product(*_without_rows(to)))
        shape.append(_expanded(size, to, context))
    return [fact(shape, rows)]


def _without_rows(size: Size) -> list[Size]:
    found = over(size, ROWS)
    return [] if found is None else [found]


def _expanded(size: Size, to: Size, context: Context) -> Size:
    if to in (ONE, size):
        return size
    return to if size == ONE else (size if size.constant else context.algebra.symbol("broadcast", *sorted((size, to))))


@rule("ConstantOfShape", sizes=(0,))
def constant_of_shape(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    uniform(inputs, 0)
    target = needed(inputs, 0).content
    if target is None:
        return [UNKNOWN]
    rows = None
    for axis, size in enumerate(target.flat):
        if isinstance(size, Size) and size.batches == 1 and size.factor > 0 and rows is None:
            rows = Rows(axis, ONE, product(*_without_rows(size)))
        elif not isinstance(size, Size) or depends(size):
            raise Mixes("makes a shape that depends on the number of rows")
    return [fact(list(target.flat), rows)]


@rule("Range")
def range_(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    start, end, step = (needed(inputs, index) for index in range(3))
    uniform(inputs, 0, 1, 2)
    size: Element = None
    if numbers(start) == [0] and numbers(step) == [1] and end.content is not None and end.content.size == 1:
        size = end.content.flat[0]
    if isinstance(size, Size) and context.algebra.natural(size):
        return [fact([size])]
    return [fact([context.size("range")])]


@rule("Tile", sizes=(1,))
def tile(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value, repeats = needed(inputs, 0), needed(inputs, 1)
    uniform(inputs, 1)
    if value.shape is None or repeats.content is None:
        if value.rows is not None:
            raise Mixes("repeats the rows a number of times that is not known")
        return [UNKNOWN]
    rows = value.rows
    shape: list[Size | None] = []
    for axis, (size, times_) in enumerate(zip(value.dims, repeats.content.flat, strict=True)):
        if not isinstance(times_, Size):
            raise Mixes("repeats a number of times that depends on the number of rows")
        if rows is not None and rows.axis == axis and not times_.batches:
            rows = rows._replace(outer=product(times_, rows.outer))
        elif times_.batches:
            if rows is not None or times_.batches != 1 or times_.factor < 1:
                raise Mixes("repeats a number of times that depends on the number of rows")
            rows = Rows(axis, ONE, product(*_without_rows(times_), size))
        shape.append(product(size, times_))
    return [fact(shape, rows)]
