"""TensorFlow Lite models, run by LiteRT: one file that says its own signature.

LiteRT trusts offsets in a file that it is given, so a model is a program: it is opened in processes that may end by it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from tether.errors import ModelRejected
from tether.model import TensorSpec
from tether.tensor import NUMPY_DTYPES, Array

FILE = "model.tflite"
SIGNATURE = "serving_default"
_IDENTIFIER = b"TFL3"
_MOST_OPERATORS = 4096
"""Kinds of operators of one model; there are some 200."""
_DATATYPES = {np.dtype(dtype): datatype for datatype, dtype in NUMPY_DTYPES.items()}


class LiteModel:
    """A model in an interpreter, and its signature; see :class:`tether.ports.Runtime`."""

    def __init__(self, path: Path, threads: int) -> None:
        self._interpreter: Any = Interpreter(model_path=str(path), num_threads=threads)
        self._run: Any = self._interpreter.get_signature_runner(_signature(self._interpreter.get_signature_list()))
        self.inputs = _specs(self._run.get_input_details())
        self.outputs = _specs(self._run.get_output_details())

    @property
    def output_names(self) -> Sequence[str]:
        return tuple(spec.name for spec in self.outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names what is wanted, empty for all in the model's order."""
        given = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self.inputs}
        try:
            found = self._run(**given)  # makes tensors of the inputs' shapes first
        finally:
            self._interpreter.reset_all_variables()  # what recurrent layers keep is no other caller's
        return [found[name] for name in outputs or self.output_names]

    def close(self) -> None:
        self._interpreter = self._run = None


def load(directory: Path, *, threads: int = 1, device: str = "auto") -> LiteModel:
    """Load the ``model.tflite`` of a folder, on the processor.

    Raises:
        ModelRejected: it is none, has operators that are not LiteRT's own, or no signature that can be served.
    """
    if device == "cuda":
        raise ModelRejected("TensorFlow Lite models run on the processor; let it run on 'auto' or 'cpu'", field="kind")
    path = directory / FILE
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            check(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            check(content)
    return LiteModel(path, threads)


def check(content: bytes | mmap.mmap) -> None:
    """Look at a file before LiteRT does.

    Raises:
        ModelRejected: it is no model, or one that needs more than its own bytes and LiteRT.
    """
    if content[4:8] != _IDENTIFIER:
        raise ModelRejected(
            "the file is no TensorFlow Lite model: it has no 'TFL3' at its 5th byte; push what tf.lite.TFLiteConverter wrote",
            field="file",
        )
    try:
        model = schema.Model.GetRootAs(content, 0)
        if not model.ExternalBuffersIsNone() or not model.ExternalBufferGroupsIsNone():
            raise ModelRejected("the model has weights in other files; convert it into one file", field="file")
        count = model.OperatorCodesLength()
        if not model.SubgraphsLength() or count > _MOST_OPERATORS:
            raise ModelRejected(
                f"the model has no graph, or more than {_MOST_OPERATORS} kinds of operators; convert it again",
                field="file",
            )
        foreign = [name for index in range(count) if (name := _foreign(model.OperatorCodes(index)))]
    except (struct.error, IndexError, ValueError, TypeError, OverflowError) as error:
        raise ModelRejected(
            "the file is damaged: it points to where it has no bytes; convert the model again", field="file"
        ) from error
    if foreign:
        raise ModelRejected(
            f"the model needs the operator '{foreign[0]}', which LiteRT does not have; convert it with "
            "TFLITE_BUILTINS only, without Select TensorFlow and custom operators",
            field="file",
        )


def _foreign(operator: Any) -> str:
    """The name of an operator that is not LiteRT's own; empty for others."""
    # files from before there were 128 kinds have the number in the other field
    if max(operator.BuiltinCode(), operator.DeprecatedBuiltinCode()) != schema.BuiltinOperator.CUSTOM:
        return ""
    name = "".join(filter(str.isprintable, bytes(operator.CustomCode() or b"").decode(errors="replace")))
    return name[:64] or "without a name"


def _signature(known: Mapping[str, Any]) -> str:
    if SIGNATURE in known:
        return SIGNATURE
    if len(known) == 1:
        return next(iter(known))
    there = ", ".join(f"'{name[:64]}'" for name in sorted(known)[:8]) or "none"
    raise ModelRejected(
        f"the model has no signature '{SIGNATURE}', and not one alone; it has: {there}. Convert it from a SavedModel "
        "or a function with names",
        field="file",
    )


def _specs(details: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Sorted by name: LiteRT's own order is none that the file says."""
    return tuple(_spec(name, found) for name, found in sorted(details.items()))


def _spec(name: str, found: Mapping[str, Any]) -> TensorSpec:
    datatype = _DATATYPES.get(np.dtype(found["dtype"]))
    if datatype is None:
        raise ModelRejected(f"'{name[:64]}' holds {np.dtype(found['dtype'])}; only numbers can be served", field="file")
    shape = found["shape_signature"] if len(found["shape_signature"]) else found["shape"]
    return TensorSpec(name, datatype, tuple(int(axis) for axis in shape))
