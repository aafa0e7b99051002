"""Run a model a few times, to prove that it runs and whether its first axis is a batch axis.

Rows of different callers share a run only when that cannot change an answer. So a model is batched when every first
axis is free **and** one row alone gives the same answer as that row among three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tether.errors import ModelRejected
from tether.model import TensorSpec
from tether.modelstore.inspection import Inspection
from tether.tensor import NUMPY_DTYPES

ROWS = 3
BATCH_BYTES = 8 << 20
"""Inputs and outputs of one automatic batch together."""
LARGEST_BATCH = 512
LARGEST_GUESS = 32
"""When some axis besides the first is free too, so that nobody knows the size of a row."""
MAX_ELEMENTS = 1 << 26
BF16 = NUMPY_DTYPES["BF16"]

Arrays = Mapping[str, Any]
Run = Callable[[Arrays], list[Any]]
"""One run of a model: inputs by name, outputs in the order of its signature."""


class Symbols(NamedTuple):
    """Names of the first axes: None where an axis has no name, an int where it is fixed."""

    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

    @classmethod
    def of(cls, session: Any) -> Symbols:
        firsts = [
            [node.shape[0] if node.shape else 0 for node in nodes]
            for nodes in (session.get_inputs(), session.get_outputs())
        ]
        return cls(tuple(firsts[0]), tuple(firsts[1]))


NO_SYMBOLS = Symbols()


def judge(
    run: Run, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], symbols: Symbols = NO_SYMBOLS
) -> Inspection:
    """Warm the model up and decide on batching.

    Raises:
        Exception: the framework's own, when the model raised although every axis but the first is known.
        ModelRejected: an input is too large to try.
    """
    free = bool(inputs) and all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))
    first = _first_run(run, inputs, ROWS if free else 1)
    if isinstance(first, Exception):
        if _guessed(inputs):
            return _unproven(inputs, outputs, symbols, free=free)
        if free and not isinstance(alone := _first_run(run, inputs, 1), Exception):
            return Inspection(inputs, _ranked(outputs, alone[0]), 0, "it does not run with more than one row")
        raise first
    found, distinct = first
    outputs = _ranked(outputs, found)
    if not free:
        return Inspection(inputs, outputs, 0, "not every input and output has a free first axis")
    reason = _mixes_rows(run, inputs, found, distinct=distinct)
    return Inspection(inputs, outputs, 0 if reason else automatic_batch(inputs, outputs), reason)


def automatic_batch(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int:
    """Most rows of one run when nobody said: a power of two whose tensors stay within ``BATCH_BYTES``."""
    specs = (*inputs, *outputs)
    width = sum(
        int(np.prod([max(axis, 1) for axis in spec.shape[1:]], dtype=np.float64)) * _item_size(spec) for spec in specs
    )
    largest = LARGEST_GUESS if any(-1 in spec.shape[1:] for spec in specs) else LARGEST_BATCH
    rows = max(1, min(largest, BATCH_BYTES // max(width, 1)))
    return int(1 << (rows.bit_length() - 1))


def _item_size(spec: TensorSpec) -> int:
    return 64 if spec.datatype == "BYTES" else NUMPY_DTYPES[spec.datatype].itemsize


def _guessed(inputs: Sequence[TensorSpec]) -> bool:
    return any(-1 in spec.shape[1:] for spec in inputs)


def _unproven(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], symbols: Symbols, *, free: bool
) -> Inspection:
    """No run was possible, because nobody knows the real shapes: take the names of the axes at their word."""
    names = set(symbols.inputs)
    named = len(names) == 1 and isinstance(symbols.inputs[0], str) and set(symbols.outputs) == names
    if free and named:
        return Inspection(inputs, outputs, automatic_batch(inputs, outputs))
    return Inspection(inputs, outputs, 0, "its shapes are not known well enough to try it", unproven=free)


def zeros(inputs: Sequence[TensorSpec], rows: int = 1) -> dict[str, Any]:
    """Zeros that fit; free axes have ``rows`` elements if they are the first one, else 1.

    Raises:
        ModelRejected: an input is too large to try.
    """
    return _arrays(inputs, rows, distinct=False)


def _first_run(run: Run, inputs: Sequence[TensorSpec], rows: int) -> tuple[list[Any], bool] | Exception:
    """A run with ``rows`` rows: with rows that differ (True) if the model takes them, else with zeros (False)."""
    try:
        return run(_arrays(inputs, rows, distinct=True)), True
    except (ModelRejected, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - the runtime's errors share no base, and the next try has its own
        distinct = False
    try:
        return run(_arrays(inputs, rows, distinct=distinct)), distinct
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - likewise; the caller decides what a refusal means
        return error


def _mixes_rows(run: Run, inputs: Sequence[TensorSpec], together: list[Any], *, distinct: bool) -> str:
    if any(not array.shape or array.shape[0] != ROWS for array in together):
        return "an output's first axis does not follow the inputs'"
    arrays = _arrays(inputs, ROWS, distinct=distinct)
    for row in (0, ROWS - 1):
        try:
            alone = run({name: array[row : row + 1] for name, array in arrays.items()})
        except (ModelRejected, MemoryError):
            raise
        except Exception:  # noqa: BLE001 - the runtime's errors share no base; refusing one row is an answer
            return "it does not run with one row"
        if not all(_same(single, many[row : row + 1]) for single, many in zip(alone, together, strict=True)):
            return "a row's answer depends on the other rows of its batch"
    return ""


def _same(single: Any, many: Any) -> bool:
    if single.shape != many.shape:
        return False
    if single.dtype.kind == "f" or single.dtype == BF16:
        return bool(
            np.allclose(single.astype(np.float64), many.astype(np.float64), rtol=1e-2, atol=1e-3, equal_nan=True)
        )
    return bool(np.array_equal(single, many))


def _arrays(inputs: Sequence[TensorSpec], rows: int, *, distinct: bool) -> dict[str, Any]:
    return {spec.name: _array(spec, rows, distinct=distinct) for spec in inputs}


def _array(spec: TensorSpec, rows: int, *, distinct: bool) -> Any:
    shape = list(spec.shape)
    if shape and shape[0] == -1:
        shape[0] = rows
    shape = [max(axis, 1) if axis == -1 else axis for axis in shape]
    if np.prod(shape, dtype=np.float64) > MAX_ELEMENTS:
        raise ModelRejected(
            f"input '{spec.name[:64]}' has more than {MAX_ELEMENTS} elements in {rows} rows", field="file"
        )
    if spec.datatype == "BYTES":
        return np.full(shape, "", dtype=np.object_)
    dtype = NUMPY_DTYPES[spec.datatype]
    if not distinct or not shape or spec.datatype == "BF16":
        return np.zeros(shape, dtype)
    if dtype.kind == "f":
        return np.random.default_rng(1).standard_normal(shape).astype(dtype)
    column = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(column % 2 if dtype.kind == "b" else column % 100, shape).astype(dtype)


def _ranked(outputs: Sequence[TensorSpec], found: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """Give outputs that declare no shape the rank they really had."""
    return tuple(
        TensorSpec(spec.name, spec.datatype, (-1,) * array.ndim) if not spec.shape and array.ndim else spec
        for spec, array in zip(outputs, found, strict=True)
    )
