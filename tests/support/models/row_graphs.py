"""Drawn ONNX graphs of operators that keep rows apart and of ones that do not, for a search for proofs that are wrong.

Each step is run as it is drawn, on three rows, so only graphs that run come out. Constants often have three elements along
some axis, so that what was meant for rows may meet what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from support.models.graphs import Spec

ROWS = 3
OPSETS = (11, 12, 13, 17, 18, 21)
MAX_ELEMENTS = 4000

Draw = np.random.Generator
Step = Callable[["Drawn", Draw], None]


class Unusable(Exception):
    """A step that does not fit what there is."""


@dataclass
class Drawn:
    """A graph so far, with the values of one run of three rows."""

    opset: int
    values: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def name(self) -> str:
        return f"v{len(self.values) + len(self.weights)}"

    def weight(self, array: Any) -> str:
        name = self.name()
        found = np.asarray(array)
        self.weights[name] = found.astype(np.float32) if found.dtype == np.float64 else found
        return name

    def pick(self, draw: Draw, rank: int = 1, kind: str = "f") -> str:
        """A value, rather a late one."""
        names = [
            name
            for name, array in self.values.items()
            if array.ndim >= rank and array.dtype.kind in kind and array.size
        ]
        if not names:
            raise Unusable
        return names[-1 - min(int(draw.exponential(0.7)), len(names) - 1)]

    def add(self, kind: str, inputs: list[str], outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """Run one operator and keep it."""
        names = [f"{self.name()}_{index}" for index in range(outputs)]
        made = helper.make_node(kind, inputs, names, domain=domain, **attributes)
        given = {name: self.values.get(name, self.weights.get(name)) for name in inputs if name}
        found = _run([made], {name: array for name, array in given.items() if array is not None}, names, self.opset)
        if any(array.size > MAX_ELEMENTS for array in found):
            raise Unusable
        self.nodes.append(made)
        self.values.update(zip(names, found, strict=True))
        return names

    def model(self, inputs: list[Spec], output: str) -> bytes:
        graph = helper.make_graph(
            self._needed(output),
            "drawn",
            [
                helper.make_tensor_value_info(name, _element(self.values[name]), list(shape))
                for name, _, shape in inputs
            ],
            [helper.make_tensor_value_info(output, _element(self.values[output]), None)],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        return _serialised(graph, self.opset)

    def _needed(self, output: str) -> list[Any]:
        """The nodes that the output comes from: one that nothing needs could only fail."""
        wanted, found = {output}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                found.append(node)
        return found[::-1]


def _element(array: np.ndarray) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def _serialised(graph: Any, opset: int) -> bytes:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run(nodes: list[Any], given: dict[str, np.ndarray], wanted: list[str], opset: int) -> list[np.ndarray]:
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info(name, _element(array), array.shape) for name, array in given.items()],
        [onnx.ValueInfoProto(name=name) for name in wanted],
    )
    try:
        return list(session(_serialised(graph, opset)).run(wanted, given))
    except Exception as error:
        raise Unusable from error


def drawn(seed: int, steps_known: Sequence[Step]) -> tuple[bytes, list[Spec]] | None:
    """A graph and its inputs, or None when nothing came of it."""
    draw = np.random.default_rng(seed)
    found = Drawn(int(draw.choice(OPSETS)))
    inputs: list[Spec] = []
    for index in range(int(draw.integers(1, 3))):
        shape = [int(size) for size in draw.integers(1, 5, draw.integers(1, 4))]
        shape[int(draw.integers(len(shape)))] = ROWS  # as many as rows, so that shapes alone tell nothing
        name = "xz"[index]
        found.values[name] = draw.standard_normal((ROWS, *shape)).astype(np.float32)
        inputs.append((name, "FP32", ("n", *shape)))
    steps = int(draw.integers(1, 7))
    for _ in range(4 * steps):
        if len(found.nodes) >= steps:
            break
        before = dict(found.values), list(found.nodes), dict(found.weights)
        try:
            steps_known[int(draw.integers(len(steps_known)))](found, draw)
        except Unusable:
            found.values, found.nodes, found.weights = before
    if not found.nodes:
        return None
    outputs = [name for node in found.nodes for name in node.output if found.values[name].ndim]
    if not outputs:
        return None
    return found.model(inputs, outputs[-1]), inputs


def some_axis(draw: Draw, array: np.ndarray) -> int:
    return int(draw.integers(-array.ndim, array.ndim))


def axes_given(found: Drawn, axes: list[int], *, since: int) -> tuple[list[str], dict[str, Any]]:
    """As an input or as an attribute, as the operator set has it."""
    return ([found.weight(np.array(axes, np.int64))], {}) if found.opset >= since else ([], {"axes": axes})
