"""Proves that the rows of an ONNX model are independent, operator by operator from its graph, or gives up.

Rows of different requests may share a run only if each row's output is a function of that row, regardless of
number and content of the other rows. For each value of the graph this module determines the row axis, and
that each row depends on the same row of the inputs alone (:mod:`tether.frameworks.row_proof.facts`); rules
for single operators are in the ``rules_`` modules. An operator without a rule, or used in a way unknown to
its rule, ends the proof. Numbers count as exact: a run of another size may round differently.
"""

from __future__ import annotations

import mmap
from collections import ChainMap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tether.frameworks.onnx.graph import Unreadable, read
from tether.frameworks.onnx.model import Axis, Declared, Function, Graph, Model, Node
from tether.frameworks.row_proof import shape_values
from tether.frameworks.row_proof.facts import (
    MICROSOFT,
    ML,
    OLDEST,
    RULES,
    UNKNOWN,
    Context,
    Fact,
    Mixes,
    Rows,
    constant,
    fact,
)
from tether.frameworks.row_proof.rules import (
    attention,
    control,
    elementwise,
    linear,
    lookup,
    ml,
    norm,
    places,
    quantized,
    recurrent,
    shape,
)
from tether.frameworks.row_proof.sizes import ROWS, Algebra, Size

FAMILIES = (attention, control, elementwise, linear, lookup, ml, norm, places, quantized, recurrent, shape)
"""Modules that register the rules when imported."""

NEWEST = {"": 26, ML: 5, MICROSOFT: 1}
"""Newest version of each operator set known to the rules."""
MAX_STEPS = 200_000
"""Maximum nodes and constants to process, counting those of loops and functions each time."""
MAX_FUNCTIONS = 16
"""Maximum depth of calls between functions."""

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_WHY = {
    **dict.fromkeys(_RANDOM, "draws random numbers"),
    "Compress": "keeps as many rows as it likes",
    "DynamicQuantizeLinear": "takes one scale from all rows",
    "DynamicQuantizeMatMul": "takes one scale from all rows",
    "DynamicQuantizeLSTM": "takes one scale from all rows",
    "NonMaxSuppression": "lists boxes of all rows together",
    "NonZero": "lists elements of all rows together",
    "Tokenizer": "fills each text up to the longest of all rows",
    "Unique": "compares all rows",
}


class RowProof(NamedTuple):
    """``reason``: in one line, why row independence is not proven; empty if it is."""

    independent: bool
    reason: str = ""


def prove(path: Path) -> RowProof:
    """Prove that each row of the outputs depends on the same row of the inputs alone.

    Independent means: all inputs and outputs have the rows on their first axis, and a run of several requests
    of equal shapes, joined on that axis, gives each the rows that it gets alone. Never raises for the content
    of a file.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                return RowProof(independent=False, reason="the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                model = read(data)
        return _proof(model)
    except (Unreadable, Mixes) as error:
        return RowProof(independent=False, reason=_plain(str(error)))
    except OSError:
        return RowProof(independent=False, reason="the file cannot be read")
    except Exception as error:  # noqa: BLE001 - whatever a damaged graph makes of a rule, no proof is the safe answer
        return RowProof(independent=False, reason=f"its graph cannot be followed ({type(error).__name__})")


def _proof(model: Model) -> RowProof:
    for domain, name, _ in model.functions:
        if domain in NEWEST or (domain, name) in RULES:
            raise Mixes(f"the model has a function of its own for '{name}', an operator of ONNX")
    _check_opsets(model.opsets)
    inputs = [one for one in model.graph.inputs if one.name not in model.graph.constants]
    if not inputs:
        raise Mixes("the model has no inputs")
    if not model.graph.outputs:
        raise Mixes("the model has no outputs")
    algebra = Algebra()
    facts = _input_facts(inputs, algebra)
    found = _Run(model, algebra).graph(model.graph, facts)
    for declared in model.graph.outputs:
        value = found[declared.name]
        if isinstance(value, Mixes):
            raise value
        if value.rows != Rows(0):
            raise Mixes(_why_no_rows(declared.name, value))
    return RowProof(independent=True)


def _why_no_rows(name: str, value: Fact) -> str:
    if value.rows is None:
        return f"output '{_plain(name)}' is the same for all rows, or has no axis for them"
    return f"output '{_plain(name)}' does not have the rows on its first axis, one for one"


def _check_opsets(opsets: dict[str, int]) -> None:
    for domain, version in opsets.items():
        if domain in NEWEST and not OLDEST[domain] <= version <= NEWEST[domain]:
            raise Mixes(
                f"operator set {domain or 'ai.onnx'} {version} is not known here, only {OLDEST[domain]} "
                f"to {NEWEST[domain]}"
            )


def _input_facts(inputs: Sequence[Declared], algebra: Algebra) -> dict[str, Fact]:
    first = _first_axis(inputs[0])
    found = {}
    for declared in inputs:
        name = _plain(declared.name)
        own = _first_axis(declared)
        if own != first:
            raise Mixes(f"inputs '{_plain(inputs[0].name)}' and '{name}' have first axes of different names")
        if own is not None and own in (declared.shape or ())[1:]:
            raise Mixes(f"the first axis of input '{name}' is another of its axes too")
        found[declared.name] = fact(
            [
                ROWS,
                *(_axis(size, algebra, declared.name, axis) for axis, size in enumerate((declared.shape or ())[1:], 1)),
            ],
            Rows(0),
        )
    return found


def _first_axis(declared: Declared) -> Axis:
    name = _plain(declared.name)
    if not declared.kind:
        raise Mixes(f"input '{name}' is not a tensor")
    if not declared.shape or isinstance(declared.shape[0], int):
        raise Mixes(f"input '{name}' has no free first axis")
    return declared.shape[0]


def _axis(size: Axis, algebra: Algebra, name: str, axis: int) -> Size:
    """Give open axes of one name different symbols, because requests need not give them one size."""
    return Size(size) if isinstance(size, int) and size > 0 else algebra.symbol("input", name, axis)


Value = Fact | Mixes
Scope = ChainMap[str, Value]
"""Values by name: those of a graph before those of the outer graphs."""


class _Run:
    """Processes the nodes of a model, each after its inputs."""

    def __init__(self, model: Model, algebra: Algebra) -> None:
        self._model = model
        self._algebra = algebra
        self._steps = 0
        self._functions = 0
        self._serial = 0

    def graph(
        self, graph: Graph, inputs: dict[str, Fact], outer: Scope | None = None, opsets: dict[str, int] | None = None
    ) -> Scope:
        """Return facts of all values that the outputs of a graph need."""
        self._count(len(graph.nodes) + len(graph.constants) + len(graph.declared))
        scope: Scope = outer.new_child() if outer is not None else ChainMap()
        scope.update(inputs)
        scope.update({name: constant(value) for name, value in graph.constants.items()})
        fixed = _fixed_axes(graph)
        self._look(graph.nodes, [one.name for one in graph.outputs], scope, fixed, opsets or self._model.opsets)
        return scope

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise Mixes(f"the graph takes more than {MAX_STEPS} steps to follow")

    def _look(
        self,
        nodes: Iterable[Node],
        wanted: Iterable[str],
        scope: Scope,
        fixed: dict[str, tuple[Axis, ...]],
        opsets: dict[str, int],
    ) -> None:
        makers: dict[str, Node] = {}
        for node in nodes:
            for name in node.outputs:
                if name and (name in makers or name in scope):
                    raise Mixes(f"the model makes '{_plain(name)}' twice")
                makers[name] = node
        open_nodes: set[int] = set()
        stack = list(wanted)
        while stack:
            name = stack[-1]
            if name in scope:
                stack.pop()
                continue
            maker = makers.get(name)
            if maker is None:
                raise Mixes(f"the model uses '{_plain(name)}', which nothing makes")
            missing = [one for one in maker.inputs if one and one not in scope]
            missing += [one for one in maker.captures if one in makers and one not in scope]
            if missing:
                if id(maker) in open_nodes:
                    raise Mixes(f"operator {_title(maker)} needs its own output")
                open_nodes.add(id(maker))
                stack += missing
                continue
            self._step(maker, scope, fixed, opsets)

    def _step(self, node: Node, scope: Scope, fixed: dict[str, tuple[Axis, ...]], opsets: dict[str, int]) -> None:
        values = self._values(node, scope, opsets)
        for index, name in enumerate(node.outputs):
            value = values if isinstance(values, Mixes) else values[index] if index < len(values) else None
            if value is None:
                value = Mixes(f"operator {_title(node)} has an output that is not known")
            if isinstance(value, Fact) and name in fixed and _contradicts(fixed[name], value):
                value = Mixes(f"the file says that '{_plain(name)}' has as many rows whatever comes in")
            scope[name] = value

    def _values(self, node: Node, scope: Scope, opsets: dict[str, int]) -> list[Fact] | Mixes:
        inputs: list[Fact | None] = []
        for name in node.inputs:
            value = scope[name] if name else None
            if isinstance(value, Mixes):
                return value
            inputs.append(value)
        try:
            return self._apply(node, inputs, scope, opsets)
        except _Inside as error:
            return Mixes(str(error))
        except Mixes as error:
            return Mixes(f"operator {_title(node)} {error}")

    def _apply(self, node: Node, inputs: list[Fact | None], scope: Scope, opsets: dict[str, int]) -> list[Fact]:
        function = self._model.functions.get((node.domain, node.kind, node.overload))
        if function is not None:
            return self._call(function, node, inputs)
        if node.domain not in opsets or node.domain not in NEWEST:
            raise Mixes("is of an operator set that is not known")
        if node.references:
            raise Mixes("has an attribute of a function and is in none")

        def run_graph(graph: Graph, values: Sequence[Fact]) -> list[Fact]:
            return self._inner(graph, values, scope, opsets)

        self._serial += 1
        context = Context(self._algebra, opsets[node.domain], self._serial, run_graph)
        known = shape_values.compute(node, inputs, context)
        if known is not None:
            return known
        return _by_rule(node, inputs, context)

    def _inner(self, graph: Graph, values: Sequence[Fact], scope: Scope, opsets: dict[str, int]) -> list[Fact]:
        """Return the outputs of a branch or a body."""
        named = {declared.name: value for declared, value in zip(graph.inputs, values, strict=True)}
        found = self.graph(graph, named, scope, opsets)
        return _facts(found, [one.name for one in graph.outputs])

    def _call(self, function: Function, node: Node, inputs: list[Fact | None]) -> list[Fact]:
        if self._functions >= MAX_FUNCTIONS:
            raise Mixes("is a function that calls too many others")
        if any(version != self._model.opsets.get(domain, version) for domain, version in function.opsets.items()):
            raise Mixes("is a function of other operator sets than the model's, which ONNX Runtime does not heed")
        _check_opsets(function.opsets)
        self._count(len(function.nodes))
        scope: Scope = ChainMap()
        for index, name in enumerate(function.inputs):
            value = inputs[index] if index < len(inputs) else None
            if value is None:
                raise Mixes("is a function of which an input is left out")
            scope[name] = value
        attributes = {**function.attributes, **node.attributes}
        self._functions += 1
        try:
            nodes = [_bound(one, attributes) for one in function.nodes]
            self._look(nodes, function.outputs, scope, {}, function.opsets)
        except Mixes as error:
            raise _Inside(str(error)) from error
        finally:
            self._functions -= 1
        return _facts(scope, function.outputs)


def _by_rule(node: Node, inputs: list[Fact | None], context: Context) -> list[Fact]:
    entry = RULES.get((node.domain, node.kind))
    if entry is None or context.opset < entry.since:
        same = all(one is None or _is_uniform(one) for one in inputs) and not node.captures
        if same and node.domain == "" and node.kind not in _RANDOM:
            return [UNKNOWN] * len(node.outputs)
        raise Mixes(_WHY.get(node.kind, "may mix rows"))
    for index, value in enumerate(inputs):
        if value is not None and value.counts and index not in entry.sizes:
            raise Mixes("computes with the number of rows")
    return entry.rule(node, inputs, context)


class _Inside(Mixes):
    """A reason that already names an operator: one inside a function, a branch or a body."""


def _facts(scope: Scope, names: Iterable[str]) -> list[Fact]:
    found = []
    for name in names:
        value = scope[name]
        if isinstance(value, Mixes):
            raise _Inside(str(value))
        found.append(value)
    return found


def _bound(node: Node, attributes: dict[str, object]) -> Node:
    """Return a function's node with the attributes of the call."""
    if any(isinstance(value, Graph) for value in node.attributes.values()) or node.captures:
        raise Mixes(f"operator {_title(node)} has a graph inside of a function")
    if not node.references:
        return node
    bound = {own: attributes[name] for own, name in node.references.items() if attributes.get(name) is not None}
    return Node(
        node.kind, node.domain, node.name, node.overload, node.inputs, node.outputs, {**node.attributes, **bound}
    )


def _needs(node: Node) -> list[str]:
    return [name for name in (*node.inputs, *node.captures) if name]


def _is_uniform(value: Fact) -> bool:
    return value.rows is None and not value.counts


def _fixed_axes(graph: Graph) -> dict[str, tuple[Axis, ...]]:
    """Apply shapes that the file declares for inner values, where a runtime may rely on them."""
    used = {name for node in graph.nodes for name in _needs(node)}
    declared = [*graph.declared, *(one for one in graph.outputs if one.name in used)]
    return {one.name: one.shape for one in declared if one.shape is not None}


def _contradicts(shape: tuple[Axis, ...], value: Fact) -> bool:
    if value.rows is None:
        return False
    return len(shape) != value.rank or isinstance(shape[value.rows.axis], int)


def _title(node: Node) -> str:
    name = f"node '{_plain(node.name)}'" if node.name else f"output '{_plain(next(iter(node.outputs), ''))}'"
    return f"{_plain(node.kind)} ({name})"


def _plain(text: str) -> str:
    """Return text of a file in one line, without terminal control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:200]
