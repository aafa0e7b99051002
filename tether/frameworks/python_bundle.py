"""Runs models written in Python: reads a bundle's description and finds its class.

A bundle is a folder with ``model.json`` (:class:`Description`) and its modules, ``model.py`` among them. The
class is created without arguments; ``load(directory)`` is called once if it has one, then ``predict(inputs)``
for each run with arrays by name, which returns arrays by name, or yields them: each time a part of the rows,
in order.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES, Array
from tether.errors import ModelRejected, OutputMisfit

DESCRIPTION = "model.json"
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """``model.json``: the class in ``model.py``, its tensors, and the maximum rows of a run (0: not batched)."""

    class_name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0


def describe(directory: Path) -> Description:
    """Read a bundle's description.

    Raises:
        ModelRejected: it is missing or invalid.
    """
    try:
        found = msgspec.json.decode((directory / DESCRIPTION).read_bytes(), type=Description)
    except OSError as error:
        raise ModelRejected(f"the bundle has no {DESCRIPTION}", field=DESCRIPTION) from error
    except msgspec.MsgspecError as error:
        raise ModelRejected(f"{DESCRIPTION} is invalid: {error}", field=DESCRIPTION) from error
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


def found_class(directory: Path, description: Description) -> Any:
    """Import the bundle's ``model.py``, which runs its code; return the described class.

    Raises:
        ModelRejected: the module has no such class.
    """
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    module = importlib.import_module("model")
    if not hasattr(module, description.class_name):
        raise ModelRejected(f"model.py has no class '{description.class_name}'", field="className")
    return getattr(module, description.class_name)


class CustomModel:
    """An instance of a bundle's class; see :class:`tether.frameworks.runtime.Runtime`. Loading it runs its code."""

    def __init__(self, directory: Path, description: Description) -> None:
        made = found_class(directory, description)()
        if hasattr(made, "load"):
            made.load(directory)
        if not callable(getattr(made, "predict", None)):
            raise ModelRejected(f"class '{description.class_name}' has no predict()", field="className")
        self._model: Any = made
        self._specs = {spec.name: spec for spec in description.outputs}

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Call ``predict``.

        Raises:
            OutputMisfit: its result does not match the bundle's description.
        """
        wanted = [self._specs[name] for name in outputs or self._specs]
        found = self._model.predict(dict(inputs))
        if isinstance(found, Iterator):
            return _joined(found, wanted)
        return [_output(found, spec) for spec in wanted]

    def close(self) -> None:
        self._model = None


def _joined(parts: Iterator[Any], wanted: Sequence[TensorSpec]) -> list[Array]:
    """Join all parts, each output on its first axis. Parts are copied: a model may reuse their memory for the
    next one.
    """
    found: list[list[Array]] = [[] for _ in wanted]
    for number, part in enumerate(parts, 1):
        for spec, before in zip(wanted, found, strict=True):
            array = _output(part, _open(spec), f"part {number}: ").copy()
            if before and before[0].shape[1:] != array.shape[1:]:
                raise OutputMisfit(
                    f"part {number}: output '{spec.name}' has shape {list(array.shape)}, and the part before it "
                    f"{list(before[-1].shape)}; they can differ in the first axis only"
                )
            before.append(array)
    if any(not arrays for arrays in found):
        raise OutputMisfit(
            "predict() yielded nothing; yield arrays by name at least once, of no rows if there are none"
        )
    return [_output({spec.name: np.concatenate(found.pop(0))}, spec) for spec in wanted]


def _open(spec: TensorSpec) -> TensorSpec:
    """Return the spec of one part, with an open first axis."""
    if not spec.shape:
        raise OutputMisfit(f"predict() yields parts, and output '{spec.name}' has no axis to join them on: return it")
    return TensorSpec(spec.name, spec.datatype, (-1, *spec.shape[1:]))


def _output(found: Any, spec: TensorSpec, part: str = "") -> Array:
    """Return one output of a result, or of a ``part``, with which error messages begin."""
    what = f"{part}predict() {'yielded' if part else 'returned'}"
    if not isinstance(found, Mapping):
        raise OutputMisfit(f"{what} {type(found).__name__}, not arrays by name")
    if spec.name not in found:
        raise OutputMisfit(f"{what} no output '{spec.name}'")
    dtype = np.dtype(np.object_) if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype]
    array = np.asarray(found[spec.name], dtype=dtype)
    fits = len(array.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise OutputMisfit(f"{part}output '{spec.name}' has shape {list(array.shape)}, not {list(spec.shape)}")
    return array
