"""Runs TensorFlow Lite models with LiteRT: one file that includes its signature.

LiteRT trusts offsets in a file, so a model counts as a program: it is opened only in processes that may
crash.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from tether.domain.manifest import TensorSpec
from tether.domain.signature import chosen
from tether.domain.tensor import NUMPY_DTYPES, Array
from tether.errors import ModelRejected

FILE = "model.tflite"
_LACKING = ("unresolved custom op", "Select TensorFlow op")
"""LiteRT's messages about a missing operator."""
_NODE = re.compile(r"Node number \d+ \((.*?)\) failed to prepare", re.DOTALL)
_IDENTIFIER = b"TFL3"
_MOST_OPERATORS = 4096
"""Maximum kinds of operators in one model; about 200 exist."""
_DATATYPES = {np.dtype(dtype): datatype for datatype, dtype in NUMPY_DTYPES.items()}


class LiteModel:
    """A model in an interpreter, and its signature; see :class:`tether.frameworks.runtime.Runtime`."""

    def __init__(self, path: Path, threads: int, signature: str) -> None:
        self._interpreter: Any = Interpreter(model_path=str(path), num_threads=threads)
        fault = _prepared(self._interpreter)
        known = self._interpreter.get_signature_list()
        self.signatures = tuple(sorted(known))
        self.signature = chosen(self.signatures, signature) if known or signature else ""
        self._run: Any = (
            self._interpreter.get_signature_runner(self.signature) if known else _Unsigned(self._interpreter)
        )
        self.inputs = _specs(self._run.get_input_details())
        self.outputs = _specs(self._run.get_output_details())
        if fault is not None and not any(-1 in spec.shape for spec in self.inputs):
            raise fault

    @property
    def output_names(self) -> Sequence[str]:
        return tuple(spec.name for spec in self.outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names the requested outputs, empty for all in the model's order."""
        given = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self.inputs}
        try:
            found = self._run(**given)  # first allocates tensors for the inputs' shapes
        finally:
            self._interpreter.reset_all_variables()  # recurrent layers: their state belongs to this caller only
        return [found[name] for name in outputs or self.output_names]

    def close(self) -> None:
        self._interpreter = self._run = None


class _Unsigned:
    """A file without signatures: the inputs and outputs of its first graph, named after their tensors.
    Duplicate names get
    their position appended.
    """

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._inputs = _named(interpreter.get_input_details())
        self._outputs = _named(interpreter.get_output_details())

    def get_input_details(self) -> Mapping[str, Any]:
        return self._inputs

    def get_output_details(self) -> Mapping[str, Any]:
        return self._outputs

    def __call__(self, **given: Array) -> dict[str, Array]:
        for name, array in given.items():
            self._interpreter.resize_tensor_input(self._inputs[name]["index"], array.shape)
        self._interpreter.allocate_tensors()
        for name, array in given.items():
            self._interpreter.set_tensor(self._inputs[name]["index"], array)
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(found["index"]) for name, found in self._outputs.items()}


def _named(details: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    names = [str(found["name"]) for found in details]
    places = range(len(names))
    named = [
        f"{names[place]}_{place}" if names.count(names[place]) > 1 or not names[place] else names[place]
        for place in places
    ]
    return dict(zip(named, details, strict=True))


def load(directory: Path, *, threads: int = 1, device: str = "auto", signature: str = "") -> LiteModel:
    """Load the ``model.tflite`` of a folder on the processor. Serves ``signature``, see
    :func:`tether.domain.signature.chosen`; a file without signatures is served by its tensors.

    Raises:
        ModelRejected: not a model, operators that LiteRT lacks, or no signature that can be served.
    """
    if device == "cuda":
        raise ModelRejected("TensorFlow Lite models run on the processor; let it run on 'auto' or 'cpu'", field="kind")
    path = directory / FILE
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            check(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            check(content)
    return LiteModel(path, threads, signature)


def _prepared(interpreter: Any) -> RuntimeError | None:
    """Allocate tensors for the file's input shapes, and translate LiteRT's error.

    Raises:
        ModelRejected: naming a missing operator.
    """
    try:
        interpreter.allocate_tensors()
    except RuntimeError as error:
        text = str(error)
        if not any(words in text for words in _LACKING):
            return error
        node = _NODE.search(text)
        raise ModelRejected(
            f"the model needs the operator '{_plain(node[1] if node else '')}', which LiteRT does not "
            "have; convert it with "
            "TFLITE_BUILTINS only, without Select TensorFlow and custom operators",
            field="file",
        ) from error
    return None


def _plain(name: str) -> str:
    return "".join(filter(str.isprintable, name))[:64] or "without a name"


def check(content: bytes | mmap.mmap) -> None:
    """Check a file before LiteRT opens it.

    Raises:
        ModelRejected: not a model, or one that needs more than its own bytes and LiteRT.
    """
    if content[4:8] != _IDENTIFIER:
        raise ModelRejected(
            "the file is not a TensorFlow Lite model: it lacks 'TFL3' at its 5th byte; push a file of "
            "tf.lite.TFLiteConverter",
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
    except (struct.error, IndexError, ValueError, TypeError, OverflowError) as error:
        raise ModelRejected(
            "the file is damaged: an offset exceeds its size; convert the model again", field="file"
        ) from error


def _specs(details: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Return specs sorted by name: LiteRT's own order is not from the file."""
    return tuple(_spec(name, found) for name, found in sorted(details.items()))


def _spec(name: str, found: Mapping[str, Any]) -> TensorSpec:
    datatype = _DATATYPES.get(np.dtype(found["dtype"]))
    if datatype is None:
        raise ModelRejected(f"'{name[:64]}' holds {np.dtype(found['dtype'])}; only numbers can be served", field="file")
    shape = found["shape_signature"] if len(found["shape_signature"]) else found["shape"]
    return TensorSpec(name, datatype, tuple(int(axis) for axis in shape))
