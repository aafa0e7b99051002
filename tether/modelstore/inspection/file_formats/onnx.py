"""The child process that inspects an ONNX model; see :mod:`tether.modelstore.inspection.sandbox`.

Before ONNX Runtime sees the file, :mod:`tether.modelstore.inspection.file_formats.onnx_parser` walks its protobuf and
refuses what could reach outside of the version's own files; no custom operator library is ever registered.
"""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from tether.domain.manifest import TensorSpec
from tether.errors import InspectionLimitExceeded, ModelRejected
from tether.frameworks.onnx import messages
from tether.frameworks.row_proof.prover import prove
from tether.modelstore.inspection import row_trials, sandbox, trial_runs
from tether.modelstore.inspection.file_formats import onnx_external_data, onnx_parser
from tether.modelstore.inspection.inspector import Inspection, Tell
from tether.storage.upload import MODEL_PATH

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
"""Maps ONNX Runtime's element names to OIP datatypes."""

MAX_TENSORS = 1024
_TENSOR = re.compile(r"tensor\((\w+)\)")


def inspect(directory: Path, tell: Tell) -> Inspection:
    """Describe the model after a few runs.

    Raises:
        ModelRejected: it cannot be served.
    """
    path = directory / MODEL_PATH
    facts = _walk(path)
    onnx_external_data.check_files(directory, facts.external)
    session = _load(path)
    inputs = _specs(session.get_inputs(), "input")
    inputs += tuple(replace(spec, optional=True) for spec in _specs(session.get_overridable_initializers(), "input"))
    outputs = _specs(session.get_outputs(), "output")
    if facts.unranked:
        name = facts.unranked[0][:64]
        raise ModelRejected(
            f"input '{name}' declares no shape, not even its rank, so requests cannot be checked; export "
            "the model with one, or set it with "
            f"the package onnx: model = onnx.load(path), then for that one of model.graph.input: "
            f"i.CopyFrom(onnx.helper.make_tensor_value_info({name!r}, i.type.tensor_type.elem_type, ['n', "
            "4])), and onnx.save(model, path); a "
            "name such as 'n' is an axis of any length",
            field="file",
        )
    model = trial_runs.Model(_runner(session, (*inputs, *outputs)), inputs, outputs)
    return trial_runs.judge(model, directory, tell, proof=prove(path), words=lambda error: messages.told(str(error)))


def _walk(path: Path) -> onnx_parser.OnnxFacts:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return onnx_parser.check_file(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return onnx_parser.check_file(data)


def _load(path: Path) -> Any:
    from tether.frameworks.onnx.library import onnxruntime  # noqa: PLC0415 - only after the file was walked, and under the limits

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:
        raise _refused("ONNX Runtime cannot load it", error, path) from error


def _runner(session: Any, specs: tuple[TensorSpec, ...]) -> row_trials.Run:
    """Return a function that runs a session."""
    from tether.frameworks.onnx.values import from_value, to_text, to_value  # noqa: PLC0415 - it loads ONNX Runtime

    bf16 = any(spec.datatype == "BF16" for spec in specs)
    text = {spec.name for spec in specs if spec.datatype == "BYTES"}

    def run(arrays: row_trials.Arrays) -> list[Any]:
        # ONNX Runtime does not copy uint16 values, so this reference keeps them alive until the run is over.
        plain = {
            name: to_text(array) if name in text else np.ascontiguousarray(array) for name, array in arrays.items()
        }
        if not bf16:
            return list(session.run(None, plain))
        values = {name: to_value(array) for name, array in plain.items()}
        return [from_value(value) for value in session.run_with_ort_values(None, values)]

    return run


def _specs(nodes: list[Any], side: str) -> tuple[TensorSpec, ...]:
    if len(nodes) > MAX_TENSORS:
        raise ModelRejected(f"the model has {len(nodes)} {side}s; at most {MAX_TENSORS} are allowed", field="file")
    return tuple(TensorSpec(node.name, _datatype(node, side), _shape(node.shape), _axes(node.shape)) for node in nodes)


def _axes(axes: list[Any]) -> tuple[str, ...]:
    names = tuple(axis if isinstance(axis, str) else "" for axis in axes)
    return names if any(names) else ()


def _shape(axes: list[Any]) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) and axis >= 0 else -1 for axis in axes)


def _datatype(node: Any, side: str) -> str:
    name = node.name[:64]
    match = _TENSOR.fullmatch(node.type)
    if match is None:
        raise ModelRejected(
            f"{side} '{name}' is a {node.type[:64]}, but only tensors can be served; export a classifier "
            "without ZipMap: "
            "to_onnx(..., options={'zipmap': False}) of skl2onnx, convert_lightgbm(..., zipmap=False) of onnxmltools",
            field="file",
        )
    datatype = DATATYPES.get(match[1])
    if datatype is None:
        raise ModelRejected(
            f"{side} '{name}' has the element type {match[1]}, for which OIP has no datatype; cast it to FP32",
            field="file",
        )
    return datatype


def _refused(what: str, error: Exception, path: Path) -> ModelRejected:
    """Return a refusal in one line without local paths: the file's, and those compiled into ONNX Runtime."""
    if sandbox.is_memory(error):
        return InspectionLimitExceeded(sandbox.MEMORY, field="file")
    text = str(error).replace(str(path), path.name).replace(str(path.parent), "")
    return ModelRejected(f"the model was refused: {what}: {messages.told(text)}", field="file")


if __name__ == "__main__":
    sys.exit(sandbox.main(sys.argv[1:], inspect))
