"""Reads an ONNX graph from its file without the ``onnx`` package.

Field numbers are those of ``onnx.proto3``. What a protobuf parser would accept but no exporter writes (a field of
another wire type, a single message that is there twice) is refused, because parsers differ in what they make of it.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np

from tether.frameworks.onnx.model import (
    DTYPES,
    MAX_VALUES,
    Axis,
    Constant,
    Declared,
    Function,
    Graph,
    Many,
    Model,
    Node,
)
from tether.frameworks.onnx.protobuf import BYTES, FIXED32, VARINT, Buffer, Field, NotProtobuf, Reader, signed

MAX_FIELDS = 4_000_000
MAX_NODES = 100_000
"""Maximum nodes of all graphs and functions together."""
MAX_DEPTH = 16
"""Maximum nesting of graphs."""
MAX_NAME = 4096
MAX_AXES = 32


class Unreadable(ValueError):
    """The file is not ONNX as exporters write it, or exceeds the bounds of this module."""


def read(data: Buffer) -> Model:
    """Read the model from the bytes of a file.

    Raises:
        Unreadable: it is not ONNX as exporters write it, or too large.
    """
    try:
        return _Reading(data).model(len(data))
    except (NotProtobuf, struct.error) as error:
        raise Unreadable(str(error)) from error


class _Reading:
    def __init__(self, data: Buffer) -> None:
        self._reader = Reader(data, MAX_FIELDS)
        self._nodes = 0

    def model(self, length: int) -> Model:
        graphs: list[Field] = []
        opsets: dict[str, int] = {}
        functions: dict[tuple[str, str, str], Function] = {}
        for part in self._reader.fields(0, length):
            if part.number == 7:
                graphs.append(self._message(part))
            elif part.number == 8:
                self._opset(part, opsets)
            elif part.number == 25:
                function = self._function(part)
                if functions.setdefault((function.domain, function.name, function.overload), function) is not function:
                    raise Unreadable("it has a function twice")
        if len(graphs) != 1:
            raise Unreadable("it has not one graph")
        return Model(self._graph(graphs[0], 0), opsets, functions)

    def _each(self, message: Field) -> Iterator[Field]:
        self._message(message)
        return self._reader.fields(message.start, message.end)

    @staticmethod
    def _message(part: Field) -> Field:
        if part.kind != BYTES:
            raise Unreadable("a field has another type")
        return part

    def _raw(self, part: Field) -> bytes:
        self._message(part)
        if part.end - part.start > MAX_NAME:
            raise Unreadable("a name is too long")
        return self._reader.bytes_of(part, MAX_NAME)

    def _text(self, part: Field) -> str:
        try:
            return self._raw(part).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable("a name is not UTF-8") from error

    @staticmethod
    def _number(part: Field) -> int:
        if part.kind != VARINT:
            raise Unreadable("a field has another type")
        return signed(part.value)

    def _axes(self, part: Field) -> list[int]:
        if part.kind not in (VARINT, BYTES):
            raise Unreadable("a field has another type")
        return [signed(value) for value in itertools.islice(self._reader.varints(part), MAX_AXES + 1)]

    def _opset(self, part: Field, opsets: dict[str, int]) -> None:
        domain, version = "", 0
        for inner in self._each(part):
            if inner.number == 1:
                domain = plain_domain(self._text(inner))
            elif inner.number == 2:
                version = self._number(inner)
        if opsets.setdefault(domain, version) != version:
            raise Unreadable("it names two versions of one operator set")

    def _graph(self, message: Field, depth: int) -> Graph:
        if depth > MAX_DEPTH:
            raise Unreadable("its graphs are nested too deeply")
        graph = Graph()
        for part in self._each(message):
            if part.number == 1:
                graph.nodes.append(self._node(part, depth))
            elif part.number == 5:
                self._initializer(part, graph)
            elif part.number in (11, 12, 13):
                {11: graph.inputs, 12: graph.outputs, 13: graph.declared}[part.number].append(self._declared(part))
            elif part.number == 15:
                self._sparse_initializer(part, graph)
        return graph

    def _node(self, message: Field, depth: int) -> Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise Unreadable(f"it has more than {MAX_NODES} nodes")
        node = Node()
        texts: dict[int, str] = {}
        for part in self._each(message):
            if part.number == 1:
                node.inputs.append(self._text(part))
            elif part.number == 2:
                node.outputs.append(self._text(part))
            elif part.number == 5:
                self._attribute(part, node, depth)
            elif part.number in (3, 4, 7, 8):
                if part.number in texts:
                    raise Unreadable("a node's field is there twice")
                texts[part.number] = self._text(part)
        node.name, node.kind = texts.get(3, ""), texts.get(4, "")
        node.domain, node.overload = plain_domain(texts.get(7, "")), texts.get(8, "")
        node.captures = frozenset().union(
            *(_captured(value) for value in node.attributes.values() if isinstance(value, Graph))
        )
        return node

    def _attribute(self, message: Field, node: Node, depth: int) -> None:
        name, reference, value = self._attribute_parts(message, depth)
        if name in node.attributes or name in node.references:
            raise Unreadable("a node has an attribute twice")
        if reference:
            node.references[name] = reference
        else:
            node.attributes[name] = value

    def _attribute_parts(self, message: Field, depth: int) -> tuple[str, str, object]:
        name = reference = ""
        values: dict[int, object] = {}
        kind = 0
        for part in self._each(message):
            if part.number in (7, 8, 9):
                values[part.number] = self._longer(values.get(part.number, []), part)
            elif part.number == 1:
                name = self._text(part)
            elif part.number == 21:
                reference = self._text(part)
            elif part.number == 20:
                kind = self._number(part)
            elif part.number != 13:
                if part.number in values:
                    raise Unreadable("an attribute has a value twice")
                values[part.number] = self._value(part, depth)
        if len(values) > 1:
            raise Unreadable("an attribute has values of several types")
        # Protobuf omits a single value that is its type's default, and empty lists.
        value = next(iter(values.values())) if values else {1: 0.0, 2: 0, 3: b""}.get(kind, [])
        return name, reference, value

    def _longer(self, known: object, part: Field) -> object:
        """Extend a list by one more occurrence of its field, which may have any number of elements."""
        if isinstance(known, Many):
            return Many(known.length + sum(1 for _ in self._elements(part)))
        if not isinstance(known, list):
            raise Unreadable("an attribute has values of several types")
        more = self._elements(part)
        known += itertools.islice(more, MAX_VALUES + 1 - len(known))
        return known if len(known) <= MAX_VALUES else Many(len(known) + sum(1 for _ in more))

    def _elements(self, part: Field) -> Iterator[object]:
        if part.number == 7:
            yield from self._floats(part)
        elif part.number == 9:
            yield b""
        elif part.kind in (VARINT, BYTES):
            yield from (signed(value) for value in self._reader.varints(part))
        else:
            raise Unreadable("a field has another type")

    def _value(self, part: Field, depth: int) -> object:
        if part.number == 2:
            return self._float(part)
        if part.number == 3:
            return self._number(part)
        if part.number == 4:
            return self._string(part)
        if part.number == 5:
            return self._tensor(part)
        return self._graph(part, depth + 1) if part.number == 6 else None

    def _string(self, part: Field) -> bytes:
        """Read a string attribute: names of modes are short, and longer ones (string constants) are irrelevant."""
        self._message(part)
        return self._reader.bytes_of(part, MAX_NAME)

    def _float(self, part: Field) -> float:
        if part.kind != FIXED32:
            raise Unreadable("a field has another type")
        return float(struct.unpack("<f", self._reader.data[part.start : part.end])[0])

    def _floats(self, part: Field) -> Iterator[float]:
        if part.kind == FIXED32:
            yield self._float(part)
        elif (part.end - part.start) % 4 or part.kind != BYTES:
            raise Unreadable("a list of numbers ends within one")
        else:
            for start in range(part.start, part.end, 4):
                yield struct.unpack("<f", self._reader.data[start : start + 4])[0]

    def _initializer(self, part: Field, graph: Graph) -> None:
        self._constant(part, self._tensor(part), graph)

    def _constant(self, part: Field, value: Constant, graph: Graph) -> None:
        names = [self._text(inner) for inner in self._each(part) if inner.number == 8]
        if len(names) > 1:
            raise Unreadable("a constant has two names")
        name = names[0] if names else ""
        if name in graph.constants:
            raise Unreadable("it has a constant twice")
        graph.constants[name] = value

    def _sparse_initializer(self, part: Field, graph: Graph) -> None:
        values: list[Field] = []
        shape = []
        for inner in self._each(part):
            if inner.number == 1:
                values.append(inner)
            elif inner.number == 3:
                shape += self._axes(inner)
        if len(values) != 1:
            raise Unreadable("a sparse constant has not one list of values")
        self._constant(values[0], Constant(_sizes(shape), None), graph)

    def _tensor(self, message: Field) -> Constant:
        shape: list[int] = []
        kind = 0
        stored: list[Field] = []
        elsewhere = False
        for part in self._each(message):
            if part.number == 1:
                shape += self._axes(part)
            elif part.number == 2:
                kind = self._number(part)
            elif part.number in (4, 5, 7, 9, 10, 11):
                stored.append(part)
            elif part.number in (3, 13, 14):
                elsewhere = True
        if len(shape) > MAX_AXES:
            raise Unreadable("a tensor has too many axes")
        sizes = _sizes(shape)
        count = 1
        for size in sizes:
            count = min(count * size, MAX_VALUES + 1)
        if elsewhere or count > MAX_VALUES or kind not in DTYPES:
            return Constant(sizes, None, kind)
        return Constant(sizes, self._values(stored, sizes, kind, count), kind)

    def _values(self, stored: list[Field], shape: tuple[int, ...], kind: int, count: int) -> np.ndarray | None:
        """Read the elements, if they are in the usual field for their type, and as many as the shape requires."""
        dtype = np.dtype(DTYPES[kind])
        if count == 0:
            return np.zeros(shape, dtype)
        if len({part.number for part in stored}) != 1:
            return None
        if stored[0].number in (5, 7, 11):
            whole = [signed(value) for part in stored for value in self._bounded(part)]
            if len(whole) != count or kind in (1, 10, 11):
                return None
            return np.array(whole, object).astype(dtype).reshape(shape)
        width = np.dtype({4: "<f4", 10: "<f8"}.get(stored[0].number, dtype.str))
        raw = b"".join(self._reader.bytes_of(part, MAX_VALUES * 8 + 1) for part in stored[: MAX_VALUES + 1])
        if len(raw) != count * width.itemsize or (width != dtype and stored[0].number != 9):
            return None
        return np.frombuffer(raw, width).astype(dtype).reshape(shape)

    def _bounded(self, part: Field) -> Iterator[int]:
        for index, value in enumerate(self._reader.varints(part)):
            if index > MAX_VALUES:
                raise Unreadable("a tensor has more values than its shape says")
            yield value

    def _declared(self, message: Field) -> Declared:
        name, kind, shape = "", 0, None
        for part in self._each(message):
            if part.number == 1:
                name = self._text(part)
            elif part.number == 2:
                for tensor in self._each(part):
                    if tensor.number == 1:
                        kind, shape = self._tensor_type(tensor)
        return Declared(name, kind, shape)

    def _tensor_type(self, message: Field) -> tuple[int, tuple[Axis, ...] | None]:
        kind, shape = 0, None
        for part in self._each(message):
            if part.number == 1:
                kind = self._number(part)
            elif part.number == 2:
                shape = (*(shape or ()), *(self._axis(dim) for dim in self._each(part) if dim.number == 1))
                if len(shape) > MAX_AXES:
                    raise Unreadable("a value has too many axes")
        return kind, shape

    def _axis(self, message: Field) -> Axis:
        found: Axis = None
        for part in self._each(message):
            if part.number == 1:
                size = self._number(part)
                found = size if size >= 0 else None
            elif part.number == 2:
                found = self._text(part) or None
        return found

    def _function(self, message: Field) -> Function:
        found = Function()
        texts: dict[int, str] = {}
        for part in self._each(message):
            if part.number in (1, 10, 13):
                texts[part.number] = self._text(part)
            elif part.number in (4, 5):
                (found.inputs if part.number == 4 else found.outputs).append(self._text(part))
            elif part.number == 6:
                found.attributes.setdefault(self._text(part), None)
            elif part.number == 11:
                name, _, value = self._attribute_parts(part, 0)
                found.attributes[name] = value
            elif part.number == 7:
                found.nodes.append(self._node(part, 0))
            elif part.number == 9:
                self._opset(part, found.opsets)
        found.name, found.domain, found.overload = texts.get(1, ""), plain_domain(texts.get(10, "")), texts.get(13, "")
        return found


def plain_domain(domain: str) -> str:
    """Normalise ``ai.onnx``, which is the set without a name."""
    return "" if domain == "ai.onnx" else domain


def _sizes(shape: list[int]) -> tuple[int, ...]:
    if any(size < 0 for size in shape):
        raise Unreadable("a constant has a negative size")
    return tuple(shape)


def _captured(graph: Graph) -> frozenset[str]:
    """Return every name that a graph uses and does not define."""
    made = {*graph.constants, *(one.name for one in graph.inputs)}
    used = {one.name for one in graph.outputs}
    for node in graph.nodes:
        made.update(node.outputs)
        used.update(node.inputs, node.captures)
    return frozenset(used - made - {""})
