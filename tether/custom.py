"""Models that are Python: what a bundle says of itself, and how its class is found.

A bundle is a folder with ``model.json`` (:class:`Description`) and the modules that it needs, ``model.py`` among them. The
class is made without arguments; ``load(directory)`` is called once when it has one, then ``predict(inputs)`` for each run
with arrays by name, which returns arrays by name.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tether.errors import InferenceFailed, ModelRejected
from tether.model import TensorSpec
from tether.tensor import NUMPY_DTYPES, Array

DESCRIPTION = "model.json"
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """``model.json``: the class in ``model.py``, its tensors, and the rows of one run (0: it is not batched)."""

    class_name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0


def describe(directory: Path) -> Description:
    """Read a bundle's description.

    Raises:
        ModelRejected: there is none, or it is not as it should be.
    """
    try:
        found = msgspec.json.decode((directory / DESCRIPTION).read_bytes(), type=Description)
    except OSError as error:
        raise ModelRejected(f"the bundle has no {DESCRIPTION}", field=DESCRIPTION) from error
    except msgspec.MsgspecError as error:
        raise ModelRejected(f"{DESCRIPTION} is not as it should be: {error}", field=DESCRIPTION) from error
    _check(found)
    return found


def _check(found: Description) -> None:
    if _CLASS.fullmatch(found.class_name) is None:
        raise ModelRejected("className must be the name of a class in model.py", field="className")
    if not found.outputs or not 0 <= found.max_batch_size <= 65536:
        raise ModelRejected("there must be outputs, and maxBatchSize must be 0 to 65536", field=DESCRIPTION)
    for spec in (*found.inputs, *found.outputs):
        if spec.datatype != "BYTES" and spec.datatype not in NUMPY_DTYPES:
            raise ModelRejected(f"tensor '{spec.name[:64]}' has no datatype of the protocol", field=DESCRIPTION)
        if found.max_batch_size and (not spec.shape or spec.shape[0] != -1):
            raise ModelRejected(
                f"tensor '{spec.name[:64]}' needs -1 as its first axis, because maxBatchSize is set", field=DESCRIPTION
            )


class CustomModel:
    """An instance of a bundle's class; see :class:`tether.ports.Runtime`. Loading it runs its code."""

    def __init__(self, directory: Path, description: Description) -> None:
        sys.path.insert(0, str(directory))
        try:
            made = getattr(importlib.import_module("model"), description.class_name)()
        except AttributeError as error:
            raise ModelRejected(f"model.py has no class '{description.class_name}'", field="className") from error
        if hasattr(made, "load"):
            made.load(directory)
        if not callable(getattr(made, "predict", None)):
            raise ModelRejected(f"class '{description.class_name}' has no predict()", field="className")
        self._model: Any = made
        self._specs = {spec.name: spec for spec in description.outputs}

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def run(self, inputs: Mapping[str, Array], outputs: Any) -> list[Array]:
        """Call ``predict``.

        Raises:
            InferenceFailed: it did not return what the bundle's description says.
        """
        found = self._model.predict(dict(inputs))
        if not isinstance(found, Mapping):
            raise InferenceFailed(f"predict() returned {type(found).__name__}, not arrays by name")
        return [self._output(found, name) for name in outputs or self._specs]

    def _output(self, found: Mapping[str, Any], name: str) -> Array:
        spec = self._specs[name]
        if name not in found:
            raise InferenceFailed(f"predict() returned no output '{name}'")
        dtype = np.dtype(np.object_) if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype]
        array = np.asarray(found[name], dtype=dtype)
        fits = len(array.shape) == len(spec.shape) and all(
            want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise InferenceFailed(f"output '{name}' has shape {list(array.shape)}, not {list(spec.shape)}")
        return array

    def close(self) -> None:
        self._model = None
