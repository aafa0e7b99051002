"""Facts about a graph's values: the shape, and the axis with one row for each row of the request.

A value is of one of these kinds:

- uniform: the same in every run of requests that are alike in shape, however many rows there are;
- counts: whole numbers computed from the number of rows, of which each element is known (``content``);
- rows: the size of ``axis`` is ``outer * B * inner``, and what is at ``(o, i, n)`` of it depends on row ``i`` of the inputs
  alone, in a way that is the same for each ``i`` and ``B``.

Whatever is none of these raises :class:`Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tether.frameworks.onnx.model import Constant, Graph, Node
from tether.frameworks.row_proof.sizes import BATCH, ONE, ROWS, Algebra, Size, depends, times

MAX_AXES = 32
INT32 = 6
FOLLOWED = (1, INT32, 7, 9, 10, 11)
"""Types whose elements are computed: shorter and unsigned numbers wrap around."""


class Mixes(Exception):
    """The rows of a value cannot be proven independent; the text continues after the operator's name."""


class Rows(NamedTuple):
    """The axis of the rows: ``outer * B * inner`` elements."""

    axis: int
    outer: Size = ONE
    inner: Size = ONE

    @property
    def size(self) -> Size:
        return product(self.outer, ROWS, self.inner)


Shape = tuple[Size, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fact:
    """``shape`` None: not even the rank is known. ``content``: elements, as an array of :data:`~tether.frameworks.row_proof.sizes.Element`,
    which are of 32 bits where they are ``narrow``."""

    shape: Shape | None
    rows: Rows | None = None
    content: np.ndarray | None = None
    narrow: bool = False

    @property
    def counts(self) -> bool:
        return self.content is not None and any(depends(element) for element in self.content.flat)

    @property
    def rank(self) -> int:
        """The rank; raises :class:`Mixes` if unknown."""
        return len(self.dims)

    @property
    def dims(self) -> Shape:
        """The shape; raises :class:`Mixes` if unknown."""
        if self.shape is None:
            raise Mixes("gets a value whose shape is not known")
        return self.shape

    def scalar(self) -> bool:
        """Return whether it certainly has one element."""
        return self.shape is not None and all(size == ONE for size in self.shape)


UNKNOWN = Fact(None)
"""Uniform, of any shape."""


def fact(shape: Sequence[Size | None], rows: Rows | None = None) -> Fact:
    """Return a value with ``rows`` on one of its axes, whose size is set.

    Raises:
        Mixes: a size depends on the number of rows where it must not.
    """
    if len(shape) > MAX_AXES:
        raise Mixes("has too many axes to follow")
    sizes = list(shape)
    if rows is not None:
        sizes[rows.axis] = rows.size
    for axis, size in enumerate(sizes):
        if size is None or (size.batches and (rows is None or axis != rows.axis)):
            raise Mixes("makes an axis whose size depends on the number of rows")
    return Fact(tuple(size for size in sizes if size is not None), rows)


def product(*sizes: Size) -> Size:
    found = times(*sizes)
    if found is None:
        raise Mixes("has sizes too large to follow")
    return found


def constant(value: Constant) -> Fact:
    shape = tuple(Size(size) for size in value.shape)
    if value.values is None or value.kind not in FOLLOWED:
        return Fact(shape)
    return Fact(shape, None, elements(value.values), value.kind == INT32)


def elements(values: np.ndarray) -> np.ndarray:
    """Return an array of numbers as one of elements."""
    whole = values.dtype.kind in "iub"
    found = np.empty(values.shape, object)
    for index, value in np.ndenumerate(values):
        found[index] = Size(int(value)) if whole else float(value)
    return found


@dataclass(slots=True)
class Context:
    """Context that a rule may use beside the facts of its inputs."""

    algebra: Algebra
    opset: int
    serial: int
    """Number of this use of the node: nodes of a function or a loop are used several times, with different sizes."""
    run_graph: Callable[[Graph, Sequence[Fact]], list[Fact]]
    """Returns the facts of a graph's outputs inside the current node, from those of its inputs."""

    def size(self, *key: str | int) -> Size:
        """Return the symbol of a size known only by its place in this node's outputs."""
        return self.algebra.symbol("node", self.serial, *key)


Inputs = Sequence[Fact | None]
"""None for an omitted input."""

Rule = Callable[[Node, Inputs, Context], list[Fact]]


class Entry(NamedTuple):
    """``sizes``: inputs that may be counts. ``since``: the first operator set with the meaning that the rule knows."""

    rule: Rule
    sizes: frozenset[int]
    since: int


RULES: dict[tuple[str, str], Entry] = {}
ML, MICROSOFT = "ai.onnx.ml", "com.microsoft"


OLDEST = {"": 7, ML: 1, MICROSOFT: 1}
"""Oldest version of each operator set known to the rules."""


def rule(*kinds: str, domain: str = "", sizes: Iterable[int] = (), since: int = 0) -> Callable[[Rule], Rule]:
    """Register a rule as allowed; ``since`` 0 stands for the oldest operator set."""

    def add(function: Rule) -> Rule:
        for kind in kinds:
            entry = Entry(function, frozenset(sizes), since or OLDEST[domain])
            if RULES.setdefault((domain, kind), entry).rule is not function:
                raise ValueError(kind)
        return function

    return add


# shared by rules


def given(inputs: Inputs, index: int) -> Fact | None:
    return inputs[index] if index < len(inputs) else None


def needed(inputs: Inputs, index: int) -> Fact:
    found = given(inputs, index)
    if found is None:
        raise Mixes(f"has no input {index}")
    return found


def uniform(inputs: Inputs, *indices: int) -> None:
    """Raise unless these inputs are omitted or the same for all rows."""
    for index in indices:
        found = given(inputs, index)
        if found is not None and found.rows is not None:
            raise Mixes(f"takes its input {index} from the rows")


def rest_uniform(inputs: Inputs, start: int = 1) -> None:
    uniform(inputs, *range(start, len(inputs)))


def whole(node: Node, name: str, default: int) -> int:
    found = node.attributes.get(name, default)
    if not isinstance(found, int):
        raise Mixes(f"has an attribute '{name}' of another type")
    return found


def flag(node: Node, name: str, *, default: bool = False) -> bool:
    """Return a 0-or-1 attribute; ONNX Runtime takes some other values for 0 and some for 1."""
    found = whole(node, name, int(default))
    if found not in (0, 1):
        raise Mixes(f"has an attribute '{name}' that is neither 0 nor 1")
    return bool(found)


def text(node: Node, name: str, default: str) -> str:
    found = node.attributes.get(name, default.encode())
    if not isinstance(found, bytes):
        raise Mixes(f"has an attribute '{name}' of another type")
    return found.decode("utf-8", "replace")


def wholes(node: Node, name: str) -> list[int] | None:
    found = node.attributes.get(name)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
        raise Mixes(f"has an attribute '{name}' of another type")
    return found


def axis_of(axis: int, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise Mixes(f"works on axis {axis} of {rank}")
    return axis + rank if axis < 0 else axis


def numbers(value: Fact) -> list[int] | None:
    """Return the elements if all are constant whole numbers, else None."""
    if value.content is None:
        return None
    found = [one.factor for one in value.content.flat if isinstance(one, Size) and one.constant]
    return found if len(found) == value.content.size else None


def axes_given(node: Node, inputs: Inputs, index: int, *, as_input: bool) -> list[int] | None:
    """Return axes of an attribute or, ``as_input``, of an input; None if omitted: ONNX Runtime treats an
    empty list as omitted.

    Raises:
        Mixes: they are computed, so unknown.
    """
    if not as_input:
        return wholes(node, "axes") or None
    found = given(inputs, index)
    if found is None:
        return None
    known = numbers(found)
    if known is None:
        raise Mixes("works on axes that are computed")
    return known or None


def away_from_rows(value: Fact, axes: Iterable[int], what: str) -> None:
    """Raise if one of the axes is that of the rows."""
    if value.rows is not None and value.rows.axis in set(axes):
        raise Mixes(what)


def batch_first(value: Fact, axes: Iterable[int] = (0,), what: str = "has the rows on an axis that it mixes") -> None:
    """Raise if the rows are on an axis that the operator does not treat separately."""
    if value.rows is not None and value.rows.axis not in set(axes):
        raise Mixes(what)


def broadcast(values: Iterable[Fact], algebra: Algebra) -> Fact:
    """Return the result of an elementwise operator: axes align from the last one.

    Raises:
        Mixes: a value could align with the row axis for one number of rows and not for another.
    """
    facts = list(values)
    if any(one.shape is None for one in facts):
        if any(one.rows is not None for one in facts):
            raise Mixes("joins the rows with a value whose shape is not known")
        return UNKNOWN
    rank = max((one.rank for one in facts), default=0)
    rows = _aligned_rows(facts, rank)
    shape: list[Size] = [ONE] * rank
    for one in facts:
        for axis, size in enumerate(one.dims, rank - one.rank):
            if rows is not None and axis == rows.axis:
                if one.rows is None and size != ONE:
                    raise Mixes("joins the rows with a value that has other elements along them")
            else:
                shape[axis] = _broadcast_size(shape[axis], size, algebra)
    return fact(shape, rows)


def onto(value: Fact, other: Fact, algebra: Algebra) -> Fact:
    """Broadcast for operators that keep the value's own shape, so that the other operand cannot add the rows."""
    if value.rows is None and other.rows is not None:
        raise Mixes("joins the rows to a value that has none")
    return broadcast([value, other], algebra)


def _aligned_rows(facts: list[Fact], rank: int) -> Rows | None:
    found: Rows | None = None
    for one in facts:
        if one.rows is not None:
            rows = one.rows._replace(axis=one.rows.axis + rank - one.rank)
            if found is not None and rows != found:
                raise Mixes("joins rows that lie on different axes")
            found = rows
    return found


def _broadcast_size(a: Size, b: Size, algebra: Algebra) -> Size:
    if a in (b, ONE):
        return b
    if b == ONE:
        return a
    if BATCH in a.symbols or BATCH in b.symbols:
        raise Mixes("joins a value whose size depends on the number of rows")
    for size in (a, b):
        if size.constant:
            return size
    return algebra.symbol("broadcast", *sorted((a, b)))


def same_rows(values: Iterable[Fact]) -> Rows | None:
    """Return the place of the rows in values of equal rank if all have them, or None if none has.

    Raises:
        Mixes: the rows are on different axes, or only some values have them.
    """
    found = {one.rows for one in values}
    if len(found) > 1:
        raise Mixes("joins rows with values that are the same for all rows, or rows on different axes")
    return next(iter(found), None)
