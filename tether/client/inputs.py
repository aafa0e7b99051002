"""Converts a request's inputs to arrays of the model's datatypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt

from tether.client.protocol import Flow, Request, RetryPolicy, exchange_json
from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Array
from tether.errors import BadTensor, InvalidRequest

T = TypeVar("T")
Inputs = Mapping[str, npt.ArrayLike] | npt.ArrayLike
"""Arrays, lists or numbers by input name; a bare one for a model with one input."""

Version = int | str | None
UNNAMED = ""
"""Name of a bare input: the model's only one."""

_DEFAULT = (np.dtype(np.float64), np.dtype(np.int64))
"""numpy's dtypes for Python numbers."""


class _Metadata(msgspec.Struct):
    inputs: list[TensorSpec] = []


def served_path(model: str, version: Version) -> str:
    tail = "" if version is None else f"/versions/{quote(str(version), safe='')}"
    return f"/v2/models/{quote(model, safe='')}{tail}"


def signature(policy: RetryPolicy, model: str, version: Version) -> Flow[list[TensorSpec]]:
    """Return a version's inputs from the server."""
    metadata = yield from exchange_json(policy, Request("GET", served_path(model, version)), _Metadata)
    return metadata.inputs


def fitted(
    policy: RetryPolicy, model: str, version: Version, inputs: Inputs, send: Callable[[dict[str, Array]], Flow[T]]
) -> Flow[T]:
    """Send inputs; if the server rejects a datatype, retry with float64 and int64 arrays converted to the
    model's.

    So a request with fitting arrays needs no request for the model's metadata.
    """
    given = yield from arrays(policy, model, version, inputs)
    try:
        return (yield from send(given))
    except BadTensor:
        if not any(array.dtype in _DEFAULT for array in given.values()):
            raise
        better = yield from arrays(policy, model, version, given, fit=True)
        if all(better[name].dtype == array.dtype for name, array in given.items()):
            raise
    return (yield from send(better))


def arrays(
    policy: RetryPolicy,
    model: str,
    version: Version,
    inputs: Inputs,
    known: dict[str, str] | None = None,
    *,
    fit: bool = False,
) -> Flow[dict[str, Array]]:
    """Return inputs as arrays. Arrays keep their dtype; lists and numbers take the model's, requested once.

    With ``fit``, arrays of float64 and int64 (numpy's defaults) are converted as well. ``known`` caches the
    model's datatypes for further inputs.

    Raises:
        BadTensor: the model's datatype cannot hold the values.
        InvalidRequest: a bare input for a model without inputs or with several.
    """
    given: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {UNNAMED: inputs}
    as_they_are = (value for value in given.values() if isinstance(value, np.ndarray))
    if UNNAMED not in given and sum(not fit or value.dtype not in _DEFAULT for value in as_they_are) == len(given):
        return {name: np.asarray(value) for name, value in given.items()}
    found, needed = known, list(known or ())
    if not found:
        specs = yield from signature(policy, model, version)
        found = {spec.name: spec.datatype for spec in specs}
        needed = [spec.name for spec in specs if not spec.optional]
    if known is not None:
        known.update(found)
    return {name: _as_array(name, value, found.get(name), fit=fit) for name, value in named(given, needed).items()}


def named(given: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Name a bare input after the model's only one.

    Raises:
        InvalidRequest: the model has none or several.
    """
    if UNNAMED not in given:
        return given
    if len(names) != 1:
        reason = f"has the inputs {', '.join(map(repr, names))}; pass them by name" if names else "has no inputs"
        raise InvalidRequest(f"the model {reason}", field="inputs")
    return {names[0]: given[UNNAMED]}


def _as_array(name: str, value: npt.ArrayLike, datatype: str | None, *, fit: bool) -> Array:
    if isinstance(value, np.ndarray) and not (fit and value.dtype in _DEFAULT):
        return value
    dtype = NUMPY_DTYPES.get(datatype or "")
    try:
        plain: Array = np.asarray(value)
        if dtype is None or plain.dtype == dtype:
            return plain
        with np.errstate(all="ignore"):
            cast = plain.astype(dtype)
        if plain.dtype.kind in "OSU" or not _same_values(plain, cast):
            raise ValueError(f"a value does not fit {datatype}")
        return cast
    except (ValueError, TypeError, OverflowError) as error:
        raise BadTensor(
            f"input '{name}' is not an array of {datatype or 'one datatype'}: {error}", field=name
        ) from error


def _same_values(plain: Array, cast: Array) -> bool:
    """Return True if the cast kept the values; rounding to a shorter float is allowed."""
    if cast.dtype.kind in "biu":
        return bool(np.array_equal(plain, cast))
    wide = cast.astype(np.float64)
    return bool(np.array_equal(np.isfinite(plain), np.isfinite(wide)))
