"""ONNX graphs in a few words, for tests of what is proven about their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from support.models.models import value

from tether.frameworks.row_proof.prover import RowProof, prove

Spec = tuple[str, str, Sequence[int | str | None]]
"""Name, OIP datatype and shape of an input or output."""

X: Spec = ("x", "FP32", ("n", 4))
Y: Spec = ("y", "FP32", ("n", "m"))


def node(kind: str, inputs: str = "x", outputs: str = "y", **attributes: Any) -> Any:
    """A node; names are separated by spaces, ``-`` leaves one out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), **attributes)


def build(
    nodes: Sequence[Any],
    inputs: Sequence[Spec] = (X,),
    outputs: Sequence[Spec] = (Y,),
    weights: Mapping[str, Any] | None = None,
    *,
    opset: int = 17,
    ir: int = 10,
    declared: Sequence[Spec] = (),
    functions: Sequence[Any] = (),
) -> bytes:
    """The bytes of a model; weights are arrays by name, of float32 unless they are whole numbers."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [value(*one) for one in inputs],
        [value(*one) for one in outputs],
        [numpy_helper.from_array(_array(array), name) for name, array in (weights or {}).items()],
        value_info=[value(*one) for one in declared],
    )
    opsets = [
        helper.make_opsetid("", opset),
        helper.make_opsetid("ai.onnx.ml", 3),
        helper.make_opsetid("com.microsoft", 1),
        *[helper.make_opsetid(one.domain, 1) for one in functions if one.domain],
    ]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=list(functions))
    return bytes(proto.SerializeToString(deterministic=True))


def _array(array: Any) -> np.ndarray:
    found = np.asarray(array)
    return found.astype(np.float32) if found.dtype == np.float64 else found


def proof(folder: Path, content: bytes) -> RowProof:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return prove(path)


def attribute(name: str, of: str) -> Any:
    """An attribute of a function's node that is that of the function."""
    found = onnx.AttributeProto()
    found.name, found.ref_attr_name, found.type = name, of, onnx.AttributeProto.INT
    return found


SEQUENCE: Spec = ("x", "FP32", ("n", "t", 4))
IMAGE: Spec = ("x", "FP32", ("n", 3, 8, 8))
W44 = np.ones((4, 4), np.float32)
W33 = np.ones((5, 3, 3, 3), np.float32)
LSTM = {"w": np.ones((1, 12, 4), np.float32), "r": np.ones((1, 12, 3), np.float32)}


def shape_chain(*more: Any) -> list[Any]:
    """``b`` is the number of rows as a list of one, ``t`` the size of the second axis."""
    return [
        node("Shape", "x", "s"),
        constant("zero", 0),
        node("Gather", "s zero", "b0", axis=0),
        constant("one", 1),
        node("Gather", "s one", "t0", axis=0),
        constant("axes", [0]),
        node("Unsqueeze", "b0 axes", "b"),
        node("Unsqueeze", "t0 axes", "t"),
        *more,
    ]


def constant(name: str, value: Any) -> Any:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(value, np.int64)))
