"""Run a model a few times, to see that it runs and whether anything speaks against sharing a run among callers.

Rows of different callers share a run where that is proven from the model's graph (:mod:`tether.frameworks.onnx_rows`) or
declared by its publisher. Trial runs can only speak against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from tether.frameworks.onnx_rows import RowProof
from tether.model import TensorSpec
from tether.modelstore.inspection import Inspection
from tether.modelstore.trials import Run, Tried, trial
from tether.tensor import NUMPY_DTYPES

BATCH_BYTES = 8 << 20
"""Inputs and outputs of one automatic batch together."""
LARGEST_BATCH = 512
LARGEST_GUESS = 32
"""When some axis besides the first is free too, so that nobody knows the size of a row."""

NO_PROOF = RowProof(independent=False)
"""Of a model that is no graph: nothing is known of its rows."""
UNTRIED = "its rows are proven to be independent; no made-up values were found that it runs with"
NO_FREE_AXIS = "not every input and output has a free first axis"


def judge(
    run: Run, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], proof: RowProof = NO_PROOF
) -> Inspection:
    """Warm the model up and decide on batching.

    Raises:
        Exception: the framework's own, when the model raised whatever it was given, and its shapes are known.
        ModelRejected: an input is too large to try.
    """
    free = bool(inputs) and all(spec.shape and spec.shape[0] == -1 for spec in inputs)
    tried = trial(run, inputs, [spec.name for spec in outputs], rows=free)
    if tried.error is not None and not any(-1 in spec.shape[1:] for spec in inputs):
        raise tried.error
    outputs = _ranked(outputs, tried)
    if proof.independent:
        outputs = _with_rows(outputs)
    if not free or not all(spec.shape and spec.shape[0] == -1 for spec in outputs):
        return Inspection(inputs, outputs, 0, proof.reason or NO_FREE_AXIS)
    if tried.refuted:
        said = f"a trial run shows that rows depend on one another: {tried.refuted}"
        note = f"{proof.reason}; {said}" if proof.reason else said
        return Inspection(inputs, outputs, 0, note, refuted=True)
    if not proof.independent:
        return Inspection(inputs, outputs, 0, proof.reason)
    note = "" if tried.outputs is not None else UNTRIED
    return Inspection(inputs, outputs, automatic_batch(inputs, outputs), note)


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


def _ranked(outputs: Sequence[TensorSpec], tried: Tried) -> tuple[TensorSpec, ...]:
    """Give outputs that declare no shape the rank they really had."""
    if tried.outputs is None:
        return tuple(outputs)
    return tuple(
        TensorSpec(spec.name, spec.datatype, (-1,) * array.ndim) if not spec.shape and array.ndim else spec
        for spec, array in zip(outputs, tried.outputs, strict=True)
    )


def _with_rows(outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Some exporters write that an output has one row; where the graph proves that it has them all, it does."""
    return tuple(msgspec.structs.replace(spec, shape=(-1, *spec.shape[1:])) if spec.shape else spec for spec in outputs)
