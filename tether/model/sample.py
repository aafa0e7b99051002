"""Real inputs stored with a version, for trial runs at its push and warm-up runs after a load.

They are a file of the version: JSON, ``{"inputs": [tensors]}`` as in an OIP request, or values by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tether.domain.signature import Signature, TensorSpec, check_inputs
from tether.domain.tensor import NUMPY_DTYPES, Array, from_numpy, to_numpy
from tether.errors import BadTensor, InvalidRequest, ModelRejected
from tether.wire.oip_json import tensors_from_json

PATH = "tether-sample.json"
LARGEST = 64 << 20
"""Maximum size of the file in bytes."""


def read(directory: Path, model: Signature) -> dict[str, Array] | None:
    """Return the sample inputs of a version in ``directory``; None if it has none.

    Raises:
        ModelRejected: they cannot be read, or do not match the model's signature.
    """
    try:
        content = (directory / PATH).read_bytes()
    except FileNotFoundError:
        return None
    if len(content) > LARGEST:
        raise ModelRejected(f"the sample has {len(content)} bytes; at most {LARGEST} are allowed", field="sample")
    try:
        arrays = _arrays(msgspec.json.decode(content, type=dict[str, Any]), model)
        tensors = tuple(from_numpy(name, array) for name, array in arrays.items())
        check_inputs(model, tensors, run_rows=0)
    except InvalidRequest as error:
        raise ModelRejected(f"the sample does not match the model: {error.message}", field="sample") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ModelRejected(f"the sample is not a JSON object: {str(error)[:200]}", field="sample") from error
    return {tensor.name: to_numpy(tensor) for tensor in tensors}


def _arrays(found: dict[str, Any], model: Signature) -> dict[str, Array]:
    specs = {spec.name: spec for spec in model.inputs}
    tensors = found.get("inputs")
    if len(found) == 1 and isinstance(tensors, list) and all(isinstance(one, dict) for one in tensors):
        given: dict[str, Any] = {tensor.name: to_numpy(tensor) for tensor in tensors_from_json(tensors)}
    else:
        given = found
    needed = [spec.name for spec in model.inputs if not spec.optional]
    if list(given) == [""] and len(needed) == 1:
        given = {needed[0]: given[""]}
    return {name: _fitted(value, specs[name]) if name in specs else np.empty(0) for name, value in given.items()}


def _fitted(value: Any, spec: TensorSpec) -> Array:
    """Return a value as an array of its input's datatype, if that can hold it."""
    if spec.datatype == "BYTES":
        return np.asarray(value, np.object_)
    dtype = NUMPY_DTYPES[spec.datatype]
    try:
        plain: Array = np.asarray(value)
        with np.errstate(all="ignore"):
            cast = plain.astype(dtype)
        same = plain.dtype == dtype or (
            plain.dtype.kind in "biuf"
            and (
                np.array_equal(plain, cast)
                if dtype.kind in "biu"
                else np.array_equal(np.isfinite(plain), np.isfinite(cast))
            )
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise BadTensor(f"'{spec.name}' is not an array of {spec.datatype}: {error}", field=spec.name) from error
    if not same:
        raise BadTensor(f"'{spec.name}' has values that are not of {spec.datatype}", field=spec.name)
    return cast


def rows_of(sample: dict[str, Array], names: Sequence[str], rows: int) -> dict[str, Any] | None:
    """Return ``rows`` rows of a sample, repeated if it has fewer; None if the inputs ``names`` share no first
    axis or have no row."""
    lengths = {array.shape[0] if array.ndim else 0 for name, array in sample.items() if name in names}
    if len(lengths) != 1 or not (length := lengths.pop()):
        return None
    chosen = [row % length for row in range(rows)]
    return {name: array[chosen] if name in names else array for name, array in sample.items()}
