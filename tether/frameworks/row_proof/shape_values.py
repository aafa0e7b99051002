"""Computes shapes inside a graph element by element: exporters write them as Shape, Gather, Concat, Mul,
Where and so on.

An array of elements is worked on by numpy as an array of objects, so moving elements about is numpy's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tether.frameworks.onnx.model import DTYPES, MAX_VALUES, Constant, Node
from tether.frameworks.row_proof.facts import (
    INT32,
    Context,
    Fact,
    Inputs,
    axes_given,
    axis_of,
    constant,
    elements,
    flag,
    given,
    needed,
    numbers,
    product,
    whole,
    wholes,
)
from tether.frameworks.row_proof.sizes import Algebra, Element, Size, depends, sliced

Content = np.ndarray | None
Compute = Callable[[Node, Inputs, Context], Sequence[Content]]

_RANGES = {kind: np.iinfo(np.dtype(DTYPES[kind])) for kind in (6, 7)}
_FLOATS = (1, 10, 11, 16)
MAX_FACTOR = 1 << 20
MAX_NARROW = 1 << 11
"""Of sizes that are computed, the latter with 32 bits: a product that wraps is no product. See ``MAX_ROWS``."""
MAX_COMPUTED = 4
"""Maximum symbols in such a size; half as many with 32 bits."""


def compute(node: Node, inputs: Inputs, context: Context) -> list[Fact] | None:
    """Compute the outputs of a node from the elements of its inputs, if possible, else None."""
    known = None if node.domain else _COMPUTE.get(node.kind)
    if known is None or (node.kind not in _OF_SHAPES and not _all_known(inputs)):
        return None
    try:
        found = known(node, inputs, context)
    except (ValueError, IndexError):  # numpy's error for shapes that do not fit; such a run fails too
        return None
    if not found or any(one is None for one in found):
        return None
    narrow = _is_narrow(node, inputs)
    return [_fact(one, node, context.algebra, narrow=narrow) for one in found if one is not None]


def _is_narrow(node: Node, inputs: Inputs) -> bool:
    if node.kind == "Cast":
        return node.attributes.get("to") == INT32
    return node.kind not in _OF_SHAPES and any(one.narrow for one in inputs if one is not None)


def _all_known(inputs: Inputs) -> bool:
    return all(one is None or one.content is not None for one in inputs)


def _fact(content: np.ndarray, node: Node, algebra: Algebra, *, narrow: bool) -> Fact:
    if node.kind not in _OF_SHAPES:
        content = _each_of(content, lambda element: _fitting(element, algebra, narrow=narrow))
    return Fact(tuple(Size(size) for size in content.shape), None, content, narrow)


def _fitting(element: Element, algebra: Algebra, *, narrow: bool) -> Element:
    """Return the element if it certainly fits its type, else an unknown."""
    if not isinstance(element, Size) or element.constant:
        return element
    factor, symbols = (MAX_NARROW, MAX_COMPUTED // 2) if narrow else (MAX_FACTOR, MAX_COMPUTED)
    if abs(element.factor) <= factor and len(element.symbols) <= symbols:
        return element
    return None if depends(element) else algebra.symbol("wrapped", element, narrow, signed=True)


def _each_of(array: np.ndarray, change: Callable[[Element], Element]) -> np.ndarray:
    found = np.empty(array.shape, object)
    for index in np.ndindex(array.shape):
        found[index] = change(_at(array, index))
    return found


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
    if flag(node, "fmod"):
        return []
    return [_each(node.kind, context, [_content(inputs, index) for index in range(len(inputs))])]


def _cast(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    to = whole(node, "to", 0)
    return [_each_of(_content(inputs, 0), lambda element: _cast_one(element, to, context.algebra))]


def _cast_one(element: Element, to: int, algebra: Algebra) -> Element:
    value = element.factor if isinstance(element, Size) and element.constant else element
    known: Element = None
    if isinstance(value, Size):
        known = value if to in _RANGES and not algebra.is_floating(value) else None
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
    if to not in _FLOATS or to not in DTYPES or not abs(value) < 1 << 20:
        return None
    # Where it is rounded, a runtime may omit the cast.
    return float(value) if float(np.dtype(DTYPES[to]).type(value)) == value else None


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
    if target is None or 0 in target or flag(node, "allowzero"):
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
        lists = [wholes(node, "starts"), wholes(node, "ends"), wholes(node, "axes") or None, None]
    starts, ends, axes, steps = lists
    if starts is None or ends is None:
        return []
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        data = data[(slice(None),) * axis_of(axis, data.ndim) + (sliced(start, end, step, data.shape[axis]),)]
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
    """ConstantOfShape and Expand to a known, small shape."""
    target = numbers(needed(inputs, 0 if node.kind == "ConstantOfShape" else 1))
    if target is None or any(size < 0 for size in target) or int(np.prod(target, dtype=object)) > MAX_VALUES:
        return []
    if node.kind == "Expand":
        data = _content(inputs, 0)
        return [np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(target)))]
    value = node.attributes.get("value")
    fill: Element = 0.0
    if value is not None:
        content = constant(value).content if isinstance(value, Constant) else None
        if content is None or content.size != 1:
            return []
        fill = content.flat[0]
    found = np.empty(target, object)
    for index in np.ndindex(*target):
        found[index] = fill
    return [found]


def _product(node: Node, inputs: Inputs, context: Context) -> list[Content]:
    """ReduceProd, ReduceMin, ReduceMax and ReduceSum of a list to one number."""
    data = _content(inputs, 0)
    if data.ndim != 1 or not data.size or flag(node, "noop_with_empty_axes"):
        return []
    by_input = context.opset >= (13 if node.kind == "ReduceSum" else 18)
    if axes_given(node, inputs, 1, as_input=by_input) not in (None, [], [0], [-1]):
        return []
    operator = {"ReduceProd": "Mul", "ReduceMin": "Min", "ReduceMax": "Max", "ReduceSum": "Add"}[node.kind]
    total: Element = data[0]
    for element in data[1:]:
        total = context.algebra.apply(operator, (total, element))
    return [_objects([total]).reshape((1,) if flag(node, "keepdims", default=True) else ())]


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
