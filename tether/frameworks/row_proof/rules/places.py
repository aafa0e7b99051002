"""Rules for operators that slice, pad, or resize axes."""

from __future__ import annotations

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    axes_given,
    axis_of,
    fact,
    given,
    needed,
    numbers,
    product,
    rest_uniform,
    rule,
    text,
    whole,
    wholes,
)
from tether.frameworks.row_proof.sizes import MAX_ROWS, ONE, ROWS, Element, Size, depends, over, sliced

FAR = (1 << 31) - 1
"""End of a slice: more than any axis has."""


@rule("Slice", sizes=(1, 2, 3, 4))
def slice_(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN]
    starts, ends, axes, steps = _slice_lists(node, inputs, context)
    if axes is None and len(starts) != len(ends):
        raise Mixes("has starts and ends that do not fit")
    shape: list[Size | None] = list(value.dims)
    for index, axis in enumerate(axes if axes is not None else range(len(starts))):
        place = axis_of(axis, value.rank)
        part = tuple(_at(found, index, default) for found, default in ((starts, None), (ends, None), (steps, ONE)))
        if _is_whole(part, value.dims[place]):
            continue
        if value.rows is not None and value.rows.axis == place:
            raise Mixes("takes some of the rows")
        if any(one is None or depends(one) for one in part) and any(
            one.counts for one in inputs[1:] if one is not None
        ):
            raise Mixes("cuts at a place that depends on the number of rows")
        shape[place] = _cut(part, value.dims[place]) or context.size(place)
    return [fact(shape, value.rows)]


Part = tuple[Element, ...]


def _slice_lists(
    node: Node, inputs: Inputs, context: Context
) -> tuple[list[Element], list[Element], list[int] | None, list[Element]]:
    """Return starts, ends, axes and steps; unknown ones have no elements, or None elements."""
    if context.opset < 10:
        starts, ends = ([Size(one) for one in wholes(node, name) or []] for name in ("starts", "ends"))
        return list(starts), list(ends), axes_given(node, inputs, 3, as_input=False), []
    lists: list[list[Element]] = []
    for index in (1, 2, 4):
        found = given(inputs, index)
        if found is not None and found.content is None and index == 4:
            lists.append([None] * 32)
        else:
            lists.append([] if found is None or found.content is None else list(found.content.flat))
    axes = axes_given(node, inputs, 3, as_input=True)
    if axes is None and not (lists[0] or lists[1]):
        raise Mixes("cuts axes that are not known")
    return lists[0], lists[1], axes, lists[2]


def _at(found: list[Element], index: int, default: Element) -> Element:
    return found[index] if index < len(found) else default


def _is_whole(part: Part, size: Size) -> bool:
    start, end, step = part
    if step != ONE or start != Size(0) or not isinstance(end, Size):
        return False
    return end == size or (end.constant and end.factor >= _most(size))


def _most(size: Size) -> int:
    """Return the end that certainly covers the last element: TensorFlow's exporter writes 10**9."""
    return size.factor * MAX_ROWS if size.symbols == ROWS.symbols else FAR


def _cut(part: Part, size: Size) -> Size | None:
    """Return the number of remaining elements, if all numbers are known."""
    found = [one.factor for one in part if isinstance(one, Size) and one.constant]
    if len(found) != 3 or not size.constant or not found[2] or abs(size.factor) > 1 << 40:
        return None
    start, end, step = found
    return Size(len(range(*sliced(start, end, step, size.factor).indices(size.factor))))


@rule("Split")
def split(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN] * len(node.outputs)
    axis = axis_of(whole(node, "axis", 0), value.rank)
    if value.rows is not None and value.rows.axis == axis:
        raise Mixes("splits the rows")
    sizes = wholes(node, "split") if context.opset < 13 else None
    if given(inputs, 1) is not None:
        sizes = numbers(needed(inputs, 1)) or []
    count = len(node.outputs)
    if sizes is None and value.dims[axis].constant and value.dims[axis].factor % count == 0:
        sizes = [value.dims[axis].factor // count] * count
    found = []
    for index in range(count):
        known = sizes is not None and len(sizes) == count
        size = Size(sizes[index]) if known and sizes is not None else context.size(index)
        found.append(fact([*value.dims[:axis], size, *value.dims[axis + 1 :]], value.rows))
    return found


@rule("Pad", sizes=(1,))
def pad(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN]
    amounts = wholes(node, "pads") if context.opset < 11 else None
    pads: list[Element] | None = None if amounts is None else [Size(one) for one in amounts]
    if context.opset >= 11:
        content = needed(inputs, 1).content
        pads = None if content is None else list(content.flat)
    axes = axes_given(node, inputs, 3, as_input=True) if context.opset >= 18 else None
    places = [axis_of(axis, value.rank) for axis in (axes if axes is not None else range(value.rank))]
    if pads is not None and len(pads) != 2 * len(places):
        raise Mixes("has amounts that do not fit the axes")
    shape: list[Size | None] = list(value.dims)
    for index, place in enumerate(places):
        ends = (pads[index], pads[index + len(places)]) if pads is not None else ()
        if ends == (Size(0), Size(0)):
            continue
        if value.rows is not None and value.rows.axis == place:
            raise Mixes("may add elements to the axis of the rows")
        if any(depends(one) for one in ends):
            raise Mixes("adds a number of elements that depends on the number of rows")
        total: Element = value.dims[place]
        for one in ends:
            total = context.algebra.apply("Add", (total, one))
        shape[place] = total if ends and isinstance(total, Size) else context.size(place)
    return [fact(shape, value.rows)]


@rule("DepthToSpace", "SpaceToDepth")
def depth_to_space(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN]
    if value.rank != 4 or (value.rows is not None and value.rows.axis != 0):
        raise Mixes("works on axes that the rows are on")
    block = whole(node, "blocksize", 0)
    if block < 1:
        raise Mixes("has a block that is none")
    square, edge = Size(block * block), Size(block)
    batch, channels, height, width = value.dims
    if node.kind == "DepthToSpace":
        shape = [batch, over(channels, square) or context.size(1), product(height, edge), product(width, edge)]
    else:
        halves = (over(height, edge) or context.size(2), over(width, edge) or context.size(3))
        shape = [batch, product(channels, square), *halves]
    return [fact(shape, value.rows)]


@rule("Trilu", since=14)
def trilu(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.rows is not None and value.rows.axis >= value.rank - 2:
        raise Mixes("works along the axis of the rows")
    return [Fact(value.shape, value.rows)]


@rule("Resize", sizes=(3,), since=10)
@rule("Upsample")
def resize(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.shape is None:
        return [UNKNOWN]
    axes = wholes(node, "axes") if context.opset >= 18 else None
    places = [axis_of(axis, value.rank) for axis in axes] if axes is not None else list(range(value.rank))
    _check_resize(node, value)
    scales, sizes = _resize_amounts(node, inputs, context)
    for found in (scales, sizes):
        if found is not None and len(found) != len(places):
            raise Mixes("has amounts that do not fit the axes")
    shape: list[Size | None] = list(value.dims)
    for index, place in enumerate(places):
        same = (scales is not None and scales[index] == 1.0) or (
            sizes is not None and sizes[index] == value.dims[place]
        )
        if same:
            continue
        if value.rows is not None and value.rows.axis == place:
            raise Mixes("may change the number of rows")
        wanted = sizes[index] if sizes is not None else None
        if sizes is not None and (wanted is None or depends(wanted)):
            raise Mixes("makes a size that depends on the number of rows")
        shape[place] = _resized(value.dims[place], None if scales is None else scales[index], wanted) or context.size(
            place
        )
    return [fact(shape, value.rows)]


def _check_resize(node: Node, value: Fact) -> None:
    """Require modes that keep an axis of scale 1 bit-exact, and sizes that equal the given factors or sizes."""
    mode = text(node, "mode", "nearest")
    coordinates = text(node, "coordinate_transformation_mode", "half_pixel")
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        raise Mixes(f"has the mode '{coordinates[:32]}', which is not known to keep rows apart")
    if mode != "nearest" and value.rows is not None and (value.rank != 4 or value.rows.axis != 0):
        raise Mixes("may take means along the axis of the rows")
    if text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Mixes("derives sizes from one another")


def _resize_amounts(node: Node, inputs: Inputs, context: Context) -> tuple[list[Element] | None, list[Element] | None]:
    if node.kind == "Upsample" and context.opset < 9:
        scales = node.attributes.get("scales")
        return (list(scales) if isinstance(scales, list) else None), None
    found = given(inputs, 1 if context.opset < 11 else 2)
    known = None if found is None or found.content is None else list(found.content.flat)
    sizes = given(inputs, 3) if context.opset >= 11 else None
    if sizes is None:
        if known is None:
            raise Mixes("resizes by a factor that is not known")
        return known, None
    if sizes.content is None:
        raise Mixes("resizes to a size that is not known")
    return None, list(sizes.content.flat)


def _resized(size: Size, scale: Element, wanted: Element) -> Size | None:
    if isinstance(wanted, Size):
        return wanted
    whole_scale = isinstance(scale, float) and scale.is_integer() and scale >= 1
    return product(size, Size(int(scale))) if whole_scale and isinstance(scale, float) else None
