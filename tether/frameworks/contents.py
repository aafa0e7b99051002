"""Shapes that a graph computes: what exporters write as Shape, Gather, Concat, Mul, Where and so on, element by element.

An array of elements is worked on by numpy as an array of objects, so moving elements about is numpy's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tether.frameworks.facts import (
    Context,
    Fact,
    Inputs,
    axes_given,
    axis_of,
    elements,
    given,
    needed,
    numbers,
    product,
    whole,
    wholes,
)
from tether.frameworks.onnx_model import DTYPES, MAX_VALUES, Node
from tether.frameworks.sizes import Algebra, Element, Size, depends

Content = np.ndarray | None
Compute = Callable[[Node, Inputs, Context], Sequence[Content]]

_RANGES = {kind: np.iinfo(np.dtype(name)) for kind, name in DTYPES.items() if np.dtype(name).kind in "iu"}
_FLOATS = (1, 10, 11, 16)


def compute(node: Node, inputs: Inputs, context: Context) -> list[Fact] | None:
    """The outputs of a node whose elements can be told from those of its inputs, or None."""
    known = None if node.domain else _COMPUTE.get(node.kind)
    if known is None or (node.kind not in _OF_SHAPES and not _all_known(inputs)):
        return None
    try:
        found = known(node, inputs, context)
    except (ValueError, IndexError):  # numpy's, of shapes that do not fit; such a run fails too
        return None
    if not found or any(one is None for one in found):
        return None
    return [_fact(one) for one in found if one is not None]


def _all_known(inputs: Inputs) -> bool:
    return all(one is None or one.content is not None for one in inputs)


def _fact(content: np.ndarray) -> Fact:
    return Fact(tuple(Size(size) for size in content.shape), None, content)


def _content(inputs: Inputs, index: int) -> np.ndarray:
    found = needed(inputs, index).content
    if found is None:
        raise AssertionError("only called where all elements are known")
    return found


def _at(array: np.ndarray, index: tuple[int, ...]) -> Element:
    found: Element = array[index]
    return found


def _each(operator: str, context: Context, arrays: Sequence[np.ndarray], *, floating: bool = False) -> Content:
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    if int(np.prod(shape, dtype=object)) > MAX_VALUES:
        return None
    found = np.empty(shape, object)
    spread = [np.broadcast_to(array, shape) for array in arrays]
    for index in np.ndindex(shape):
        found[index] = context.algebra.apply(operator, tuple(_at(array, index) for array in spread), floating=floating)
    return found


def _elementwise(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    if whole(node, "fmod", 0):
        return []
    return [_each(node.kind, context, [_content(inputs, index) for index in range(len(inputs))])]


def _cast(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    to = whole(node, "to", 0)
    source = _content(inputs, 0)
    found = np.empty(source.shape, object)
    for index in np.ndindex(source.shape):
        found[index] = _cast_one(_at(source, index), to, context.algebra)
    return [found]


def _cast_one(element: Element, to: int, algebra: Algebra) -> Element:
    value = element.factor if isinstance(element, Size) and element.constant else element
    known: Element = None
    if isinstance(value, Size):
        # A size fits a whole number of 32 bits or more.
        known = value if to in (6, 7, 12, 13) and not algebra.is_floating(value) else None
    elif value is not None:
        known = _cast_constant(value, to)
    if known is not None or depends(element):
        return known
    return algebra.symbol("cast", element, to, signed=True, floating=to in _FLOATS)


def _cast_constant(value: float, to: int) -> Element:
    bounds = _RANGES.get(to)
    if bounds is not None and np.isfinite(value) and bounds.min <= value <= bounds.max:
        return Size(int(value))
    if to == 9:
        return Size(int(bool(value)))
    return float(value) if to in _FLOATS and abs(value) < 1 << 20 else None


def _identity(_node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    return [_content(inputs, 0)]


def _shape(node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    value = needed(inputs, 0)
    if value.shape is None:
        return []
    end = node.attributes.get("end")
    return [_objects(value.shape[slice(whole(node, "start", 0), end if isinstance(end, int) else None)])]


def _size(_node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    value = needed(inputs, 0)
    return [] if value.shape is None else [_objects([product(*value.shape)]).reshape(())]


def _objects(sizes: Sequence[Element]) -> np.ndarray:
    found = np.empty(len(sizes), object)
    for index, size in enumerate(sizes):
        found[index] = size
    return found


def _gather(node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    data, where = _content(inputs, 0), numbers(needed(inputs, 1))
    axis = axis_of(whole(node, "axis", 0), data.ndim)
    if where is None or any(not -data.shape[axis] <= index < data.shape[axis] for index in where):
        return []
    indices = np.array(where, np.int64).reshape(_content(inputs, 1).shape)
    if data.size and indices.size * (data.size // data.shape[axis]) > MAX_VALUES:
        return []
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return [np.take(data, indices.reshape(-1), axis=axis).reshape(shape)]


def _concat(node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    parts = [_content(inputs, index) for index in range(len(inputs))]
    if sum(part.size for part in parts) > MAX_VALUES:
        return []
    return [np.concatenate(parts, axis=axis_of(whole(node, "axis", 0), parts[0].ndim))]


def _unsqueeze(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    data = _content(inputs, 0)
    axes = axes_given(node, inputs, 1, as_input=context.opset >= 13)
    return [] if axes is None else [np.expand_dims(data, tuple(axes))]


def _squeeze(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    axes = axes_given(node, inputs, 1, as_input=context.opset >= 13)
    found = np.squeeze(_content(inputs, 0), axis=None if axes is None else tuple(axes))
    return [found]


def _reshape(node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    data, target = _content(inputs, 0), numbers(needed(inputs, 1))
    if target is None or 0 in target or whole(node, "allowzero", 0):
        return []
    return [data.reshape(target)]


def _transpose(node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    return [np.transpose(_content(inputs, 0), wholes(node, "perm"))]


def _slice(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    data = _content(inputs, 0)
    if context.opset >= 10:
        lists = [None if given(inputs, index) is None else numbers(needed(inputs, index)) for index in range(1, 5)]
        if any(found is None and given(inputs, index) is not None for index, found in enumerate(lists, 1)):
            return []
    else:
        lists = [wholes(node, "starts"), wholes(node, "ends"), wholes(node, "axes"), None]
    starts, ends, axes, steps = lists
    if starts is None or ends is None:
        return []
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        # Python's own slices cut off ends that are too far, as ONNX does, but for ends before the first element.
        last: int | None = end
        if step < 0 and end < -data.shape[axis]:
            last = None
        data = data[(slice(None),) * axis_of(axis, data.ndim) + (slice(start, last, step),)]
    return [data]


def _split(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    data = _content(inputs, 0)
    axis = axis_of(whole(node, "axis", 0), data.ndim)
    sizes = wholes(node, "split") if context.opset < 13 else None
    if given(inputs, 1) is not None:
        sizes = numbers(needed(inputs, 1))
        if sizes is None:
            return []
    count = len(node.outputs)
    if sizes is None:
        if data.shape[axis] % count:
            return []
        sizes = [data.shape[axis] // count] * count
    return list(np.split(data, np.cumsum(sizes[:-1]), axis=axis))


def _range(_node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    ends = [numbers(needed(inputs, index)) for index in range(3)]
    if any(end is None or len(end) != 1 for end in ends):
        return []
    start, stop, step = (end[0] for end in ends if end is not None)
    if not step or abs((stop - start) // step) >= MAX_VALUES:
        return []
    return [elements(np.array(range(start, stop, step), np.int64))]


def _filled(node: Node, inputs: Inputs, _context: Context) -> list[Content]:
    """ConstantOfShape and Expand to a shape that is known and small."""
    target = numbers(needed(inputs, 0 if node.kind == "ConstantOfShape" else 1))
    if target is None or any(size < 0 for size in target) or int(np.prod(target, dtype=object)) > MAX_VALUES:
        return []
    if node.kind == "Expand":
        data = _content(inputs, 0)
        return [np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(target)))]
    value = node.attributes.get("value")
    fill: Element = 0.0
    if value is not None:
        values = getattr(value, "values", None)
        if values is None or values.size != 1:
            return []
        fill = elements(values).flat[0]
    found = np.empty(target, object)
    for index in np.ndindex(*target):
        found[index] = fill
    return [found]


def _product(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    """ReduceProd, ReduceMin, ReduceMax and ReduceSum of a list to one number."""
    data = _content(inputs, 0)
    if data.ndim != 1 or not data.size or whole(node, "noop_with_empty_axes", 0):
        return []
    by_input = context.opset >= (13 if node.kind == "ReduceSum" else 18)
    if axes_given(node, inputs, 1, as_input=by_input) not in (None, [], [0], [-1]):
        return []
    operator = {"ReduceProd": "Mul", "ReduceMin": "Min", "ReduceMax": "Max", "ReduceSum": "Add"}[node.kind]
    total: Element = data[0]
    for element in data[1:]:
        total = context.algebra.apply(operator, (total, element))
    return [_objects([total]).reshape((1,) if whole(node, "keepdims", 1) else ())]


_OF_SHAPES = ("Shape", "Size")
_COMPUTE: dict[str, Compute] = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Neg", "Abs", "Floor", "Ceil", "Equal", "Less", "LessOrEqual",
         "Greater", "GreaterOrEqual", "Not", "And", "Or", "Where"),
        _elementwise,
    ),
    **dict.fromkeys(("ReduceProd", "ReduceMin", "ReduceMax", "ReduceSum"), _product),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Expand": _filled,
    "Gather": _gather,
    "Identity": _identity,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
