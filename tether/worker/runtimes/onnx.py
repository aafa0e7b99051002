"""ONNX Runtime. The only importer of onnxruntime in the worker."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime

from tether.bus.upload import MODEL_PATH
from tether.errors import InferenceFailed, ModelRejected
from tether.model import Manifest
from tether.tensor import Array
from tether.worker.runtimes.process import Options

_BF16_CODE = 16
"""``TensorProto.BFLOAT16``: numpy has no such type, so its bits travel as uint16."""


class OnnxRuntime:
    """One ONNX Runtime session on the CPU; see :class:`tether.ports.Runtime`."""

    def __init__(self, manifest: Manifest, directory: Path, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if threads == 1:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(directory / _graph(manifest)), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ModelRejected(f"ONNX Runtime refuses the file: {type(error).__name__}") from error
        self._outputs = tuple(spec.name for spec in manifest.outputs)
        self._text = {spec.name for spec in manifest.inputs if spec.datatype == "BYTES"}
        self._has_bf16 = any(spec.datatype == "BF16" for spec in (*manifest.inputs, *manifest.outputs))

    @property
    def output_names(self) -> Sequence[str]:
        return self._outputs

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names what is wanted, empty for all in the model's order.

        Raises:
            InferenceFailed: ONNX Runtime refused the input, or text is not UTF-8.
        """
        wanted = list(outputs or self._outputs)
        feed = {name: _text(name, array) if name in self._text else array for name, array in inputs.items()}
        try:
            if self._has_bf16:
                return self._run_values(feed, wanted)
            found: list[Array] = self._session.run(wanted, feed)
        except Exception as error:
            raise InferenceFailed(f"the model failed: {_one_line(error)}") from error
        return found

    def _run_values(self, feed: Mapping[str, Array], wanted: list[str]) -> list[Array]:
        values = {name: _to_value(array) for name, array in feed.items()}
        return [_from_value(value) for value in self._session.run_with_ort_values(wanted, values)]

    def close(self) -> None:
        self._session = None


def load(manifest: Manifest, directory: Path, options: Options) -> OnnxRuntime:
    """The runtime of an ONNX version."""
    return OnnxRuntime(manifest, directory, threads=options.threads)


def _graph(manifest: Manifest) -> str:
    """The file with the graph; weights may lie in others, which ONNX Runtime finds beside it."""
    paths = [file.path for file in manifest.files]
    return MODEL_PATH if MODEL_PATH in paths else paths[0]


def _text(name: str, array: Array) -> Array:
    try:
        return np.array([item.decode() for item in array.ravel()], dtype=np.object_).reshape(array.shape)
    except UnicodeDecodeError as error:
        raise InferenceFailed(
            f"input '{name}' holds bytes that are not UTF-8 text, which ONNX strings must be"
        ) from error


def _to_value(array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BF16_CODE)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _from_value(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, dtype=ml_dtypes.bfloat16)
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    bits: Array = np.ctypeslib.as_array(pointer, shape=shape or (1,)).copy()
    array: Array = bits.view(ml_dtypes.bfloat16).reshape(shape)
    return array


def _one_line(error: Exception) -> str:
    """The framework's own words, without line breaks and without what could be a path."""
    words = str(error).split()
    return " ".join(word for word in words if "/" not in word)[:300]
