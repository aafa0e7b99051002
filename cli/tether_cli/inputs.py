"""Reads request inputs from a file, standard input or an argument: OIP JSON, plain JSON, ``.npy`` or ``.npz``."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tether.client.inputs import UNNAMED
from tether.domain.tensor import Array, to_numpy
from tether.errors import InvalidRequest
from tether.wire import oip


def read(source: str) -> dict[str, Any]:
    """Return inputs by name: arrays, or nested lists from plain JSON.

    Raises:
        InvalidRequest: the source cannot be read, or has an unknown format.
    """
    data = _bytes(source)
    if data.startswith(b"\x93NUMPY"):
        return {UNNAMED: _numpy(source, data)}
    if data.startswith(b"PK"):
        return _archive(source, data)
    return _json(source, data)


def _bytes(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read()
    if source.lstrip().startswith(("{", "[")) and not os.path.lexists(source):
        return source.encode(errors="surrogateescape")
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {source}: {error.strerror}", field="inputs") from error


def _numpy(source: str, data: bytes) -> Array:
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise InvalidRequest(f"{source} is not a readable .npy file: {_reason(error)}", field="inputs") from error


def _archive(source: str, data: bytes) -> dict[str, Any]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{source} is not a readable .npz file: {_reason(error)}", field="inputs") from error


def _reason(error: Exception) -> str:
    if "Object arrays" in str(error):
        return "it has an array of Python objects; save text as array.astype('U') and bytes as array.astype('S')"
    return str(error)


def _json(source: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{source} is not JSON, .npy or .npz: {error}", field="inputs") from error
    if isinstance(found, list):
        return {UNNAMED: found}
    if not isinstance(found, dict):
        raise InvalidRequest(
            f'{source} must be {{"name": [...]}}, {{"inputs": [tensors]}} or one nested list', field="inputs"
        )
    tensors = found.get("inputs")
    if isinstance(tensors, list) and (tensors or len(found) == 1) and all(isinstance(item, dict) for item in tensors):
        return {tensor.name: to_numpy(tensor) for tensor in oip.tensors_from_json(tensors)}
    return found


def rows(inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Split inputs into one set per row of their first axis, which stays with length 1.

    Raises:
        InvalidRequest: an input has no first axis, or their lengths differ.
    """
    lengths = {name: array.shape[0] if array.ndim else None for name, array in inputs.items()}
    if None in lengths.values() or len(set(lengths.values())) != 1:
        listed = ", ".join(f"'{name}' has {length}" for name, length in lengths.items())
        raise InvalidRequest(f"--rows needs inputs of the same first axis: {listed}", field="inputs")
    count = next(iter(lengths.values())) or 0
    return ({name: array[index : index + 1] for name, array in inputs.items()} for index in range(count))
