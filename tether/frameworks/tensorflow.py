"""Runs TensorFlow SavedModels: one of their signatures, with TensorFlow's and Triton's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tether.domain.manifest import TensorSpec
from tether.domain.signature import chosen
from tether.domain.tensor import Array
from tether.errors import ModelRejected
from tether.frameworks import truncated_files

DATATYPES = {
    tf.bool: "BOOL",
    tf.uint8: "UINT8",
    tf.uint16: "UINT16",
    tf.uint32: "UINT32",
    tf.uint64: "UINT64",
    tf.int8: "INT8",
    tf.int16: "INT16",
    tf.int32: "INT32",
    tf.int64: "INT64",
    tf.float16: "FP16",
    tf.bfloat16: "BF16",
    tf.float32: "FP32",
    tf.float64: "FP64",
    tf.string: "BYTES",
}


_loading = tf.__internal__.saved_model.load


class _Optimizer(tf.Module):  # type: ignore[misc, unused-ignore]
    """Replaces the optimizer that Keras 2 saved with a model, because TensorFlow cannot load one. Serving
    needs none, so its variables (its slots) are left out.
    """

    def add_slot(self, **_: Any) -> Any:
        return tf.Module()

    def _create_or_restore_slot_variable(self, *_: Any, **__: Any) -> None:
        return None


def _allow_optimizers() -> None:
    """Let models of this process have an optimizer."""
    if "optimizer" not in _loading.registered_identifiers():
        version = _loading.VersionedTypeRegistration(
            object_factory=lambda _proto: _Optimizer(), version=1, min_producer_version=1, min_consumer_version=1
        )
        _loading.register_revived_type("optimizer", lambda found: isinstance(found, _Optimizer), [version])


class SavedModel:
    """A loaded SavedModel and its signature; see :class:`tether.frameworks.runtime.Runtime`."""

    def __init__(self, directory: Path, signature: str) -> None:
        truncated_files.check_saved_model(directory)
        _allow_optimizers()
        try:
            self._model: Any = tf.saved_model.load(str(directory))
        except IndexError as error:
            raise ModelRejected(
                "a file of the folder 'variables' is cut off: it has fewer bytes than "
                "'variables/variables.index' says; "
                "download or export the folder again",
                field="file",
            ) from error
        self.signatures = tuple(sorted(map(str, self._model.signatures)))
        self.signature = chosen(self.signatures, signature)
        function = self._model.signatures[self.signature]
        self._function: Any = function
        # sorted, because TensorFlow's own order differs in every process
        self._inputs = dict(sorted(function.structured_input_signature[1].items()))
        self.inputs = tuple(_spec(name, found) for name, found in self._inputs.items())
        self.outputs = tuple(_spec(name, found) for name, found in sorted(function.structured_outputs.items()))

    @property
    def output_names(self) -> Sequence[str]:
        return tuple(spec.name for spec in self.outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names the requested outputs, empty for all in the model's order."""
        given = {name: tf.constant(inputs[name], dtype=spec.dtype) for name, spec in self._inputs.items()}
        found = self._function(**given)
        return [found[name].numpy() for name in outputs or self.output_names]

    def close(self) -> None:
        self._model = self._function = None


def load(directory: Path, *, threads: int = 1, device: str = "auto", signature: str = "") -> SavedModel:
    """Load a folder that is a SavedModel; ``device`` is ``auto``, ``cpu`` or ``cuda``. Serves ``signature``, see
    :func:`tether.domain.signature.chosen`. Sets up TensorFlow: once a process.

    Raises:
        ModelRejected: it has not the signature that is served, or holds something else than tensors.
    """
    devices = tf.config.list_physical_devices("GPU")
    if device == "cuda" and not devices:
        raise ModelRejected("model_device is 'cuda', but TensorFlow finds no such device here")
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    else:
        for found in devices:
            tf.config.experimental.set_memory_growth(found, True)
    return SavedModel(directory, signature)


def _spec(name: str, found: Any) -> TensorSpec:
    datatype = DATATYPES.get(getattr(found, "dtype", None))
    if datatype is None or not isinstance(found, tf.TensorSpec):
        raise ModelRejected(f"'{name[:64]}' is no tensor that OIP has a datatype for", field="file")
    if found.shape.rank is None:
        raise ModelRejected(
            f"'{name[:64]}' declares no shape; export the model with the rank of every tensor",
            field="file",
        )
    return TensorSpec(name, datatype, tuple(-1 if axis is None else int(axis) for axis in found.shape))
