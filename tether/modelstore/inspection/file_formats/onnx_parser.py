"""Checks an ONNX file from its protobuf bytes alone, before any library loads it.

The walk visits every graph, subgraph, function and tensor by its offsets. It copies no weights and needs no generated
code, so it also works where the ``onnx`` package is not installed. Field numbers are those of ``onnx.proto3``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tether.errors import FormatNotAllowed, InspectionLimitExceeded, UnsafeModel
from tether.frameworks.onnx.protobuf import BYTES, VARINT, Buffer, CutOff, Field, NotProtobuf, Reader, TooManyFields
from tether.modelstore.inspection.file_formats.onnx_external_data import LONGEST, MAX_AXES, External, reference, unsafe

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft"})
"""Operator sets included in ONNX Runtime; all others need external code."""

MAX_FIELDS = 4_000_000
MAX_NODES = 500_000
_MOST_IR = 1000
"""Above any real ir_version."""
MAX_DEPTH = 24
"""Maximum nesting of subgraphs."""


class OnnxFacts(NamedTuple):
    """``nodes`` counts the nodes of all graphs; ``unranked`` lists graph inputs without any shape.

    ``external`` lists weights in other files: their entries are valid, the files were not checked.
    """

    nodes: int
    unranked: tuple[str, ...]
    external: tuple[External, ...] = ()


def check_file(data: Buffer) -> OnnxFacts:
    """Walk a serialised ModelProto.

    Raises:
        FormatNotAllowed: not ONNX.
        UnsafeModel: external data outside a plain file beside the model, EPContext nodes, unknown operator
    sets.
        InspectionLimitExceeded: too large a graph.
    """
    walk = _OnnxWalker(data)
    try:
        return walk.model()
    except TooManyFields as error:
        raise InspectionLimitExceeded(f"the graph has more than {MAX_FIELDS} protobuf fields", field="file") from error
    except (NotProtobuf, IndexError, RecursionError) as error:
        raise (_cut_off(data) if isinstance(error, CutOff) and walk.began else _not_onnx(data)) from error


def _cut_off(data: Buffer) -> FormatNotAllowed:
    return FormatNotAllowed(
        f"the file begins as an ONNX model and is cut off: it ends after {len(data)} bytes, in the "
        "middle of a field; download or "
        "export it again",
        field="file",
    )


def _not_onnx(data: Buffer) -> FormatNotAllowed:
    if not len(data):
        return FormatNotAllowed("the file is empty: it has 0 bytes; export or download it again", field="file")
    return FormatNotAllowed("the file is not an ONNX model; export the model to ONNX and push that file", field="file")


class _OnnxWalker:
    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._reader = Reader(data, MAX_FIELDS)
        self._each = self._reader.fields
        self.began = False
        """The first bytes are an ONNX file's; whether the rest is, is not yet known."""
        self._nodes = 0
        self._own: set[str] = set()
        self._external: list[External] = []

    def model(self) -> OnnxFacts:
        fields = []
        for field in self._each(0, len(self._data)):
            fields.append(field)
            self.began = (fields[0].number, fields[0].kind) == (1, VARINT) and 0 < fields[0].value < _MOST_IR
        self.began = False
        graphs = [field for field in fields if field.number == 7 and field.kind == BYTES]
        functions = [field for field in fields if field.number == 25 and field.kind == BYTES]
        ir_version = next((field.value for field in fields if field.number == 1 and field.kind == VARINT), 0)
        if not graphs or not ir_version:
            raise _not_onnx(self._data)
        # Functions of the model are inlined before it runs, so their own domains are allowed.
        self._own = {self._text(part) for function in functions for part in self._inside(function, 10)}
        for graph in graphs:
            self._graph(graph, 0)
        for function in functions:
            self._parts(function, 0, {7: self._node, 11: self._attribute})
        for training in fields:
            if training.number == 20 and training.kind == BYTES:
                self._parts(training, 0, {1: self._graph, 2: self._graph})
        unranked = tuple(name for graph in graphs for part in self._inside(graph, 11) if (name := self._unranked(part)))
        return OnnxFacts(self._nodes, unranked, tuple(self._external))

    def _unranked(self, info: Field) -> str:
        name = "".join(self._text(part) for part in self._inside(info, 1))
        shapes = [
            shape
            for kind in self._inside(info, 2)
            for tensor in self._inside(kind, 1)
            for shape in self._inside(tensor, 2)
        ]
        tensors = [tensor for kind in self._inside(info, 2) for tensor in self._inside(kind, 1)]
        return name if tensors and not shapes else ""

    def _graph(self, graph: Field, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InspectionLimitExceeded(f"the graph has subgraphs nested deeper than {MAX_DEPTH}", field="file")
        self._parts(graph, depth, {1: self._node, 5: self._initializer, 15: self._sparse})

    def _node(self, node: Field, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise InspectionLimitExceeded(f"the graph has more than {MAX_NODES} nodes", field="file")
        kind = domain = ""
        for part in self._each(node.start, node.end):
            if part.kind != BYTES:
                continue
            if part.number == 4:
                kind = self._text(part)
            elif part.number == 7:
                domain = self._text(part)
            elif part.number == 5:
                self._attribute(part, depth)
        self._operator(kind, domain)

    def _operator(self, kind: str, domain: str) -> None:
        if kind == "EPContext":
            raise UnsafeModel(
                "the graph holds a compiled EPContext node; push the model as it was before compilation", field="file"
            )
        if domain not in DOMAINS and domain not in self._own:
            raise UnsafeModel(
                f"operator '{kind[:64]}' is from the operator set '{domain[:64]}', which needs a custom library; "
                "export with standard ONNX operators only",
                field="file",
            )

    def _attribute(self, attribute: Field, depth: int) -> None:
        deeper = depth + 1
        self._parts(
            attribute,
            deeper,
            {5: self._tensor, 10: self._tensor, 6: self._graph, 11: self._graph, 22: self._sparse, 23: self._sparse},
        )

    def _sparse(self, sparse: Field, depth: int) -> None:
        self._parts(sparse, depth, {1: self._tensor, 2: self._tensor})

    def _tensor(self, tensor: Field, _depth: int) -> None:
        """Check a tensor that must contain its own values: only a graph's initializers may be external."""
        fields = list(self._each(tensor.start, tensor.end))
        if any(_points_elsewhere(part) for part in fields):
            name = "".join(self._text(part) for part in fields if part.number == 8 and part.kind == BYTES)
            raise UnsafeModel(
                f"tensor '{name[:64]}', an attribute of an operator, keeps its values in another file (external data); "
                "save it with convert_attribute=False",
                field="file",
            )

    def _initializer(self, tensor: Field, _depth: int) -> None:
        fields = list(self._each(tensor.start, tensor.end))
        if any(_points_elsewhere(part) for part in fields):
            self._external.append(self._reference(fields))

    def _reference(self, fields: list[Field]) -> External:
        """Return the external location of an initializer, if it is stated in one unambiguous way.

        Protobuf parsers differ on repeated fields and on lists in place of single values, so both are
        refused.
        """
        name = "".join(self._text(part) for part in fields if part.number == 8 and part.kind == BYTES)
        locations = [part for part in fields if part.number == 14]
        kinds = [part.value for part in fields if part.number == 2 and part.kind == VARINT]
        entries = [part for part in fields if part.number == 13]
        if [(part.kind, part.value) for part in locations] != [(VARINT, 1)] or len(kinds) != 1:
            raise unsafe(name, "states the location of its values in an unusual way")
        if any(part.kind != BYTES for part in entries) or any(part.number == 9 for part in fields):
            raise unsafe(name, "also has values of its own")
        said = [self._entry(name, entry) for entry in entries]
        return reference(name, said, kinds[0], list(itertools.islice(self._axes(fields), MAX_AXES + 1)))

    def _entry(self, name: str, entry: Field) -> tuple[str, str]:
        parts = list(self._each(entry.start, entry.end))
        if [(part.number, part.kind) for part in parts] != [(1, BYTES), (2, BYTES)]:
            raise unsafe(name, "states the location of its values in an unusual way")
        if any(part.end - part.start > LONGEST for part in parts):
            raise unsafe(name, "has an overlong key or value")
        key, value = (bytes(self._data[part.start : part.end]).decode("utf-8", "replace") for part in parts)
        return key, value

    def _axes(self, fields: list[Field]) -> Iterator[int]:
        for part in fields:
            if part.number == 1:
                yield from self._reader.varints(part)

    def _parts(self, field: Field, depth: int, visitors: dict[int, Callable[[Field, int], None]]) -> None:
        for part in self._each(field.start, field.end):
            visit = visitors.get(part.number)
            if visit is not None and part.kind == BYTES:
                visit(part, depth)

    def _inside(self, field: Field, number: int) -> Iterator[Field]:
        return (part for part in self._each(field.start, field.end) if part.number == number and part.kind == BYTES)

    def _text(self, field: Field) -> str:
        return self._reader.bytes_of(field, 256).decode("utf-8", "replace")


def _points_elsewhere(part: Field) -> bool:
    """Return whether a field could be ``external_data`` or a non-default ``data_location``, in any encoding."""
    return part.number == 13 or (part.number == 14 and (part.kind != VARINT or bool(part.value)))
