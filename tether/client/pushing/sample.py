"""Reads the sample of a push: real inputs, as the platform takes them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tether.client.operations import Json
from tether.domain.tensor import from_numpy
from tether.errors import InvalidRequest
from tether.wire.oip_json import tensor_to_json

Sample = str | Path | Mapping[str, npt.ArrayLike]
"""Inputs by name, or a file: .npz, .npy (for one input), JSON ``{"name": [...]}`` or ``{"inputs":
[tensors]}``."""


def sample_of(sample: Sample | None) -> Json | None:
    """Return the field ``sample`` of a push.

    Raises:
        InvalidRequest: it cannot be read, or has an unsupported format.
    """
    if sample is None:
        return None
    return _of_file(Path(sample)) if isinstance(sample, str | Path) else _of_arrays(sample)


def _of_file(path: Path) -> Json:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read the sample {path}: {error.strerror}", field="sample") from error
    try:
        if content.startswith(b"PK"):
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                return _of_arrays({name: archive[name] for name in archive.files})
        if content.startswith(b"\x93NUMPY"):
            return _of_arrays({"": np.load(io.BytesIO(content), allow_pickle=False)})
        found = json.loads(content)
    except (ValueError, OSError, EOFError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        raise InvalidRequest(
            f"the sample {path} is not a readable .npz, .npy or JSON file: {error}", field="sample"
        ) from error
    if isinstance(found, list):
        return {"": found}
    if not isinstance(found, dict) or not found:
        raise InvalidRequest(
            f'the sample {path} must hold {{"name": [...]}} or {{"inputs": [tensors]}}', field="sample"
        )
    return found


def _of_arrays(arrays: Mapping[str, Any]) -> Json:
    """Convert arrays; arrays keep their dtype, other values take the model's, where known."""
    if all(isinstance(array, np.ndarray) for array in arrays.values()):
        return {"inputs": [tensor_to_json(from_numpy(name, array), compact=True) for name, array in arrays.items()]}
    return {name: array.tolist() if isinstance(array, np.ndarray) else array for name, array in arrays.items()}
