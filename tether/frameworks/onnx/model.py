"""The parts of an ONNX model that determine its rows: nodes, names, shapes and small constants, never weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

MAX_VALUES = 128
"""Maximum elements of a constant or an attribute to store: more than any shape has."""
DTYPES: dict[int, str] = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8", 12: "<u4", 13: "<u8",
}  # fmt: skip
"""``TensorProto.DataType`` -> numpy, for stored constants."""

Axis = int | str | None
"""A fixed size, the name of an open axis, or an open axis without a name."""


class Constant(NamedTuple):
    """A tensor of the file; ``values`` only if they are few numbers inside the file itself."""

    shape: tuple[int, ...]
    values: np.ndarray | None
    kind: int = 1


class Many(NamedTuple):
    """An attribute's list of more than ``MAX_VALUES`` elements, as in trees: only its length is stored."""

    length: int


class Declared(NamedTuple):
    """A named value and its declared shape: None if undeclared. ``kind`` 0: not a tensor."""

    name: str
    kind: int
    shape: tuple[Axis, ...] | None


@dataclass(slots=True)
class Node:
    """One use of an operator. ``attributes`` has numbers, bytes, constants, graphs and lists of numbers by name.

    None is a value of a type that no rule uses.
    """

    kind: str = ""
    domain: str = ""
    name: str = ""
    overload: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, object] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    """In a function: attributes that take the values of the function's own."""
    captures: frozenset[str] = frozenset()
    """Names of outer values that its graphs may use."""


@dataclass(slots=True)
class Graph:
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Declared] = field(default_factory=list)
    outputs: list[Declared] = field(default_factory=list)
    declared: list[Declared] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)


@dataclass(slots=True)
class Function:
    """An operator defined by the model as a graph."""

    name: str = ""
    domain: str = ""
    overload: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, object] = field(default_factory=dict)
    """Attributes with a default, and those without as None."""
    nodes: list[Node] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Model:
    graph: Graph
    opsets: dict[str, int]
    functions: dict[tuple[str, str, str], Function]
