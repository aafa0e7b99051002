"""Run a model a few times, to see that it runs and whether anything speaks against sharing a run among callers.

Rows of different callers share a run where that is proven from the model's graph (:mod:`tether.frameworks.row_proof.prover`) or
declared by its publisher. Trial runs can only speak against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from tether.domain.manifest import TensorSpec
from tether.domain.tensor import NUMPY_DTYPES
from tether.errors import InspectionLimitExceeded
from tether.frameworks.row_proof.prover import RowProof
from tether.model import sample as samples
from tether.modelstore.inspection import row_trials, sandbox
from tether.modelstore.inspection.inspector import MORE, SAMPLE, TRYING, Inspection, InspectionReport, Tell
from tether.modelstore.inspection.row_trials import Run, Tried, trial

BATCH_BYTES = 8 << 20
"""Inputs and outputs of one automatic batch together."""
LARGEST_BATCH = 512
LARGEST_GUESS = 32
"""When some axis besides the first is free too, so that nobody knows the size of a row."""

NO_PROOF = RowProof(independent=False)
"""Of a model that is no graph: nothing is known of its rows."""
UNTRIED = "its rows are proven to be independent; no made-up values were found that it runs with"
NO_FREE_AXIS = "not every input and output has a free first axis"


class _Named(NamedTuple):
    """A signature to compare a sample with."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    name: str = ""
    platform: str = ""


class Model(NamedTuple):
    """A model that is to be tried: one run of it, and its signature."""

    run: Run
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def judge(
    model: Model,
    directory: Path,
    tell: Tell,
    *,
    proof: RowProof = NO_PROOF,
    compare: bool = True,
    words: Callable[[Exception], str] = row_trials.words,
) -> Inspection:
    """Try a model of ``directory`` with the sample that is there and with made-up inputs, and decide on batching.

    It may fail with what is made up: then it is taken as not tried. ``tell`` hears what is known so far. ``compare``: rows alone
    with the same rows together. ``words`` tells of an error.

    Raises:
        ModelRejected: an input is too large to try, the model does not take its sample, or needs too much memory.
        OutputMisfit: its outputs are not what it declares.
    """
    sample = samples.read(directory, _Named(model.inputs))
    needed = tuple(spec for spec in model.inputs if not spec.optional)
    doing = TRYING if sample is None else SAMPLE
    tell(InspectionReport(doing=doing, inspection=_concluded(model, needed, proof, Tried(), f"{doing} did not end")))
    tried = trial(
        model.run,
        needed,
        [spec.name for spec in model.outputs],
        rows=compare and _free(needed),
        sample=sample,
        ran=lambda found: tell(InspectionReport(doing=MORE, inspection=_concluded(model, needed, proof, Tried(found)))),
    )
    if tried.error is not None and sandbox.is_memory(tried.error):
        raise InspectionLimitExceeded(sandbox.MEMORY, field="file") from tried.error
    return _concluded(
        model, needed, proof, tried, "" if tried.error is None else f"{TRYING} failed: {words(tried.error)}"
    )


def _free(specs: Sequence[TensorSpec]) -> bool:
    return bool(specs) and all(spec.shape and spec.shape[0] == -1 for spec in specs)


def _concluded(
    model: Model, needed: tuple[TensorSpec, ...], proof: RowProof, tried: Tried, untried: str = ""
) -> Inspection:
    """What trials, as far as they came, and the proof say of a model."""
    outputs = _ranked(model.outputs, tried)
    found = Inspection(model.inputs, outputs, 0, untried=untried)
    if proof.independent:
        outputs = _with_rows(outputs)
    found = replace(found, outputs=outputs)
    if not _free(needed) or not _free(outputs):
        return replace(found, note=proof.reason or NO_FREE_AXIS)
    if tried.refuted:
        said = f"a trial run shows that rows depend on one another: {tried.refuted}"
        note = f"{proof.reason}; {said}" if proof.reason else said
        return replace(found, note=note, refuted=True)
    if not proof.independent:
        return replace(found, note=proof.reason)
    note = "" if tried.outputs is not None else UNTRIED
    return replace(found, max_batch_size=automatic_batch(needed, outputs), note=note)


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
    """Outputs as they really were: with the rank they had, where they declare none, and open axes for sizes that they did not have."""
    if tried.outputs is None:
        return tuple(outputs)
    return tuple(_seen(spec, np.shape(array)) for spec, array in zip(outputs, tried.outputs, strict=True))


def _seen(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    if not spec.shape and shape:
        return replace(spec, shape=(-1,) * len(shape))
    if len(spec.shape) != len(shape):
        return spec
    axes = (axis if axis in (-1, seen) else -1 for axis, seen in zip(spec.shape, shape, strict=True))
    return replace(spec, shape=tuple(axes))


def _with_rows(outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Some exporters write that an output has one row; where the graph proves that it has them all, it does."""
    return tuple(replace(spec, shape=(-1, *spec.shape[1:])) if spec.shape else spec for spec in outputs)
